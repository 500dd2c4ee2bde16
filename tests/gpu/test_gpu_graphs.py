"""Recorded steps, with a stand-in for the recorder: the bookkeeping is all here, only the GPU is not."""

from __future__ import annotations

import pytest
import torch

import nets
from lanting.attach.caches import residual_cache
from lanting.attach.gpu import attach_gpu, detach_gpu
from lanting.attach.graphs import Graphs, attach_graphs, detach_graphs, forget_graphs
from lanting.attach.modulation import ModulationTable
from lanting.core.lang import chinese
from lanting.nn.lora import Factors, attach, detach, set_strengths

GRID = (1, 3, 4)


class Again:
    """Plays back by doing the same once more, into the same memory; while it records, nothing may be waited for."""

    def __init__(self, broken: type[Exception] | None = None, full: bool = False):
        self.broken, self.full, self.recorded, self.played, self.forgotten = broken, full, 0, 0, 0

    def ready(self, device):
        return True

    def roomy(self, device):
        return not self.full

    def record(self, work, device):
        if self.broken is not None:
            raise self.broken("no\nat all")
        self.recorded += 1
        with strict():
            output = work().clone().fill_(float("nan"))  # recording computes nothing

        def play():
            self.played += 1
            with strict():
                output.copy_(work())

        return play, output

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
        assert "_local_scalar_dense" not in str(func), "asked for a number"
        return func(*args, **(kwargs or {}))


def ask(net, time=0.5, seed=0, grids=(GRID,), **given):
    """A step: `text`, `batch`, `masked`, `controls` and `branch` say which."""
    text, batch, masked = given.get("text", 7), given.get("batch", 1), given.get("masked", False)
    controls, branch = given.get("controls", 0), given.get("branch", "positive")
    torch.manual_seed(seed)
    tokens = 12 * len(grids)
    latents, prompt = torch.randn(batch, tokens, 16), torch.randn(batch, text, 48)
    mask = (torch.arange(text) < text - 2).expand(batch, -1) if masked else None
    control = [torch.randn(batch, tokens, 64) for _ in range(controls)]
    times = time if isinstance(time, torch.Tensor) else torch.full((batch,), time)
    with torch.no_grad():
        return net(latents, times, prompt, mask, grids, 12, control=control, branch=branch)


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
    assert recorder.recorded == 2 == len(graphs.kept)


def test_only_the_last_few_are_kept():
    net, plain, graphs, recorder = pair()
    for text in range(5, 11):
        for i in range(3):
            assert torch.equal(ask(net, text=text, seed=i), ask(plain, text=text, seed=i))
    assert len(graphs.kept) == 4 and recorder.recorded == 6
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
    assert torch.equal(ask(net), ask(plain)) and not graphs.kept
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


def test_whoever_decides_in_python_is_not_recorded():
    net, plain, _, recorder = pair()
    with residual_cache(net, Never()):
        for _ in range(3):
            assert torch.equal(ask(net), ask(plain))
    hook = net.transformer_blocks[1].register_forward_hook(lambda *given: None)
    for _ in range(3):
        ask(net)
    assert recorder.recorded == 0
    hook.remove()
    for _ in range(3):
        ask(net)
    assert recorder.recorded == 1


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
    assert graphs.failed and not graphs.kept
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
    assert not graphs.kept and not graphs.met
    detach_graphs(net)
    assert "forward" not in net.__dict__ and not isinstance(net.forward, Graphs)
