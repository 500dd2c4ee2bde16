"""VideoX-Fun's ControlNet for Qwen-Image: the formula once more, in float64, and whatever else hangs on the network."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import controls
import nets
from lanting.attach.caches import residual_cache
from lanting.attach.compiled import attach_compiled, detach_compiled
from lanting.attach.compute import attach_kernels, detach_kernels
from lanting.attach.parts import Part
from lanting.attach.sentinel import Sentinel
from lanting.attach.stream import Mapped, Streamer
from lanting.flow.loop import Canvas, denoise, velocity
from lanting.nn.blockwise import BlockwiseConfig, BlockwiseControlNet
from lanting.nn.controlnet_fun import FunConfig, QwenImageFunControlNet
from lanting.nn.linears import Int4Linear
from lanting.nn.mmdit import QwenImageTransformer
from lanting.nn.regions import regions_of
from lanting.nn.swap import swap
from lanting.specs.settle import repainting
from lanting.tasks.controlnet import steering

DEPTH, READS = nets.SHAPE["num_layers"], 36  # channels of a hint: 2 times 16 and 4


def net_of(layers: tuple[int, ...] = (0, 2), seed: int = 2) -> QwenImageFunControlNet:
    torch.manual_seed(seed)
    net = QwenImageFunControlNet(FunConfig(**nets.SHAPE, control_layers=layers, control_in_dim=READS))
    nets.randomise(net)
    with torch.no_grad():
        for name, weight in net.named_parameters():
            weight += float(".norm_" in name)
    return net


def body() -> QwenImageTransformer:
    net = nets.transformer()
    with torch.no_grad():
        for name, weight in net.named_parameters():
            weight += float("norm" in name and weight.ndim == 1 and "out" not in name)
    return net


def hint(seed: int = 8) -> Tensor:
    return torch.randn(1, 12, READS, generator=torch.Generator().manual_seed(seed))


def asked(net: Any, steer: Any = None, batch: int = 1, references: bool = True, **options: Any) -> Tensor:
    latents, *rest, grids, target = nets.inputs(net, batch=batch)
    if not references:
        latents, grids = latents[:, :12], grids[:1]
    with torch.no_grad():
        return net(latents, *rest, grids, target, steer=steer, **options)[:, :12]


def relative(one: Tensor, two: Tensor) -> float:
    return float((one.double() - two.double()).norm() / two.double().norm())


# ---------------------------------------------------------------- the formula
class Formula:
    """Transformer and nets as plain functions of weights, in float64; streams are rows of words and of pixels."""

    def __init__(self, net: Any, chains: list[tuple[Any, Tensor, float]]):
        self.body = {name: x.double() for name, x in net.state_dict().items()}
        self.chains = [
            ({n: x.double() for n, x in one.state_dict().items()}, one.config.control_layers, h[0].double(), scale)
            for one, h, scale in chains
        ]

    def linear(self, net: dict[str, Tensor], path: str, x: Tensor) -> Tensor:
        return x @ net[f"{path}.weight"].T + net[f"{path}.bias"]

    def rms(self, weight: Tensor, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * weight

    def __call__(self, latents: Tensor, time: Tensor, words: Tensor, grids: Any) -> Tensor:
        body = self.body
        img = self.linear(body, "img_in", latents.double())
        txt = self.linear(body, "txt_in", self.rms(body["txt_norm.weight"], words.double()))
        wave = 1000 * time.double() * torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float64) / 128)
        path = "time_text_embed.timestep_embedder.linear"
        first = F.silu(self.linear(body, f"{path}_1", torch.cat([wave.cos(), wave.sin()])))
        self.temb = self.linear(body, f"{path}_2", first)
        turns = self.turns(len(txt), grids)
        states = []
        for net, _, picture, _ in self.chains:
            seen = self.linear(net, "control_blocks.0.before_proj", self.linear(net, "control_img_in", picture))
            states.append((txt, seen + img[:12]))
        said: list[dict[int, Tensor]] = []
        for (net, layers, _, scale), (words_of, picture) in zip(self.chains, states, strict=True):
            told = {}
            for place, layer in enumerate(layers):
                words_of, picture = self.block(net, f"control_blocks.{place}", words_of, picture, turns)
                told[layer] = scale * self.linear(net, f"control_blocks.{place}.after_proj", picture)
            said.append(told)
        for index in range(DEPTH):
            txt, img = self.block(body, f"transformer_blocks.{index}", txt, img, turns)
            for told in said:
                if index in told:
                    img = torch.cat([img[:12] + told[index], img[12:]])
        scale, shift = self.linear(body, "norm_out.linear", F.silu(self.temb)).chunk(2)
        return self.linear(body, "proj_out", self.layer(img[:12]) * (1 + scale) + shift)

    def turns(self, words: int, grids: Any) -> Tensor:
        """Angles (T + N, E/2): pictures around the middle, one frame behind the other, words behind all of them."""
        most = max(max(rows // 2, columns // 2) for _, rows, columns in grids)
        places = [(most + i, most + i, most + i) for i in range(words)]
        for frame, (_, rows, columns) in enumerate(grids):
            for r in range(rows):
                places += [(frame, r - (rows - rows // 2), c - (columns - columns // 2)) for c in range(columns)]
        angles = []
        for axis, dim in enumerate(nets.SHAPE["axes_dims_rope"]):
            at = torch.tensor([place[axis] for place in places], dtype=torch.float64)
            angles.append(at[:, None] / 10000 ** (torch.arange(0, dim, 2, dtype=torch.float64) / dim))
        return torch.cat(angles, -1)

    def layer(self, x: Tensor) -> Tensor:
        x = x - x.mean(-1, keepdim=True)
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    def block(
        self, net: dict[str, Tensor], path: str, txt: Tensor, img: Tensor, turns: Tensor
    ) -> tuple[Tensor, Tensor]:
        mods = {s: self.linear(net, f"{path}.{s}_mod.1", F.silu(self.temb)).chunk(6) for s in ("txt", "img")}
        entered = {s: self.layer(x) * (1 + mods[s][1]) + mods[s][0] for s, x in (("txt", txt), ("img", img))}
        parts: dict[str, list[Tensor]] = {"q": [], "k": [], "v": []}
        for name, made in parts.items():
            for s, linear, norm in (("txt", f"add_{name}_proj", "added_"), ("img", f"to_{name}", "")):
                x = self.linear(net, f"{path}.attn.{linear}", entered[s]).unflatten(-1, (2, 32))
                made.append(x if name == "v" else self.rms(net[f"{path}.attn.norm_{norm}{name}.weight"], x))
        q, k, v = (torch.cat(parts[name]) for name in "qkv")
        turn = torch.polar(torch.ones((), dtype=torch.float64), turns[: len(q)])[:, None]
        q, k = (torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * turn).flatten(-2) for x in (q, k))
        weights = (torch.einsum("ihd,jhd->hij", q, k) / 32**0.5).softmax(-1)
        found = torch.einsum("hij,jhd->ihd", weights, v).flatten(1).split([len(txt), len(img)])
        out = []
        for s, x, seen, linear in (("txt", txt, found[0], "to_add_out"), ("img", img, found[1], "to_out.0")):
            _, _, gate, shift, scale, last = mods[s]
            x = x + gate * self.linear(net, f"{path}.attn.{linear}", seen)
            up = self.linear(net, f"{path}.{s}_mlp.net.0.proj", self.layer(x) * (1 + scale) + shift)
            out.append(x + last * self.linear(net, f"{path}.{s}_mlp.net.2", F.gelu(up, approximate="tanh")))
        return tuple(out)


@pytest.mark.parametrize(("references", "many"), [(False, 0), (False, 3), (True, 1)])
def test_it_is_the_formula(references, many):
    """Beside reference pictures the chain sees the target and the words; the frame of the target is the first."""
    net, first, second = body(), net_of(), net_of((0, 1, 4), 7)
    chains = [(first, hint(), 0.7), (first, hint(9), 0.5), (second, hint(7), 1.0)][:many]
    own, others = ([(h, s) for one, h, s in chains if one is first], [c for c in chains if c[0] is second])
    found = asked(net, first.steer(own, others) if chains else None, batch=2, references=references)
    latents, time, words, _, grids, _ = nets.inputs(net, batch=2)
    latents, grids = (latents, grids) if references else (latents[:, :12], grids[:1])
    formula = Formula(net, chains)
    wanted = torch.stack([formula(latents[i], time[i], words[i], grids) for i in range(2)])
    assert relative(found, wanted) < 3e-6
    assert not many or relative(asked(net, None, batch=2, references=references), wanted) > 0.2


def test_numbers_of_the_released_net():
    """3.51 GB in 16 bits."""
    with torch.device("meta"):
        net = QwenImageFunControlNet(FunConfig())
    assert sum(weight.numel() for weight in net.parameters()) == 1_756_206_592 and len(net.state_dict()) == 174
    assert list(net.place) == [0, 12, 24, 36, 48] and net.control_img_in.weight.shape == (3072, 132)
    assert [hasattr(block, "before_proj") for block in net.control_blocks] == [True] + [False] * 4
    assert sorted(controls.fun(5)) == sorted(net.state_dict())


@pytest.mark.parametrize("layers", [(), (1, 2), (0, 2, 2), (2, 0), (0, 5)])
def test_layers_that_are_none(layers):
    with pytest.raises(ValueError, match="control_layers"):
        FunConfig(**nets.SHAPE, control_layers=layers)


# ---------------------------------------------------------------- several nets, words of one's own
def blockwise() -> BlockwiseControlNet:
    net = BlockwiseControlNet(BlockwiseConfig(DEPTH, 64, 16))
    net.load_state_dict(controls.blockwise(DEPTH, 64, 16))
    return net.eval().requires_grad_(False)


def at(parts: Any) -> Any:
    return steering(parts)(torch.tensor(0.5))


def test_nets_of_both_builds_act_together():
    """Each where it acts; so is a net's own beginning and end."""
    net, chain, other = body(), net_of(), blockwise()
    seen, whole = torch.randn(1, 12, 16), (0.0, 1.0)
    mine, theirs = (chain, (hint(), 0.6, whole)), (other, (seen, 0.8, whole))
    behind, along = at([mine, theirs])
    found = asked(net, at([theirs, mine]))
    assert torch.equal(found, asked(net, (behind, along)))
    alone = [asked(net, at([one])) for one in (mine, theirs)]
    assert all(relative(found, one) > 0.05 for one in alone)
    assert torch.equal(asked(net, at([mine, (other, (seen, 0.8, (0.6, 1.0)))])), alone[0])
    assert torch.equal(asked(net, at([theirs, (chain, (hint(), 0.0, whole))])), alone[1])
    assert at([(chain, (hint(), 1.0, (0.6, 1.0)))]) is None

    class Both:
        def begin(self):
            beside = along.begin()
            return lambda i, before, after, ctx: beside(i, before, (behind(i, after[0], 12), after[1]), ctx)

    assert torch.equal(found, asked(net, Both()))


