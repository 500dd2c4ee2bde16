"""Recorded steps, with a stand-in for the recorder: the bookkeeping is all here, only the GPU is not."""

from __future__ import annotations

from contextlib import ExitStack, nullcontext
from itertools import pairwise

import pytest
import torch

import nets
from lanting.attach.caches import residual_cache
from lanting.attach.frozen import frozen_references
from lanting.attach.gpu import attach_gpu, detach_gpu
from lanting.attach.graphs import Graphs, attach_graphs, detach_graphs, forget_graphs
from lanting.attach.modulation import ModulationTable
from lanting.core.lang import chinese
from lanting.core.quality import Quality
from lanting.flow.frugal import Frugal, Kept
from lanting.flow.loop import denoise
from lanting.nn.blockwise import BlockwiseConfig, BlockwiseControlNet
from lanting.nn.controlnet_fun import FunConfig, QwenImageFunControlNet
from lanting.nn.linears import Fp8Linear
from lanting.nn.lora import Factors, attach, detach, set_strengths

GRID = (1, 3, 4)


class Again:
    """Plays back by doing the same once more, into the same memory; while it records, nothing may be waited for."""

    def __init__(self, broken: type[Exception] | None = None, full: bool = False):
        self.broken, self.full, self.recorded, self.played, self.forgotten = broken, full, 0, 0, 0

    def fresh(self):
        return self

    def ready(self, device):
        return True

    def holds(self, size, device):
        return not self.full

    def roomy(self, device):
        return not self.full

    def record(self, work, device):
        if self.broken is not None:
            raise self.broken("no\nat all")
        self.recorded += 1
        with strict():
            outputs = tuple(x.clone().fill_(float("nan")) for x in work())  # recording computes nothing

        def play():
            self.played += 1
            with strict():
                for place, value in zip(outputs, work(), strict=True):
                    place.copy_(value)

        return play, outputs

    def forget(self):
        self.forgotten += 1


class strict(torch.utils._python_dispatch.TorchDispatchMode):
    """A GPU that is being recorded can't be asked for numbers."""

    def __enter__(self):
        self.real, torch.Tensor.tolist = torch.Tensor.tolist, None
        return super().__enter__()

    def __exit__(self, *problem):
        torch.Tensor.tolist = self.real
        super().__exit__(*problem)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten._local_scalar_dense.default, "asked for a number"
        return func(*args, **(kwargs or {}))


def ask(net, time=0.5, seed=0, grids=(GRID,), **given):
    """A step: `text`, `batch`, `masked`, `controls`, `steer` and `branch` say which."""
    text, batch, masked = given.get("text", 7), given.get("batch", 1), given.get("masked", False)
    controls, branch = given.get("controls", 0), given.get("branch", "positive")
    torch.manual_seed(seed)
    tokens = 12 * len(grids)
    latents, prompt = torch.randn(batch, tokens, 16), torch.randn(batch, text, 48)
    mask = (torch.arange(text) < text - 2).expand(batch, -1) if masked else None
    control = [torch.randn(batch, tokens, 64) for _ in range(controls)]
    times = time if isinstance(time, torch.Tensor) else torch.full((batch,), time)
    with torch.no_grad():
        more = {"steer": given["steer"](seed)} if "steer" in given else {}
        return net(latents, times, prompt, mask, grids, 12, control=control, branch=branch, **more)


def pair(tabled=False, **changes):
    """A network that records and its stand-in, and one that does not."""
    net, plain, recorder = nets.transformer(**changes), nets.transformer(**changes), Again()
    table, other = (ModulationTable(net), ModulationTable(plain)) if tabled else (None, None)
    graphs = attach_graphs(net, table, recorder, 4)  # type: ignore[arg-type]
    graphs.other = other  # type: ignore[attr-defined]
    return net, plain, graphs, recorder


@pytest.mark.parametrize("tabled", [False, True])
@pytest.mark.parametrize("two_times", [False, True])
def test_recorded_steps_are_the_same_steps(tabled, two_times):
    net, plain, graphs, recorder = pair(tabled, zero_cond_t=two_times)
    grids = (GRID, GRID) if two_times else (GRID,)
    if tabled:
        for each in (graphs.table, graphs.other):
            each.prepare(torch.tensor([0.9, 0.6, 0.3]))
    for i, time in enumerate((0.9, 0.6, 0.3, 0.3, 0.9, 0.6)):
        found = ask(net, time, grids=grids, seed=i)
        assert torch.equal(found, ask(plain, time, grids=grids, seed=i)), time
    assert recorder.recorded == 1 and recorder.played == 4


