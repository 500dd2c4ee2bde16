"""Qwen-Image-2.1's ControlNet: the formula once more, in float64 over one sequence with a mask, and what is kept."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import controls
import nets
from lanting.attach.caches import residual_cache
from lanting.attach.parts import Part
from lanting.attach.sentinel import Sentinel
from lanting.attach.stream import Mapped, Streamer
from lanting.flow.loop import Canvas, Conditioning, Tokens, denoise, velocity
from lanting.nn.controlnet21 import ControlNet21Config, QwenImage21ControlNet
from lanting.nn.linears import Int4Linear
from lanting.nn.single_stream import QwenImage21Transformer, SingleStreamConfig, keep_prefix
from lanting.tasks.controlnet import steering

SHAPE: dict[str, Any] = {
    "num_layers": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 32,
    "context_in_dim": 24,
    "in_channels": 8,
    "out_channels": 8,
    "mlp_ratio": 2,
    "axes_dims_rope": (8, 12, 12),
    "eps": 1e-3,  # large enough to be seen wherever it is forgotten
}
REFERENCES = {0: ([(1, 4, 3)], ()), 2: ([(1, 4, 3), (1, 2, 4), (1, 3, 2)], (0, 3))}


def random(net: Any, seed: int) -> Any:
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, weight in net.named_parameters():
            norm = name.endswith(("norm_q.weight", "norm_k.weight"))
            weight.normal_(float(norm), 0.25 if weight.ndim < 2 else 0.7 / weight.shape[1] ** 0.5)
    return net.eval().requires_grad_(False)


def transformer(**changes: Any) -> QwenImage21Transformer:
    return random(QwenImage21Transformer(SingleStreamConfig(**{**SHAPE, **changes})), 1)


def net_of(layers: tuple[int, ...] = (0, 2), seed: int = 2) -> QwenImage21ControlNet:
    return random(QwenImage21ControlNet(ControlNet21Config(**SHAPE, control_layers=layers, control_in_dim=17)), seed)


def hint(seed: int = 9) -> Tensor:
    return torch.randn(1, 12, 17, generator=torch.Generator().manual_seed(seed))


def inputs(references: int = 0, batch: int = 1, step: int = 0) -> dict[str, Any]:
    """Arguments of the transformer; of a later step only target and time are others."""
    grids, places = REFERENCES[references]
    draw = [torch.Generator().manual_seed(seed) for seed in (3 + 10 * step, 4, 5)]
    target = torch.randn(batch, 12, 8, generator=draw[0])
    rest = torch.randn(batch, sum(map(math.prod, grids)) - 12, 8, generator=draw[1])
    return {
        "latents": torch.cat([target, rest], 1),
        "timestep": torch.tensor([0.7, 0.3])[:batch] * 0.8**step,
        "prompt_embeds": torch.randn(batch, 5, 24, generator=draw[2]),
        "prompt_mask": None,
        "grids": tuple(grids),
        "target_tokens": 12,
        "places": places,
    }


def relative(one: Tensor, two: Tensor) -> float:
    return float((one.double() - two.double()).norm() / two.double().norm())


# ---------------------------------------------------------------- the formula
class Formula:
    """Transformer and nets as one plain function, token by token where that says more; float64."""

    def __init__(self, body: Any, chains: list[tuple[Any, Tensor, float]]):
        self.body = {name: x.double() for name, x in body.state_dict().items()}
        self.chains = [
            ({n: x.double() for n, x in net.state_dict().items()}, net.config.control_layers, h.double(), s)
            for net, h, s in chains
        ]

    def __call__(self, given: dict[str, Any]) -> Tensor:
        self.order, self.positions, self.groups = self.layout(given)
        latents, prompt = given["latents"].double(), given["prompt_embeds"].double()
        return torch.cat([self.row(latents[i], prompt[i], given["timestep"][i].double()) for i in range(len(prompt))])

    def layout(self, given: dict[str, Any]) -> tuple[list[tuple[str, int]], list[tuple[int, int, int]], list[int]]:
        """Of each token: where it comes from, where it stands, and its picture (-1: a word)."""
        order, positions, groups, at, behind = [], [], [], 0, 12
        grids, places = given["grids"], given["places"]
        for word in range(6):
            for number in [i for i, place in enumerate(places) if place == word] + ([-1] if word == 5 else []):
                _, rows, columns = grids[number + 1]
                first = 0 if number < 0 else behind
                behind += 0 if number < 0 else rows * columns
                for r in range(rows):
                    for c in range(columns):
                        order.append(("picture", first + r * columns + c))
                        positions.append((at, r - (rows - rows // 2), c - (columns - columns // 2)))
                        groups.append(99 if number < 0 else number)
                at += max(rows, columns)
            if word < 5:
                order.append(("word", word))
                positions.append((at, at, at))
                groups.append(-1)
                at += 1
        return order, positions, groups

    def row(self, latents: Tensor, prompt: Tensor, time: Tensor) -> Tensor:
        body, width = self.body, 64
        words = (
            prompt * torch.rsqrt(prompt.square().mean(-1, keepdim=True) + 1e-3) * (1 + body["txt_in.text_norm.weight"])
        )
        words = F.gelu(words @ body["txt_in.in_layer.weight"].T, approximate="tanh") @ body["txt_in.out_layer.weight"].T
        pictures = latents @ body["img_in.weight"].T
        x = torch.stack([words[i] if kind == "word" else pictures[i] for kind, i in self.order])
        self.target = torch.tensor([group == 99 for group in self.groups])
        every = range(len(x))
        self.seen = torch.tensor(
            [[b <= a or (self.groups[a] >= 0 and self.groups[a] == self.groups[b]) for b in every] for a in every]
        )
        temb = torch.stack([self.time(t) for t in (time, time * 0)])
        table = F.silu(temb) @ body["modulation.1.weight"].T  # (2, 4D)
        self.vectors = table[torch.where(self.target, 0, 1)].split(width, -1)
        states = []
        for net, _, picture, _ in self.chains:
            seen = torch.zeros_like(x)
            seen[self.target] = picture[0] @ net["control_img_in.weight"].T + net["control_img_in.bias"]
            first = "control_blocks.0.before_proj"
            states.append(seen @ net[f"{first}.weight"].T + net[f"{first}.bias"] + x)
        hints: list[dict[int, Tensor]] = []
        for (net, layers, _, scale), state in zip(self.chains, states, strict=True):
            said = {}
            for place, layer in enumerate(layers):
                path = f"control_blocks.{place}"
                state = self.block(net, path, state)
                said[layer] = scale * (state @ net[f"{path}.after_proj.weight"].T + net[f"{path}.after_proj.bias"])
            hints.append(said)
        for index in range(4):
            x = self.block(body, f"transformer_blocks.{index}", x)
            x = x + sum((said[index] for said in hints if index in said), start=torch.zeros_like(x))
        scale = F.silu(temb[0]) @ body["norm_out.linear.weight"].T
        x = self.norm(x[self.target]) * (1 + scale)
        return (x @ body["proj_out.weight"].T)[None]

    def time(self, t: Tensor) -> Tensor:
        wave = 1000 * t * torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float64) / 128)
        path = "time_text_embed.timestep_embedder.linear"
        hidden = F.silu(torch.cat([wave.cos(), wave.sin()]) @ self.body[f"{path}_1.weight"].T)
        return hidden @ self.body[f"{path}_2.weight"].T

    def norm(self, x: Tensor) -> Tensor:
        x = x - x.mean(-1, keepdim=True)
        return x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt()

    def block(self, net: dict[str, Tensor], path: str, x: Tensor) -> Tensor:
        scale1, gate1, scale2, gate2 = self.vectors
        y = self.norm(x) * (1 + scale1)
        heads = [(y @ net[f"{path}.attn.to_{name}.weight"].T).view(len(x), 2, 32) for name in "qkv"]
        q, k = (
            self.turned(net[f"{path}.attn.norm_{name}.weight"], part)
            for name, part in zip("qk", heads[:2], strict=True)
        )
        weights = torch.einsum("ihd,jhd->hij", q, k) / 32**0.5
        weights = weights.masked_fill(~self.seen, -torch.inf).softmax(-1)
        found = torch.einsum("hij,jhd->ihd", weights, heads[2]).flatten(1) @ net[f"{path}.attn.to_out.0.weight"].T
        x = x + gate1.tanh() * found
        y = self.norm(x) * (1 + scale2)
        gate, up = (y @ net[f"{path}.img_mlp.{name}.weight"].T for name in ("gate_layer", "proj"))
        return x + gate2.tanh() * ((F.silu(gate) * up) @ net[f"{path}.img_mlp.out.weight"].T)

    def turned(self, weight: Tensor, x: Tensor) -> Tensor:
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-3) * weight
        angles = []
        for axis, dim in enumerate((8, 12, 12)):
            at = torch.tensor([place[axis] for place in self.positions], dtype=torch.float64)
            angles.append(at[:, None] / 10000 ** (torch.arange(0, dim, 2, dtype=torch.float64) / dim))
        turn = torch.polar(torch.ones((), dtype=torch.float64), torch.cat(angles, -1))[:, None]  # (n, 1, E/2)
        return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * turn).flatten(-2)


@pytest.mark.parametrize("references", [0, 2])
@pytest.mark.parametrize("nets_of", ["one", "two", "no"])
def test_it_is_the_formula(references, nets_of):
    body, first, second = transformer(), net_of(), net_of((0, 1, 3), 7)
    chains = [(first, hint(), 0.7), (first, hint(8), 0.5), (second, hint(7), 1.0)]
    chains = chains[: {"no": 0, "one": 1, "two": 3}[nets_of]]
    given = inputs(references, batch=2)
    steer = (
        first.steer([(h, s) for n, h, s in chains if n is first], [c for c in chains if c[0] is second])
        if chains
        else None
    )
    found, wanted = body(**given, steer=steer), Formula(body, chains)(given)
    assert relative(found, wanted) < 2e-6
    assert nets_of == "no" or relative(body(**given), wanted) > 0.2


def test_numbers_of_the_released_net():
    """7.55 GB in 16 bits, in 180 tensors."""
    with torch.device("meta"):
        net = QwenImage21ControlNet(ControlNet21Config())
    assert sum(weight.numel() for weight in net.parameters()) == 3_775_479_808 and len(net.state_dict()) == 180
    assert len(net.control_blocks) == 16 and net.control_img_in.weight.shape == (4096, 129)
    assert [hasattr(block, "before_proj") for block in net.control_blocks] == [True] + [False] * 15


@pytest.mark.parametrize("layers", [(), (1, 2), (0, 2, 2), (2, 0), (0, 4)])
def test_layers_that_are_none(layers):
    with pytest.raises(ValueError, match="control_layers"):
        ControlNet21Config(**SHAPE, control_layers=layers)


# ---------------------------------------------------------------- words and references are read once
def asked(body, steer, step=0, **more):
    with torch.no_grad():
        return body(**inputs(2, step=step), steer=steer, **more)


def test_of_words_and_references_nothing_changes_from_step_to_step():
    """Whatever is added to them, so they may be kept; the first block's own prefix isn't changed by it at all."""
    body, net, seen = transformer(), net_of(), []
    for block in (*body.transformer_blocks, *net.control_blocks):
        block.register_forward_pre_hook(lambda module, args: seen.append(args[1]))
    asked(body, net.steer([(hint(), 1.0)]))
    asked(body, net.steer([(hint(8), 1.0)]), step=1)
    assert len(seen) == 12 and all(torch.equal(one, two) for one, two in zip(seen[:6], seen[6:], strict=True))


def test_what_is_kept_is_what_would_be_computed(monkeypatch):
    body, net, counted = transformer(), net_of(), []
    whole = QwenImage21Transformer.prefix
    monkeypatch.setattr(QwenImage21Transformer, "prefix", lambda *x: counted.append(1) or whole(*x))
    strong, weak = (net.steer([(hint(), scale)]) for scale in (1.0, 0.5))
    steps = [None, strong, strong, strong, weak, weak, None, None]
    wanted = [asked(body, steer, step) for step, steer in enumerate(steps)]
    counted.clear()
    prompt = inputs(2)["prompt_embeds"]
    with keep_prefix(body):
        found = [
            body(**{**inputs(2, step=step), "prompt_embeds": prompt}, steer=steer) for step, steer in enumerate(steps)
        ]
    assert all(torch.equal(one, two) for one, two in zip(found, wanted, strict=True))
    assert len(counted) == 4  # without, strong, weak, without: no other
    with keep_prefix(body):  # another picture, or as much of two, is no reason
        counted.clear()
        for steer in (strong, net.steer([(hint(8), 1.0)])):
            body(**{**inputs(2), "prompt_embeds": prompt}, steer=steer)
        assert len(counted) == 1
        two = net.steer([(hint(), 0.5), (hint(8), 0.5)])
        kept = [body(**{**inputs(2), "prompt_embeds": prompt}, steer=two) for _ in range(2)]
        assert len(counted) == 2 and torch.equal(*kept)


def test_rows_of_different_length_are_those_that_are_drawn_alone():
    body, net = transformer(), net_of()
    steer, given = net.steer([(hint(), 1.0)]), inputs(0, batch=2)
    given["prompt_mask"] = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    both = body(**given, steer=steer)
    for row, words in ((0, 5), (1, 3)):
        alone = inputs(0, batch=2) | {"prompt_embeds": given["prompt_embeds"][row : row + 1, :words]}
        alone |= {name: alone[name][row : row + 1] for name in ("latents", "timestep")}
        assert torch.allclose(both[row : row + 1], body(**alone, steer=steer), atol=2e-5)


# ---------------------------------------------------------------- whatever hangs on the network
def canvas_of(chains: Any = None, **options: Any) -> Canvas:
    given, draw = inputs(2), torch.Generator().manual_seed(4)
    _, first, second = given["grids"]
    latents = given["latents"]
    return Canvas(
        start=latents[:, :12],
        grids=((1, 4, 3),),
        sigmas=torch.linspace(1, 0, 5),
        positive=Conditioning(given["prompt_embeds"], places=(0, 3)),
        negative=Conditioning(torch.randn(1, 5, 24, generator=draw), places=(0, 3)),
        references=(Tokens(latents[:, 12:20], first), Tokens(latents[:, 20:], second)),
        renormalize=False,
        steering=None if chains is None else steering(chains),
        **options,
    )


def drawn(body, canvas, **more):
    return [step.latents for step in denoise(body, canvas, **more)][-1]


def test_both_sides_are_steered_apart_or_together():
    body, net = transformer(), net_of()
    chains = [(net, (hint(), 1.0, (0.3, 0.8)))]
    apart, joined = (drawn(body, canvas_of(chains, batched_guidance=both)) for both in (False, True))
    assert torch.allclose(apart, joined, atol=1e-4)
    assert not torch.allclose(apart, drawn(body, canvas_of()), atol=1e-2)
    with keep_prefix(body):
        assert torch.equal(drawn(body, canvas_of(chains)), apart)


def test_off_it_changes_no_bit():
    body, net = transformer(), net_of()
    idle = canvas_of([(net, (hint(), 0.0, (0.0, 1.0)))])
    assert torch.equal(drawn(body, idle), drawn(body, canvas_of()))


def test_where_blocks_are_left_out_the_chain_s_are_too():
    body, net, heard = transformer(), net_of(), []
    for block in net.control_blocks:
        block.register_forward_pre_hook(lambda module, args: heard.append(module))
    steer = net.steer([(hint(), 1.0)])
    wanted = asked(body, steer)
    heard.clear()
    with residual_cache(body, controls.Eager()), keep_prefix(body):
        prompt = inputs(2)["prompt_embeds"]
        found = [body(**{**inputs(2), "prompt_embeds": prompt}, steer=steer) for _ in range(3)]
    assert torch.equal(found[0], wanted) and torch.allclose(found[2], wanted, atol=1e-5)
    assert heard == [*net.control_blocks, net.control_blocks[0], net.control_blocks[0]]


def test_streamed_blocks_are_steered_like_those_that_stay(tmp_path):
    body, net = transformer(), net_of()
    checkpoint, steer = nets.saved(body, tmp_path), net.steer([(hint(), 1.0)])
    wanted = asked(body, steer)
    parts = [Part(block, f"transformer_blocks.{i}") for i, block in enumerate(body.transformer_blocks)]
    streamer = Streamer(list(body.transformer_blocks), Mapped(parts, checkpoint.read))
    assert torch.equal(asked(body, steer), wanted) and streamer.peak <= 2
    streamer.close()


def test_a_net_of_another_type_than_the_transformer():
    body, net = transformer(), net_of()
    wanted = asked(body, net.steer([(hint(), 1.0)]))
    found = asked(body, net.bfloat16().steer([(hint(), 1.0)]))
    assert found.dtype == torch.float32 and 0 < relative(found, wanted) < 0.05
    other = asked(body, net.float().steer([(hint(), 1.0)]))
    assert relative(other, found) < 0.02  # the same rounded weights


@pytest.mark.parametrize("broken", ["img_mlp.out", "after_proj"])
def test_it_is_watched_like_the_transformer(broken):
    """What leaves the range of its numbers in the net, also in what it says, is made safe there."""
    body, net = transformer(), net_of()
    for block in net.control_blocks:
        nets.swap(block, torch.nn.Linear, lambda _, old: Int4Linear.from_dense(old.weight, old.bias, group=32))
    chains = [(net, (hint(), 1.0, (0.0, 1.0)))]
    sound = drawn(body, canvas_of(chains))
    net.control_blocks[1].get_submodule(broken).product = lambda linear, x: linear.plain(x) * torch.nan
    with Sentinel({"transformer": body, "controlnet": net}, torch.float32, {}) as watch:
        predict = lambda *asked: watch(lambda: velocity(*asked), lambda: velocity(*asked))  # noqa: E731
        found = drawn(body, canvas_of(chains), predict=predict)
    assert torch.equal(found, sound) and dict(watch.ways) == {"controlnet.control_blocks.1": "plain"}