@pytest.mark.parametrize(
    ("masked", "either", "found"),
    [
        ([False], [True], {0}),
        ([True], [False], {0}),
        ([False, False, False], [False, True, True], {1}),
        ([True, False], [False, True], {0}),
        ([False, True, True], [True, False, False], {1, 2}),
        ([False, False], [False, False], set()),
    ],
)
def test_which_of_several_nets_repaints(masked, either, found):
    assert repainting(masked, either) == found


def test_words_for_parts_of_the_picture_are_the_chain_s_too():
    """With one region that is everywhere, and its words those of the whole, both sides of the mask are attended."""
    net, chain = body(), net_of()
    latents, time, words, _, grids, target = nets.inputs(net)
    latents, grids = latents[:, :12], grids[:1]
    heard: list[Any] = []
    chain.control_blocks[1].register_forward_pre_hook(lambda module, args: heard.append(args))
    regions = regions_of([4, 7], torch.tensor([[True] * 6 + [False] * 6]))
    both = torch.cat([words[:, :4], words], 1)
    with torch.no_grad():
        found = net(latents, time, both, None, grids, target, steer=chain.steer([(hint(), 1.0)]), regions=regions)
    (_, txt, ctx) = heard[0]
    assert found.shape == (1, 12, 16) and txt.shape[1] == 11 and ctx.regions is regions
    assert len(ctx.rope[0]) == 11 + 12