def test_what_was_returned_stays():
    net, plain, _, _ = pair()
    first = [ask(net, seed=i) for i in range(4)]
    assert all(torch.equal(found, ask(plain, seed=i)) for i, found in enumerate(first))


@pytest.mark.parametrize("given", [{"masked": True}, {"controls": 2}, {"batch": 2}, {"text": 9}, {"branch": "both"}])
def test_everything_given_counts(given):
    net, plain, graphs, recorder = pair()
    for i in range(4):
        assert torch.equal(ask(net, seed=i), ask(plain, seed=i))
        assert torch.equal(ask(net, seed=i, **given), ask(plain, seed=i, **given))
    assert recorder.recorded == 2 == len(graphs.tapes.kept)


def guide(seed=1):
    torch.manual_seed(seed)
    return nets.randomise(BlockwiseControlNet(BlockwiseConfig(num_layers=3, width=64, in_channels=16)))


@pytest.mark.parametrize("cached", [False, True])
def test_nets_that_are_asked_behind_blocks_are_recorded_along(cached):
    """Each step has corrections of its own, whatever was recorded with; under the dial in two runs of blocks."""
    net, plain, graphs, recorder = pair(num_layers=3, tabled=True)
    for each in (graphs.table, graphs.other):
        each.prepare(torch.tensor([0.5]))
    one, two = guide(1), guide(2)
    hints = [torch.randn(1, 12, 16) for _ in range(8)]
    alone = lambda seed: one.steer([(hints[seed], 0.8)])  # noqa: E731
    both = lambda seed: one.steer([(hints[seed], 0.8)], [(two, hints[-1], 0.5)])  # noqa: E731
    weaker = lambda seed: one.steer([(hints[seed], 0.3)])  # noqa: E731
    graphs.tapes.most, seen = 8, []
    with residual_cache(net, Never()) if cached else nullcontext():
        for i in range(4):
            for steer in (alone, both, weaker):
                found = ask(net, seed=i, controls=1, steer=steer)
                assert torch.equal(found, ask(plain, seed=i, controls=1, steer=steer))
                seen.append(found)
    pieces = 2 if cached else 1
    assert recorder.recorded == 3 * pieces and recorder.played == 6 * pieces
    assert not any(torch.equal(a, b) for a, b in pairwise(seen))


def test_a_safer_way_of_one_of_its_blocks_is_no_recording_s():
    net, plain, _, recorder = pair(num_layers=3)
    guided, hint = guide(), torch.randn(1, 12, 16)
    steer = lambda seed: guided.steer([(hint, 1.0)])  # noqa: E731
    sound = [ask(net, seed=i, steer=steer) for i in range(3)]
    block = guided.controlnet_blocks[1]
    block.forward = lambda img, seen: 2 * type(block).forward(block, img, seen)
    for i in range(3):
        found = ask(net, seed=i, steer=steer)
        assert torch.equal(found, ask(plain, seed=i, steer=steer)) and not torch.equal(found, sound[i])
    assert (recorder.recorded, recorder.played) == (2, 2)
    del block.forward
    assert torch.equal(ask(net, seed=1, steer=steer), sound[1]) and recorder.played == 3
    hook = block.register_forward_hook(lambda *given: None)
    assert torch.equal(ask(net, seed=1, steer=steer), sound[1]) and recorder.played == 3  # it is heard
    hook.remove()


def test_a_net_that_was_away_is_recorded_anew():
    net, plain, _, recorder = pair(num_layers=3)
    away, hint = guide(), torch.randn(1, 12, 16)
    steer = lambda seed: away.steer([(hint, 1.0)])  # noqa: E731
    for turn in range(2):
        for i in range(3):
            assert torch.equal(ask(net, seed=i, steer=steer), ask(plain, seed=i, steer=steer))
        assert (recorder.recorded, recorder.played) == (turn + 1, turn + 1)
        for p in away.parameters():  # it comes back in other memory, with other numbers for once
            p.data = 2 * p.data
        for block in away.controlnet_blocks:
            block.input_proj.weight = torch.nn.Parameter(block.input_proj.weight.data.clone(), requires_grad=False)


def chain(seed=1):
    torch.manual_seed(seed)
    config = FunConfig(**{**nets.SHAPE, "num_layers": 3}, control_layers=(0, 2), control_in_dim=36)
    return nets.randomise(QwenImageFunControlNet(config))


