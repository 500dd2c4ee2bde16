"""Faults put into small networks: every one is found, rescued, told, and undone; and without one nothing changes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import nets
from lanting.attach.caches import residual_cache
from lanting.attach.modulation import ModulationTable
from lanting.attach.parts import Part
from lanting.attach.safe import Overrides, Safe, kernels
from lanting.attach.sentinel import SPREAD, Sentinel
from lanting.attach.stream import Mapped, Streamer
from lanting.core.errors import ModelError, NotFiniteError
from lanting.core.quality import Quality
from lanting.flow.frugal import Frugal
from lanting.flow.loop import Canvas, Conditioning, Tokens, denoise, velocity
from lanting.nn.linears import Int8Linear, PackedLinear
from lanting.nn.swap import swap
from nets import canvas

HALF = torch.float16


def drawn(net, given, known=None, told=None, **options):
    """(latents, sentinel) of a watched drawing; `known` False: not watched."""
    if known is False:
        return list(denoise(net, given))[-1].latents, None
    calls = []

    def predict(model, canvas, latents, sigma):
        ask = lambda: calls.append(1) or velocity(model, canvas, latents, sigma)  # noqa: E731
        return watch(ask, ask)

    with Sentinel({"transformer": net}, given.start.dtype, known or {}, told, **options) as watch:
        latents = list(denoise(net, given, predict))[-1].latents
    assert len(calls) == given.steps + watch.passes
    return latents, watch


def net_of(dtype=torch.float32, **changes):
    return nets.transformer(**changes).to(dtype)


def wide_run(net, given, dtype=torch.float32):
    """The same weights in a wider type."""
    to = lambda tensor: tensor.to(dtype)  # noqa: E731
    sides = {
        name: None if side is None else Conditioning(to(side.embeds), side.mask)
        for name, side in (("positive", given.positive), ("negative", given.negative))
    }
    references = tuple(Tokens(to(one.data), one.grid) for one in given.references)
    same = Canvas(to(given.start), given.grids, given.sigmas, **sides, references=references)
    return list(denoise(copy.deepcopy(net).to(dtype), same))[-1].latents


def near(one, other):
    return float((one.float() - other.float()).norm() / other.float().norm())


def hanging(net):
    """What hangs on a network's modules beside their own methods, and their weights' types."""
    return [(type(m), name) for m in net.modules() for name in m.__dict__ if name in ("forward", "product")], [
        x.dtype for x in net.state_dict().values()
    ]


def ways(watch):
    return {path.removeprefix("transformer."): way for _, path, way in watch.made}


def overflowing_mlp(net, *blocks):
    """Hidden numbers beyond float16, which the next Linear brings back."""
    with torch.no_grad():
        for index in blocks:
            up, down = net.transformer_blocks[index].img_mlp.net[0].proj, net.transformer_blocks[index].img_mlp.net[2]
            up.weight.mul_(60000)
            down.weight.div_(60000 if net.img_in.weight.dtype == torch.float32 else 100)
    return net


# ---------------------------------------------------------------- no trouble
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, HALF])
@pytest.mark.parametrize("guided", [False, True])
def test_without_trouble_no_bit_and_no_pass_is_another(dtype, guided):
    net, given = net_of(dtype), canvas(guided, dtype=dtype)
    before = hanging(net)
    plain, _ = drawn(net, given, False)
    watched, watch = drawn(net, given)
    assert torch.equal(plain, watched)
    assert (watch.passes, watch.made, watch.notices) == (0, [], []) and hanging(net) == before
    assert not any(net.transformer_blocks._forward_hooks)


# ---------------------------------------------------------------- float16
@pytest.mark.parametrize("guided", [False, True])
def test_a_block_that_overflows_in_float16_runs_in_bfloat16(guided):
    given = canvas(guided, dtype=HALF)
    net = overflowing_mlp(net_of(HALF), 2)
    before = hanging(net)
    broken, _ = drawn(net, given, False)
    assert not torch.isfinite(broken).all()
    rescued, watch = drawn(net, given)
    assert near(rescued, wide_run(net, given)) < 0.01
    assert ways(watch) == {"transformer_blocks.2": "bfloat16"} and watch.passes == 2
    (notice,) = watch.notices
    assert notice.values["part"] == "transformer.transformer_blocks.2" and notice.values["way"] == "bfloat16"
    assert hanging(net) == before
    again, known = drawn(net, given, watch.ways)  # the next drawing starts safe
    assert known.passes == 0 and known.notices == [] and near(again, rescued) < 0.01


def test_many_blocks_that_overflow_are_not_found_one_by_one():
    given, net = canvas(dtype=HALF), overflowing_mlp(net_of(HALF), 0, 1, 2, 3, 4)
    rescued, watch = drawn(net, given)
    assert near(rescued, wide_run(net, given)) < 0.02
    assert watch.passes == SPREAD + 1 and len(watch.notices) == 1
    assert len(ways(watch)) == len(watch.parts)


def test_a_stream_that_leaves_float16_stays_wide_to_the_end():
    """A block clips its stream: the numbers are finite, and wrong."""
    given, net = canvas(dtype=HALF), net_of(HALF)
    with torch.no_grad():
        for channel in range(0, 64, 8):
            net.transformer_blocks[1].img_mlp.net[2].weight[channel] = 60000.0 * (-1) ** (channel // 8)
    clipped, _ = drawn(net, given, False)
    right = wide_run(net, given)
    assert torch.isfinite(clipped).all() and near(clipped, right) > 0.01
    rescued, watch = drawn(net, given)
    assert near(rescued, right) < 0.01
    assert set(ways(watch)) == {f"transformer_blocks.{i}" for i in range(1, 5)}


def test_what_comes_before_and_after_the_blocks_is_rescued_too():
    given, net = canvas(dtype=HALF), net_of(HALF)
    with torch.no_grad():
        net.time_text_embed.timestep_embedder["linear_1"].weight.fill_(6e4)
        net.time_text_embed.timestep_embedder["linear_2"].weight.mul_(1e-4)
    assert not torch.isfinite(drawn(net, given, False)[0]).all()
    rescued, watch = drawn(net, given)
    assert torch.isfinite(rescued).all() and "time_text_embed" in ways(watch)


def test_a_rescued_block_may_stream_and_its_modulation_be_tabulated(tmp_path):
    given, net = canvas(dtype=HALF), overflowing_mlp(net_of(HALF), 2, 3)
    read = nets.saved(net, tmp_path).read
    wanted, _ = drawn(net, given)
    table = ModulationTable(net, read, together=False)
    table.prepare((given.sigmas[:-1] * 1000).to(HALF) / 1000)
    blocks = list(net.transformer_blocks)
    leave = [f"transformer_blocks.{i}.{name}" for i in range(5) for name in ("img_mod", "txt_mod")]
    parts = [Part(block, f"transformer_blocks.{i}", leave) for i, block in enumerate(blocks)]
    streamer = Streamer(blocks, Mapped(parts, read), 2)
    found, watch = drawn(net, given)
    assert near(found, wanted) < 0.01 and watch.passes == 3 and streamer.peak == 2
    assert set(ways(watch)) == {"transformer_blocks.2", "transformer_blocks.3"}
    streamer.close()


# ---------------------------------------------------------------- packed weights and kernels
def packed(dtype=torch.float32):
    net = net_of(dtype)
    swap(net.transformer_blocks, nn.Linear, lambda path, old: None if "_mod" in path else int8(old, dtype))
    return net


def int8(old, dtype):
    made = Int8Linear.from_dense(old.weight.float(), old.bias.float())
    made.bias = made.bias.to(dtype)
    return made


def test_scales_beyond_float16():
    """Queries are normed, so that their length does not matter, until it is infinite."""
    given, net = canvas(dtype=HALF), packed(HALF)
    net.transformer_blocks[3].attn.to_q.weight_scale *= 1e7
    assert not torch.isfinite(drawn(net, given, False)[0]).all()
    rescued, watch = drawn(net, given)
    assert near(rescued, wide_run(net, given)) < 0.02 and ways(watch) == {"transformer_blocks.3": "bfloat16"}


def test_scales_damaged_in_memory_are_read_again():
    given, net = canvas(), packed()
    clean, _ = drawn(net, given, False)
    scale = net.transformer_blocks[1].attn.to_k.weight_scale
    kept = scale.clone()
    asked = []

    def mend(path):
        asked.append(path)
        scale.copy_(kept)
        return True

    scale[3] = torch.nan
    rescued, watch = drawn(net, given, mend=mend)
    assert torch.equal(rescued, clean) and asked == ["transformer.transformer_blocks.1"] and watch.made == []
    assert "read again" in watch.notices[0].sentence


@pytest.mark.parametrize("mends", [False, True])
def test_scales_damaged_in_the_file_are_told(mends):
    net = packed()
    net.transformer_blocks[1].attn.to_k.weight_scale[3] = torch.inf
    before = hanging(net)
    with pytest.raises(ModelError, match="hold numbers that are not finite: download") as caught:
        drawn(net, canvas(), mend=lambda path: mends)
    assert caught.value.exit_code == 2 and hanging(net) == before


def broken_kernel(net, wrong, blocks=range(5)):
    """A product that gives `wrong(call, right result)`."""
    calls = []

    def product(linear, x):
        calls.append(1)
        return wrong(len(calls), linear.plain(x))

    for index in blocks:
        for module in net.transformer_blocks[index].modules():
            if isinstance(module, PackedLinear):
                module.product = product
    return net, calls


@pytest.mark.parametrize("blocks", [[2], [1, 4], range(5)])
def test_a_kernel_that_gives_nan_is_left_out(blocks):
    given, net = canvas(guided=True), packed()
    clean, _ = drawn(net, given, False)
    net, _ = broken_kernel(net, lambda call, right: right * torch.nan, blocks)
    before = hanging(net)
    rescued, watch = drawn(net, given)
    assert torch.equal(rescued, clean) and set(ways(watch).values()) == {"plain"}
    assert watch.passes == min(len(blocks), SPREAD) + 1
    assert hanging(net) == before


def test_a_kernel_that_fails_in_one_step_only():
    given, net = canvas(steps=6), packed()
    clean, _ = drawn(net, given, False)
    net, calls = broken_kernel(net, lambda call, right: right * torch.nan if call == 150 else right)
    rescued, watch = drawn(net, given)
    assert len(calls) > 150 and torch.equal(rescued, clean)
    assert watch.passes == 1 and watch.made == [] and "done again" in watch.notices[0].sentence


def test_a_kernel_that_gives_finite_nonsense_is_convicted_by_the_plain_run():
    given, net = canvas(), packed()
    with torch.no_grad():
        net.proj_out.weight.mul_(0.01)
        net.proj_out.bias.mul_(0.01)  # so that plain velocities are small, and nonsense can't be one
    clean, _ = drawn(net, given, False)
    net, _ = broken_kernel(net, lambda call, right: right + 1e30)
    rescued, watch = drawn(net, given)
    assert near(rescued, clean) < 1e-5 and set(ways(watch).values()) == {"plain"}


@pytest.mark.parametrize("factor", [1e-6, 1e4])
def test_a_network_that_is_only_odd_is_let_be(factor):
    given, net = canvas(), net_of()
    with torch.no_grad():
        net.proj_out.weight.mul_(factor)
        net.proj_out.bias.mul_(factor)
    odd, _ = drawn(net, given, False)
    watched, watch = drawn(net, given)
    assert torch.equal(odd, watched) and watch.made == [] and watch.passes == 1


def test_without_a_rescue_one_sentence_says_what_to_do():
    net = net_of()
    net.transformer_blocks[2].attn.norm_q.register_forward_hook(lambda module, args, out: out * torch.nan)
    with pytest.raises(NotFiniteError, match="gives numbers that are not finite in every way"):
        drawn(net, canvas())
    given = canvas()
    given.positive.embeds[0, 0, 0] = torch.nan
    with pytest.raises(NotFiniteError, match="txt_norm was given is not finite in float32; try"):
        drawn(net_of(), given)


# ---------------------------------------------------------------- with the dial, and again
def test_trouble_ends_all_sparing():
    given, net = canvas(steps=10, guided=True), packed()
    net, _ = broken_kernel(net, lambda call, right: right * torch.nan if call == 400 else right)
    frugal = Frugal(Quality(step=9.0, mean=9.0, age=3), given)
    cache = residual_cache(net, frugal)
    cache.__enter__()

    def calm(redone):
        cache.__exit__(None, None, None)
        frugal.stop()
        frugal.redone()

    with Sentinel({"transformer": net}, torch.float32, {}, calm=calm) as watch:
        predict = lambda *asked: watch(lambda: frugal(*asked), lambda: velocity(*asked))  # noqa: E731
        list(denoise(net, given, predict))
    at = next(i for i, word in enumerate(frugal.words) if set(frugal.words[i:]) == {"FF"} and i > 3)
    assert watch.passes == 1 and set(frugal.words[:at]) != {"FF"} and at < 9


def test_what_was_done_can_be_done_again():
    """A kernel that breaks from the third step on: told so, nothing is tried and every bit is the same."""
    given, net = canvas(steps=6), packed()
    net, calls = broken_kernel(net, lambda call, right: right * (torch.nan if call > 30 else 1.001), [1])
    rescued, watch = drawn(net, given)
    ((step, path, way),) = watch.made
    assert step > 1 and (path, way) == ("transformer.transformer_blocks.1", "plain")
    calls.clear()
    again, told = drawn(net, given, {"transformer.proj_out": "plain"}, [(step, path, way)])
    assert torch.equal(again, rescued) and told.passes == 0 and told.made == watch.made


def test_a_recorded_network_runs_as_it_comes_while_something_is_safe():
    net, played = net_of(), []
    record = net.__dict__["forward"] = lambda *args, **more: played.append(1) or type(net).forward(net, *args, **more)
    drawn(net, canvas())
    assert len(played) == 4
    drawn(net, canvas(), {"transformer.proj_out": "plain"})
    assert len(played) == 4 and net.__dict__["forward"] is record


def test_strangers_paths_and_ways_are_left_aside():
    given, net = canvas(), net_of()
    plain, _ = drawn(net, given, False)
    odd = {"transformer.nowhere": "plain", "transformer.proj_out": "int2", "vae.decode": "float32"}
    found, watch = drawn(net, given, odd, None)
    assert torch.equal(plain, found) and watch.made == []
    found, watch = drawn(net, given, {}, [(0, "transformer.nowhere", "plain"), (9, "transformer.proj_out", "float32")])
    assert torch.equal(plain, found) and watch.made == []


def test_a_controlnet_is_watched_too():
    net, control = packed(), nets.int4(nets.controlnet())
    for module in control.modules():
        if isinstance(module, PackedLinear):
            module.product = lambda linear, x: linear.plain(x) * torch.nan
    given = canvas()

    def residuals(latents, timestep, sigma, prompt, grids):
        return control(latents, latents.flip(1), timestep, prompt.embeds, prompt.mask, grids)

    given = Canvas(given.start, given.grids, given.sigmas, given.positive, control=residuals)
    with Sentinel({"transformer": net, "controlnet": control}, torch.float32, {}) as watch:
        predict = lambda *asked: watch(lambda: velocity(*asked), lambda: velocity(*asked))  # noqa: E731
        latents = list(denoise(net, given, predict))[-1].latents
    assert torch.isfinite(latents).all() and {path.split(".")[0] for path in watch.ways} == {"controlnet"}


def test_overrides_are_undone_in_the_order_they_came():
    module, off = nn.Linear(2, 2), Overrides()
    module.__dict__["forward"] = "first"
    off.set(module, "forward", "second")
    off.plain(module)
    assert kernels(module) == []
    off.set(module, "forward", Safe(module, "plain"))
    off.restore()
    assert module.__dict__["forward"] == "first" and off.undo == []