def test_rows_of_different_length_are_those_that_are_drawn_alone():
    net, steer = body(), net_of().steer([(hint(), 1.0)])
    latents, time, words, _, grids, target = nets.inputs(net, batch=2)
    mask = torch.tensor([[True] * 7, [True] * 4 + [False] * 3])
    with torch.no_grad():
        both = net(latents, time, words, mask, grids, target, steer=steer)
        for row, length in ((0, 7), (1, 4)):
            one = slice(row, row + 1)
            alone = net(latents[one], time[one], words[one, :length], None, grids, target, steer=steer)
            assert torch.allclose(both[one], alone, atol=2e-5)


# ---------------------------------------------------------------- whatever hangs on the network
def canvas_of(parts: Any = None, **options: Any) -> Canvas:
    made = nets.canvas(**options)
    return made if parts is None else replace(made, steering=steering(parts))


def drawn(net: Any, canvas: Canvas, **more: Any) -> Tensor:
    return [step.latents for step in denoise(net, canvas, **more)][-1]


def test_off_it_changes_no_bit_and_both_sides_are_steered():
    net, chain = body(), net_of()
    plain = drawn(net, canvas_of())
    assert torch.equal(drawn(net, canvas_of([(chain, (hint(), 0.0, (0.0, 1.0)))])), plain)
    parts = [(chain, (hint(), 1.0, (0.3, 0.8)))]
    apart, joined = (drawn(net, replace(canvas_of(parts), batched_guidance=both)) for both in (False, True))
    assert torch.allclose(apart, joined, atol=1e-4) and not torch.allclose(apart, plain, atol=1e-2)