@pytest.mark.parametrize("cached", [False, True])
def test_chains_are_recorded_with_whole_steps_and_never_with_runs_of_blocks(cached):
    """Alone and with a net that is asked behind blocks. Under the dial a chain's streams go from run to run."""
    net, plain, graphs, recorder = pair(num_layers=3, tabled=True)
    for each in (graphs.table, graphs.other):
        each.prepare(torch.tensor([0.5]))
    one, two, behind = chain(1), chain(2), guide()
    hints, seen = [torch.randn(1, 12, 36) for _ in range(8)], torch.randn(1, 12, 16)
    alone = lambda seed: one.steer([(hints[seed], 0.8)])  # noqa: E731
    both = lambda seed: one.steer([(hints[seed], 0.8)], [(two, hints[-1], 0.5)])  # noqa: E731
    mixed = lambda seed: (behind.steer([(seen * seed, 0.7)]), one.steer([(hints[seed], 0.8)]))  # noqa: E731
    graphs.tapes.most, found = 8, []
    with residual_cache(net, Never()) if cached else nullcontext():
        for i in range(4):
            for steer in (alone, both, mixed):
                found.append(ask(net, seed=i, controls=1, steer=steer))
                assert torch.equal(found[-1], ask(plain, seed=i, controls=1, steer=steer))
    assert (recorder.recorded, recorder.played) == ((0, 0) if cached else (3, 6))
    assert not any(torch.equal(a, b) for a, b in pairwise(found))


def test_a_safer_way_inside_of_a_chain_is_no_recording_s():
    net, plain, _, recorder = pair(num_layers=3)
    guided, hint = chain(), torch.randn(1, 12, 36)
    steer = lambda seed: guided.steer([(hint, 1.0)])  # noqa: E731
    sound = [ask(net, seed=i, steer=steer) for i in range(3)]
    part = guided.control_blocks[1].img_mlp
    part.forward = lambda x: 2 * type(part).forward(part, x)
    for i in range(3):
        found = ask(net, seed=i, steer=steer)
        assert torch.equal(found, ask(plain, seed=i, steer=steer)) and not torch.equal(found, sound[i])
    del part.forward
    assert torch.equal(ask(net, seed=1, steer=steer), sound[1]) and (recorder.recorded, recorder.played) == (2, 3)
    hook = guided.control_blocks[0].register_forward_hook(lambda *given: None)
    assert torch.equal(ask(net, seed=1, steer=steer), sound[1]) and recorder.played == 3  # it is heard
    hook.remove()


def test_only_the_last_few_are_kept():
    net, plain, graphs, recorder = pair()
    for text in range(5, 11):
        for i in range(3):
            assert torch.equal(ask(net, text=text, seed=i), ask(plain, text=text, seed=i))
    assert len(graphs.tapes.kept) == 4 and recorder.recorded == 6
    ask(net, text=10)
    assert recorder.recorded == 6  # among the last ones
    ask(net, text=5)
    assert recorder.recorded == 7


def test_another_schedule_has_another_table():
    net, plain, graphs, recorder = pair(tabled=True)
    for i, times in enumerate(([0.8, 0.4], [0.7, 0.5, 0.2])):
        graphs.table.prepare(torch.tensor(times))
        for time in (*times, *times):
            assert torch.allclose(ask(net, time, seed=i), ask(plain, time, seed=i), atol=1e-5)
    assert recorder.recorded == 2


def test_a_time_that_is_in_no_schedule_is_still_right():
    net, plain, graphs, _ = pair(tabled=True)
    graphs.table.prepare(torch.tensor([0.8, 0.4]))
    for time in (0.8, 0.4, 0.8, 0.123, 0.8, 0.123):
        assert torch.allclose(ask(net, time), ask(plain, time), atol=1e-5)


def test_rows_are_looked_up_once_for_both_sides():
    net, _, graphs, _ = pair(tabled=True)
    graphs.table.prepare(torch.tensor([0.8, 0.4]))
    real, asked = graphs.table.look_up, []
    graphs.table.look_up = lambda told: asked.append(1) or real(told)
    time = torch.tensor([0.8])
    for _ in range(3):
        ask(net, time), ask(net, time, text=5)
    before = len(asked)
    ask(net, time), ask(net, time, text=5)
    assert len(asked) == before
    time.fill_(0.4)
    wanted = ask(net, torch.tensor([0.4]))
    assert torch.equal(ask(net, time), wanted)


