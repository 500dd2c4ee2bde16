"""Blockwise ControlNets: what they add, to which tokens and when, whatever else hangs on the network.

The formula is written here once more, in float64 and without any code of the package.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import controls
import nets
from lanting.attach.caches import residual_cache
from lanting.attach.compiled import attach_compiled, detach_compiled
from lanting.attach.parts import Part
from lanting.attach.safe import Safe
from lanting.attach.sentinel import Sentinel
from lanting.attach.stream import Mapped, Streamer
from lanting.flow.loop import Conditioning, Question, Tokens, denoise, velocity
from lanting.flow.together import joinable
from lanting.nn.blockwise import BlockwiseConfig, BlockwiseControlNet
from lanting.nn.linears import Int4Linear
from lanting.tasks.controlnet import progress_span, steering

LAYERS, WIDTH = nets.SHAPE["num_layers"], 64


def net_of(channels: int = 16) -> tuple[BlockwiseControlNet, dict[str, np.ndarray]]:
    """A net for `nets.transformer`, and its weights in float64."""
    tensors = controls.blockwise(LAYERS, WIDTH, channels)
    net = BlockwiseControlNet(BlockwiseConfig(LAYERS, WIDTH, channels))
    net.load_state_dict(tensors, strict=True)
    return net.eval().requires_grad_(False), {name: tensor.double().numpy() for name, tensor in tensors.items()}


def formula(weights: dict[str, np.ndarray], index: int, stream: np.ndarray, latents: np.ndarray) -> np.ndarray:
    """output(gelu(input(rms(stream) + rms(img_in(latents))))), all in float64."""

    def linear(path: str, x: np.ndarray) -> np.ndarray:
        return x @ weights[f"{path}.weight"].T + weights[f"{path}.bias"]

    def rms(path: str, x: np.ndarray) -> np.ndarray:
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * weights[f"{path}.weight"]

    block = f"controlnet_blocks.{index}"
    y = linear("img_in", latents)
    inner = linear(f"{block}.input_proj", rms(f"{block}.x_rms", stream) + rms(f"{block}.y_rms", y))
    gelu = inner * 0.5 * (1 + np.vectorize(math.erf)(inner / math.sqrt(2)))
    return linear(f"{block}.output_proj", gelu)


def hint(batch: int = 1, channels: int = 16, seed: int = 8) -> torch.Tensor:
    return torch.randn(batch, 12, channels, generator=torch.Generator().manual_seed(seed))


def asked(net, steer=None, batch: int = 1, **options) -> torch.Tensor:
    options |= {} if steer is None else {"steer": steer}
    with torch.no_grad():
        return net(*nets.inputs(net, batch=batch), **options)


# ---------------------------------------------------------------- the formula
@pytest.mark.parametrize("index", [0, LAYERS - 1])
def test_what_is_added_behind_a_block_is_the_formula(index):
    net, weights = net_of()
    stream, latents = torch.randn(2, 16, WIDTH), hint()
    steered = net.steer([(latents, 0.7)])(index, stream, 12)
    x = stream.double().numpy()
    wanted = x[:, :12] + 0.7 * formula(weights, index, x[:, :12], latents.double().numpy())
    assert np.abs(steered[:, :12].numpy() - wanted).max() < 1e-5
    assert torch.equal(steered[:, 12:], stream[:, 12:])  # references are left alone


def test_several_pictures_are_added_up():
    net, weights = net_of()
    stream, hints = torch.randn(1, 12, WIDTH), [hint(seed=1), hint(seed=2)]
    steered = net.steer([(hints[0], 0.5), (hints[1], 2.0)])(1, stream, 12)
    x = stream.double().numpy()
    each = [formula(weights, 1, x, one.double().numpy()) for one in hints]
    assert np.abs(steered.numpy() - (x + 0.5 * each[0] + 2 * each[1])).max() < 1e-5


def test_several_nets_are_asked_of_the_same_stream():
    net, weights = net_of()
    other = BlockwiseControlNet(net.config).requires_grad_(False)
    other.load_state_dict({name: 0.5 * tensor for name, tensor in net.state_dict().items()})
    stream, hints = torch.randn(1, 16, WIDTH), [hint(seed=1), hint(seed=2)]
    parts = [(net, (hints[0], 0.5, (0.0, 1.0))), (other, (hints[1], 2.0, (0.0, 0.6)))]
    at = steering(parts)
    early, late = at(torch.tensor(0.9)), at(torch.tensor(0.5))
    assert early is not None and late is not None
    assert torch.equal(early(1, stream, 12), net.steer([(hints[0], 0.5)])(1, stream, 12))
    x, half = stream.double().numpy(), {name: 0.5 * tensor for name, tensor in weights.items()}
    added = 0.5 * formula(weights, 1, x[:, :12], hints[0].double().numpy())
    added = added + 2 * formula(half, 1, x[:, :12], hints[1].double().numpy())
    steered = late(1, stream, 12)
    assert np.abs(steered[:, :12].numpy() - (x[:, :12] + added)).max() < 1e-5
    assert torch.equal(steered[:, 12:], stream[:, 12:])


def test_the_whole_transformer_asks_behind_every_block():
    transformer, (net, weights) = nets.transformer(), net_of()
    latents, heard = hint(), []

    def behind(index, img, target_tokens):
        heard.append(index)
        x = img[:, :target_tokens].double().numpy()
        added = torch.from_numpy(formula(weights, index, x, latents.double().numpy())).float()
        return torch.cat([img[:, :target_tokens] + added, img[:, target_tokens:]], 1)

    wanted = asked(transformer, behind)
    assert heard == list(range(LAYERS))
    found = asked(transformer, net.steer([(latents, 1.0)]))
    assert torch.allclose(found, wanted, atol=2e-5)
    assert not torch.allclose(found[:, :12], asked(transformer)[:, :12], atol=1e-2)


def test_numbers_of_the_released_nets():
    """1,133,399,040, and 12,288 more with a mask."""
    with torch.device("meta"):
        counts = [
            sum(weight.numel() for weight in BlockwiseControlNet(BlockwiseConfig(in_channels=channels)).parameters())
            for channels in (64, 68)
        ]
    assert counts == [1_133_399_040, 1_133_411_328]


def test_a_wide_stream_stays_wide():
    """A block made safe in float32 hands its stream on in float32; a net in halves must not narrow it."""
    net, _ = net_of()
    stream = torch.randn(1, 12, WIDTH) * 1e5  # beyond float16
    steered = net.half().steer([(hint(), 1.0)])(0, stream, 12)
    assert steered.dtype == torch.float32 and torch.isfinite(steered).all() and not torch.equal(steered, stream)
    block = net.controlnet_blocks[0]
    before = block(stream, stream)
    block.__dict__["forward"] = Safe(block, "float32")
    assert torch.allclose(before.float(), block(stream, stream).float(), atol=2e-2)


# ---------------------------------------------------------------- when
@pytest.mark.parametrize("steps", [1, 2, 5, 30])
@pytest.mark.parametrize(("start", "end"), [(0.0, 1.0), (0.0, 0.5), (0.3, 0.8), (0.5, 1.0), (0.41, 0.42)])
def test_it_acts_at_the_steps_at_which_diffsynth_s_does(steps, start, end):
    """Theirs counts down from 1, so what begins at 0.3 begins at 0.7 there."""
    sigmas = torch.linspace(1, 0, steps + 1)
    down = [(steps - 1 - i) / max(steps - 1, 1) for i in range(steps)]
    wanted = [not (at > (1 - start) + 1e-4 or at < (1 - end) - 1e-4) for at in down]
    low, high = progress_span(sigmas, start, end)
    assert [low <= float(sigma) <= high for sigma in sigmas[:-1]] == wanted


def test_a_picture_that_counts_for_nothing_is_not_looked_at():
    net, _ = net_of()
    at = steering([(net, (hint(), 0.0, (0.0, 1.0))), (net, (hint(), 1.0, (0.2, 0.5)))])
    assert at(torch.tensor(1.0)) is None and at(torch.tensor(0.1)) is None and at(torch.tensor(0.4)) is not None
    assert steering([(net, (hint(), 0.0, (0.0, 1.0)))])(torch.tensor(0.5)) is None


# ---------------------------------------------------------------- both sides, batches, sharing
def canvas_of(net, **options):
    return nets.canvas(steering=steering([(net, (hint(), 1.0, (0.0, 1.0)))]), **options)


@pytest.mark.parametrize("references", [0, 1])
def test_both_sides_of_the_guidance_are_steered(references):
    transformer, (net, _) = nets.transformer(), net_of()
    canvas = canvas_of(net, guided=True, references=references)
    assert canvas.negative is not None
    question = Question(transformer, canvas, canvas.start, canvas.sigmas[0])
    with torch.no_grad():
        for side, prompt in ((question.positive, canvas.positive), (question.negative, canvas.negative)):
            steer = net.steer([(hint(), 1.0)])
            seen = torch.cat([canvas.start, *(one.data for one in canvas.references)], 1)
            grids, time = question.grids, question.timestep
            wanted = transformer(seen, time, prompt.embeds, prompt.mask, grids, 12, steer=steer)[:, :12]
            plain = transformer(seen, time, prompt.embeds, prompt.mask, grids, 12)[:, :12]
            assert torch.equal(side(), wanted) and not torch.allclose(wanted, plain, atol=1e-2)
        apart = (question.positive(), question.negative())
        both = question.both()
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(apart, both, strict=True))


def test_a_batch_is_steered_row_by_row():
    transformer, (net, _) = nets.transformer(), net_of()
    steer = net.steer([(hint(), 1.0)])
    whole = asked(transformer, steer, batch=2)
    latents, times, text, _, grids, _ = nets.inputs(transformer, batch=2)
    with torch.no_grad():
        rows = [
            transformer(latents[i : i + 1], times[:1], text[i : i + 1], None, grids, 12, steer=steer) for i in (0, 1)
        ]
    assert torch.allclose(whole, torch.cat(rows), atol=1e-5)


def test_who_is_steered_shares_no_call():
    net, _ = net_of()
    assert joinable(nets.canvas(references=0)) and not joinable(canvas_of(net, references=0))


# ---------------------------------------------------------------- whatever hangs on the network
class Eager:
    """A judge of caches that leaves out what it may: the second step and every other one after."""

    def __init__(self):
        self.calls = 0

    def watches(self, branch):
        return True

    def reuse(self, branch, change):
        self.calls += 1
        return 0.0 if self.calls % 2 else None

    def ahead(self, branch):
        return 0.0

    def computed(self, branch, change, same, line):
        pass


def test_a_cache_that_leaves_nothing_out_changes_no_bit():
    transformer, (net, _) = nets.transformer(), net_of()
    steer = net.steer([(hint(), 1.0)])
    wanted, judge = asked(transformer, steer), Eager()
    with residual_cache(transformer, judge):
        first = asked(transformer, steer)[:, :12]
        spared = asked(transformer, steer)[:, :12]
    assert torch.equal(first, wanted[:, :12])
    assert torch.allclose(spared, wanted[:, :12], atol=1e-5) and judge.calls == 1  # the residual holds what was added
    assert torch.equal(asked(transformer, steer), wanted)


def test_streamed_blocks_are_steered_like_those_that_stay(tmp_path):
    transformer, (net, _) = nets.transformer(), net_of()
    checkpoint, steer = nets.saved(transformer, tmp_path), net.steer([(hint(), 1.0)])
    wanted = asked(transformer, steer)
    parts = [Part(block, f"transformer_blocks.{i}") for i, block in enumerate(transformer.transformer_blocks)]
    streamer = Streamer(list(transformer.transformer_blocks), Mapped(parts, checkpoint.read))
    assert torch.equal(asked(transformer, steer), wanted) and streamer.peak <= 2
    streamer.close()


def test_compiled_blocks_are_steered_and_no_more_is_compiled():
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    transformer, (net, _), counter = nets.transformer(num_layers=LAYERS), net_of(), CompileCounter()
    steer = net.steer([(hint(), 1.0)])
    wanted = asked(transformer, steer)
    compiler = attach_compiled(transformer, counter)  # type: ignore[arg-type]
    found, plain = asked(transformer, steer), asked(transformer)
    assert torch.allclose(found, wanted, atol=1e-5) and not compiler.failed
    assert counter.frame_count == 1 and not torch.allclose(found, plain, atol=1e-2)
    detach_compiled(transformer)
    torch._dynamo.reset()


def test_it_is_watched_like_the_transformer():
    """What leaves the range of its numbers in the net is made safe there, and the drawing goes on."""
    transformer, (net, _) = nets.transformer(), net_of()
    for block in net.controlnet_blocks:
        nets.swap(block, torch.nn.Linear, lambda _, old: Int4Linear.from_dense(old.weight, old.bias, group=32))
    net.controlnet_blocks[2].input_proj.product = lambda linear, x: linear.plain(x) * torch.nan
    canvas = canvas_of(net)
    with Sentinel({"transformer": transformer, "controlnet": net}, torch.float32, {}) as watch:
        predict = lambda *asked: watch(lambda: velocity(*asked), lambda: velocity(*asked))  # noqa: E731
        latents = [step.latents for step in denoise(transformer, canvas, predict)][-1]
    assert torch.isfinite(latents).all() and dict(watch.ways) == {"controlnet.controlnet_blocks.2": "plain"}


def test_without_one_every_bit_is_as_before():
    transformer, (net, _) = nets.transformer(), net_of()
    canvas = nets.canvas(guided=True)
    steered = canvas_of(net, guided=True)
    idle = nets.canvas(guided=True, steering=steering([(net, (hint(), 0.0, (0.0, 1.0)))]))
    ends = [[step.latents for step in denoise(transformer, each)][-1] for each in (canvas, idle, steered)]
    assert torch.equal(ends[0], ends[1]) and not torch.allclose(ends[0], ends[2], atol=1e-2)
    assert velocity(transformer, canvas, canvas.start, canvas.sigmas[0]).shape == canvas.start.shape
    assert isinstance(canvas.positive, Conditioning) and isinstance(canvas.references[0], Tokens)