def test_where_blocks_are_left_out_the_chain_s_are_too():
    net, chain, heard = body(), net_of(), []
    for block in chain.control_blocks:
        block.register_forward_pre_hook(lambda module, args: heard.append(module))
    steer = chain.steer([(hint(), 1.0)])
    wanted = asked(net, steer)
    heard.clear()
    with residual_cache(net, controls.Eager()):
        found = [asked(net, steer) for _ in range(3)]
    assert torch.equal(found[0], wanted) and torch.allclose(found[2], wanted, atol=1e-5)
    assert heard == [*chain.control_blocks, chain.control_blocks[0], chain.control_blocks[0]]


def test_streamed_blocks_are_steered_like_those_that_stay(tmp_path):
    net, steer = body(), net_of().steer([(hint(), 1.0)])
    checkpoint = nets.saved(net, tmp_path)
    wanted = asked(net, steer)
    parts = [Part(block, f"transformer_blocks.{i}") for i, block in enumerate(net.transformer_blocks)]
    streamer = Streamer(list(net.transformer_blocks), Mapped(parts, checkpoint.read))
    assert torch.equal(asked(net, steer), wanted) and streamer.peak <= 2
    streamer.close()


def test_a_net_of_another_type_than_the_transformer():
    net, chain = body(), net_of()
    wanted = asked(net, chain.steer([(hint(), 1.0)]))
    found = asked(net, chain.bfloat16().steer([(hint(), 1.0)]))
    assert found.dtype == torch.float32 and 0 < relative(found, wanted) < 0.05


def test_fused_blocks_say_the_same():
    net, chain = body(), net_of()
    wanted = asked(net, chain.steer([(hint(), 1.0)]))
    if not all(attach_kernels(one) for one in (net, chain)):
        pytest.skip("there are no kernels here")
    found = asked(net, chain.steer([(hint(), 1.0)]))
    assert "forward" in chain.control_blocks[0].__dict__ and 0 < relative(found, wanted) < 1e-5
    for one in (net, chain):
        detach_kernels(one)
    assert torch.equal(asked(net, chain.steer([(hint(), 1.0)])), wanted)


def test_compiled_blocks_do_not_read_what_goes_on_beside_them(monkeypatch):
    """Whatever they read decides what is compiled anew."""
    net, chain, heard = body(), net_of(), []
    wanted = asked(net, chain.steer([(hint(), 1.0)]))
    monkeypatch.setattr(torch, "compile", lambda work, backend: lambda *x: heard.append(x[3]) or work(*x))
    compilers = [attach_compiled(one) for one in (net, chain)]
    assert torch.equal(asked(net, chain.steer([(hint(), 1.0)])), wanted)
    assert not any(compiler.failed for compiler in compilers) and len(heard) == DEPTH + 2
    assert all(ctx.steer is None and ctx.beside is None for ctx in heard)
    for one in (net, chain):
        detach_compiled(one)


@pytest.mark.parametrize("broken", ["img_mlp.net.2", "after_proj"])
def test_it_is_watched_like_the_transformer(broken):
    """What leaves the range of its numbers in the net, also in what it says, is made safe there."""
    net, chain = body(), net_of()
    for block in chain.control_blocks:
        swap(block, torch.nn.Linear, lambda _, old: Int4Linear.from_dense(old.weight.data, old.bias, group=32))
    parts = [(chain, (hint(), 1.0, (0.0, 1.0)))]
    sound = drawn(net, canvas_of(parts))
    chain.control_blocks[1].get_submodule(broken).product = lambda linear, x: linear.plain(x) * torch.nan
    with Sentinel({"transformer": net, "controlnet": chain}, torch.float32, {}) as watch:
        predict = lambda *asked: watch(lambda: velocity(*asked), lambda: velocity(*asked))  # noqa: E731
        found = drawn(net, canvas_of(parts), predict=predict)
    assert torch.equal(found, sound) and dict(watch.ways) == {"controlnet.control_blocks.1": "plain"}


def test_what_a_chain_says_is_not_scaled_where_it_is_made_wide():
    """What reads the transformer's last stream is a norm; what a chain's last block says is added as it is."""
    net, chain, peaks = body(), net_of(), []
    last: Any = chain.control_blocks[1].after_proj
    last.register_forward_hook(lambda module, args, out: peaks.append(float(out.abs().max())))
    asked(net, chain.steer([(hint(), 1.0)]))
    for weight in last.parameters():  # almost at the end of the range
        weight.mul_(5e4 / peaks[0])
    steer = chain.half().steer([(hint(), 1e-4)])
    wanted = asked(net, steer)
    with Sentinel({"controlnet": chain}, torch.float16, {"controlnet.control_blocks.1": "float32"}):
        assert relative(asked(net, steer), wanted) < 2e-3 and 4e4 < peaks[-1] < 6e4