def test_weights_that_went_and_came_are_recorded_anew():
    net, plain, graphs, recorder = pair()
    for _ in range(3):
        ask(net)
    for each in (net, plain):
        each.transformer_blocks[-1].txt_mlp.net[2].weight = torch.nn.Parameter(
            each.transformer_blocks[-1].txt_mlp.net[2].weight * 2, requires_grad=False
        )
    assert torch.equal(ask(net), ask(plain)) and not graphs.tapes.kept
    ask(net)
    assert torch.equal(ask(net), ask(plain)) and recorder.recorded == 2


def test_loras_that_come_and_go():
    net, plain, _, recorder = pair()
    factors = {"transformer_blocks.1.img_mlp.net.0.proj": [Factors(torch.randn(2, 64), torch.randn(256, 2))]}
    for _ in range(3):
        ask(net)
    for each in (net, plain):
        attach(each, factors)
    forget_graphs(net)
    for strength in (1.0, 0.5):
        for each in (net, plain):
            set_strengths(each, [strength])
        assert all(torch.equal(ask(net, seed=i), ask(plain, seed=i)) for i in range(4))
    assert recorder.recorded == 2  # strengths are numbers in memory: nothing is recorded anew for them
    for each in (net, plain):
        detach(each)
    forget_graphs(net)
    assert torch.equal(ask(net), ask(plain))


class Never:
    def watches(self, branch):
        return True

    def reuse(self, branch, change):
        return None

    def ahead(self, branch):
        return 0.0

    def computed(self, branch, change, same, line):
        pass


def test_whoever_decides_between_blocks_has_runs_of_them_recorded():
    net, plain, _, recorder = pair()
    with residual_cache(net, Never()):
        for i in range(4):
            assert torch.equal(ask(net, seed=i), ask(plain, seed=i))
        assert recorder.recorded == 2 and recorder.played == 4  # the first block, and the others


def test_whoever_listens_to_blocks_hears_them():
    net, plain, _, recorder = pair()
    hook = net.transformer_blocks[1].register_forward_hook(lambda *given: None)
    for each in (False, True):
        with residual_cache(net, Never()) if each else nullcontext():
            for _ in range(3):
                assert torch.equal(ask(net), ask(plain))
    assert recorder.recorded == 0
    hook.remove()
    for _ in range(3):
        ask(net)
    assert recorder.recorded == 1


class Spared(Frugal):
    """Asks for every saving in turn, so that each is met often."""

    def _guess(self):
        return None

    def _choose(self, kept, change):
        return "FFCFLF"[self.step % 6] if len(kept.steps) == 2 else "F"

    def frozen(self, branch):
        kept = self.references.setdefault(branch, Kept())
        self.beside = bool(kept.steps) and self.step % 4 != 3
        return self.beside


def spared(net, given, kind=Spared):
    """(latents, words, errors that were seen) of a drawing with caches and frozen references."""
    frugal, errors = kind(Quality(step=9.0, mean=9.0, age=9), given), []
    real = frugal.refreshed
    frugal.refreshed = lambda branch, error: errors.append(error) or real(branch, error)
    with ExitStack() as hung:
        hung.enter_context(residual_cache(net, frugal))
        if given.references:
            hung.enter_context(frozen_references(net, frugal))
        return list(denoise(net, given, frugal))[-1].latents, frugal.words, errors


@pytest.mark.parametrize("references", [0, 1])
@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_spared_steps_are_recorded_by_kind(references, guided, fused, monkeypatch):
    """Full and cut short, refreshed and beside what is kept: the bits of running; none outlives the memory it reads."""
    net, plain, graphs, recorder = pair(True, zero_cond_t=bool(references))
    if fused:
        for module in ("rows", "products"):
            monkeypatch.setattr(f"lanting.kernels.gpu.{module}.available", lambda device: False)
        attach_gpu(net), attach_gpu(plain)
    given = nets.canvas(guided, references, steps=14)
    for each in (graphs.table, graphs.other):
        each.prepare(given.sigmas[:-1])
    wanted, words, errors = spared(plain, given)
    for _ in range(2):
        found, said, seen = spared(net, given)
        assert said == words and seen == errors and torch.equal(found, wanted)
        assert {word[0].upper() for word in said} == set("FCL")
        assert (len(set(map(str.islower, said))) == 2) == bool(references)
    assert recorder.played > recorder.recorded >= 2
    assert bool(graphs.tapes.kept) == (not references)  # beside references they end with each drawing
    assert all("forward" not in block.attn.attend.__dict__ or fused for block in net.transformer_blocks)


def test_a_rescue_lets_go_of_recorded_pieces():
    """The sentinel takes the recording off the network in the middle of a drawing: blocks run as they come."""
    net, plain, _, recorder = pair()
    with residual_cache(net, Never()):
        for i in range(3):
            ask(net, seed=i)
        before = recorder.played
        net.__dict__.pop("forward")
        assert torch.equal(ask(net), ask(plain)) and recorder.played == before


def test_inference_mode_has_recordings_of_its_own():
    net, plain, _, recorder = pair()
    for i in range(3):
        with torch.inference_mode():
            assert torch.equal(ask(net, seed=i), ask(plain, seed=i))
        assert torch.equal(ask(net, seed=i), ask(plain, seed=i))
    assert recorder.recorded == 2


def test_gradients_are_not_recorded():
    net, _, _, recorder = pair()
    latents = torch.randn(1, 12, 16, requires_grad=True)
    for _ in range(3):
        net(latents, torch.tensor([0.5]), torch.randn(1, 7, 48), None, (GRID,), 12).sum().backward()
    assert recorder.recorded == 0 and latents.grad is not None


@pytest.mark.parametrize("compute", [None, "int8", "fp8"])
def test_fused_blocks_are_recorded(compute):
    """They, too, wait for nothing once their choices are made."""
    net, plain, _, recorder = pair(tabled=True)
    for each in (net, plain):
        attach_gpu(each, compute)
    with pytest.MonkeyPatch.context() as patch:  # by the twins: the interpreter is slow, and its numbers are Python's
        for module in ("rows", "products"):
            patch.setattr(f"lanting.kernels.gpu.{module}.available", lambda device: False)
        assert all(torch.equal(ask(net, seed=i), ask(plain, seed=i)) for i in range(4))
        assert recorder.played == 2
        detach_gpu(net), detach_gpu(plain)
        assert torch.equal(ask(net), ask(plain)) and recorder.recorded == 1  # dropped with the blocks' forwards


@pytest.mark.parametrize("problem", [RuntimeError, torch.OutOfMemoryError])
def test_where_recording_fails_everything_runs_as_it_comes(problem, capsys):
    net, plain = nets.transformer(), nets.transformer()
    graphs = attach_graphs(net, None, Again(problem))  # type: ignore[arg-type]
    for i in range(4):
        assert torch.equal(ask(net, seed=i), ask(plain, seed=i))
    assert graphs.failed and not graphs.tapes.kept
    assert capsys.readouterr().err.count("not recorded") == 1
    assert "steps are not recorded: {reason}" in chinese()


def test_without_memory_nothing_is_recorded():
    net, recorder = nets.transformer(), Again(full=True)
    graphs = attach_graphs(net, None, recorder)  # type: ignore[arg-type]
    for _ in range(3):
        ask(net)
    assert recorder.recorded == 0 and not graphs.failed


def test_a_cpu_is_not_recorded():
    net, plain = nets.transformer(), nets.transformer()
    graphs = attach_graphs(net)
    for _ in range(3):
        assert torch.equal(ask(net), ask(plain))
    assert not graphs.tapes.kept and not graphs.tapes.met
    detach_graphs(net)
    assert "forward" not in net.__dict__ and not isinstance(net.forward, Graphs)


@pytest.mark.parametrize("how", ["packed", "lora"])
def test_what_pictures_enter_through_may_be_packed_or_have_a_lora(how):
    """Files cast to 8-bit floats as a whole hold `img_in` so, too: timesteps are told in the network's own dtype."""

    def change(net):
        if how == "packed":
            net.img_in = Fp8Linear.from_dense(net.img_in.weight, net.img_in.bias, scale=None)
        else:
            attach(net, {"img_in": [Factors(torch.full((2, 16), 0.1), torch.full((64, 2), 0.1))]})

    net, plain, graphs, recorder = pair(tabled=True)
    for each, table in ((net, graphs.table), (plain, graphs.other)):
        change(each)
        table.prepare(torch.tensor([0.9, 0.6, 0.3]))
    for i, time in enumerate((0.9, 0.6, 0.3, 0.9)):
        assert torch.equal(ask(net, time, seed=i), ask(plain, time, seed=i)), time
    assert recorder.recorded == 1 and recorder.played == 2
