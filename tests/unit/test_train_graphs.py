"""Recorded training steps, with a stand-in for the recorder: the bookkeeping is all here, only the GPU is not."""

from __future__ import annotations

import contextlib
import gc
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lanting.train.atlas import default_atlas
from lanting.train.course import Budget, Course
from lanting.train.feed import FeedOrder
from lanting.train.graphs import Playback, Recorded, Recorder, passes_for
from lanting.train.loop import Trainer, make_smaller
from lanting.train.presets import Kind
from lanting.train.replay import Reader
from lanting.train.ring import Ring
from lanting.train.speed import prepare_for_gpu
from lanting.train.twin import twin_of
from lanting.train.workers import kept_atlas
from training import small_net, small_tokenizer, small_vae

KINDS = (Kind("design", (96, 32), 0, 0.5, 3, 2, 0.5), Kind("edit", (96, 96), 1, 0.5, 2, 1, 0.5))


class Again:
    """Records by doing the same once more; a GPU would not do it while recording either."""

    def __init__(self, broken: type[Exception] | None = None):
        self.broken, self.recorded, self.forgotten = broken, 0, 0

    def ready(self) -> bool:
        return True

    def record(self, work: Callable[[], object]) -> Callable[[], object]:
        if self.broken is not None:
            raise self.broken("no\nat all")
        self.recorded += 1
        return work

    def aside(self, work: Callable[[], object]) -> object:
        return work()

    def forget(self) -> None:
        self.forgotten += 1


@pytest.fixture(scope="module")
def courses(tmp_path_factory) -> list[Course]:
    folder = tmp_path_factory.mktemp("graphs")
    small_tokenizer().save(str(folder / "tokenizer.json"))
    kept_atlas(folder / "atlas.npz")
    order = FeedOrder(KINDS, str(folder / "tokenizer.json"), str(folder / "atlas.npz"), 1, workers=1, chunk=6)
    found = []
    for number, kind in enumerate(KINDS):
        reader = Reader(small_tokenizer(), "edit-plus" if kind.pictures else "text-to-image")
        ring = Ring(kind, reader, small_vae(), default_atlas(), None, 6)  # type: ignore[arg-type]
        ring.put(order.maker(0).chunk(number))
        ring.add = lambda count, rng: None  # type: ignore[method-assign]
        found.append(Course(kind.name, ring, kind.share, kind.batch, kind.fresh, kind.early))
    return found


def trainer_of(folder: Path, recorder: Again | None) -> Trainer:
    trainer = Trainer(prepare_for_gpu(small_net()), Budget(warmup_steps=1), folder)
    if recorder is not None:
        trainer.passes = Recorded(trainer, recorder)  # type: ignore[arg-type]
    return trainer


def steps(trainer: Trainer, courses: list[Course], count: int) -> list[dict[str, torch.Tensor]]:
    rng, generator = random.Random(5), torch.Generator().manual_seed(5)
    return [trainer.step(courses, rng, generator, 2) for _ in range(count)]


def test_recorded_steps_are_the_same_steps(courses, tmp_path):
    recorder = Again()
    plain, recorded = trainer_of(tmp_path, None), trainer_of(tmp_path, recorder)
    told, heard = steps(plain, courses, 12), steps(recorded, courses, 12)
    assert len(recorded.passes.playback.kept) >= 2  # type: ignore[attr-defined]  kinds and lengths that came twice
    assert len(recorded.optimizers[0].playback.kept) >= 1  # type: ignore[attr-defined]
    alone = [figures for figures in told if {key.split()[0] for key in figures} == {"design"}]
    assert 0 < len(alone) < 12  # the vision tower is left alone in some steps, and moved in others
    for one, other in zip(told, heard, strict=True):
        assert one.keys() == other.keys()
        for key, value in one.items():
            assert torch.allclose(value, other[key], atol=1e-3, equal_nan=True), key
    assert all(p.grad is None for p in recorded.net.parameters())
    for (name, one), other in zip(plain.net.named_parameters(), recorded.net.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-4), name
    first, second = (t.optimizers[1].state[t.net.visual.merger.ln_q.weight]["step"] for t in (plain, recorded))
    assert first == second < 12


def test_figures_of_a_step_outlive_the_next(courses, tmp_path):
    trainer = trainer_of(tmp_path, Again())
    ring, generator = courses[0].replay, torch.Generator().manual_seed(0)
    batch = ring.draw(3, random.Random(0), silence=0.0)  # type: ignore[call-arg]
    told = []
    for _ in range(4):
        t, noise = trainer.noised(batch, generator)
        told.append(trainer.passes("design", batch, ring.reader.prefix, t, noise)["loss"])
    assert len({float(loss) for loss in told}) == 4


def test_where_recording_fails_steps_go_on_one_by_one(courses, tmp_path, capsys):
    recorder = Again(RuntimeError)
    plain, broken = trainer_of(tmp_path, None), trainer_of(tmp_path, recorder)
    steps(plain, courses, 6)
    steps(broken, courses, 6)
    assert capsys.readouterr().err.count("are not recorded") == 2  # batches, updates
    for one, other in zip(plain.net.parameters(), broken.net.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-4)


def test_too_little_memory_while_recording_makes_batches_smaller(courses, tmp_path):
    recorder = Again(torch.OutOfMemoryError)
    trainer = trainer_of(tmp_path, recorder)
    with pytest.raises(torch.OutOfMemoryError):
        steps(trainer, courses, 12)
    make_smaller(trainer)
    assert trainer.scale == 0.5 and recorder.forgotten == 1
    assert isinstance(trainer.passes, Recorded) and not trainer.passes.touched
    assert all(not total.any() for total in trainer.passes.sums)
    recorder.broken = None
    steps(trainer, courses, 4)


def test_only_so_much_is_recorded_and_inputs_share_memory():
    playback = Playback(Again(), most=2)  # type: ignore[arg-type]
    double = lambda x, y: (x * 2 + y.sum(),)  # noqa: E731
    for width in (1, 2, 3, 1, 2, 3, 3, 1):
        x, y = torch.rand(width), torch.rand(4)
        assert torch.equal(playback("double", double, [x, y])[0], x * 2 + y.sum())
    assert len(playback.kept) == 2
    one, other = playback.kept.values()
    assert one.inputs[1] is other.inputs[1] and one.inputs[0] is not other.inputs[0]


def test_a_ring_that_records_its_encoding_keeps_the_same(courses, monkeypatch):
    ring = courses[0].replay
    assert isinstance(ring, Ring)
    pixels = torch.randint(0, 256, (3, 32, 96, 3), dtype=torch.uint8)
    wanted = ring.encode(pixels).clone()
    monkeypatch.setattr(ring, "playback", Playback(Again()))  # type: ignore[arg-type]
    for _ in range(3):
        assert torch.equal(ring.encode(pixels), wanted)


def test_a_chunk_is_as_large_as_a_batch_within_limits():
    order, small = FeedOrder(KINDS, "", "", 1, workers=1), FeedOrder(KINDS, "", "", 1, workers=1, chunk=6)
    sizes = [replace(KINDS[0], batch=batch) for batch in (20, 240, 2000)]
    assert [order.count(kind) for kind in sizes] == [128, 240, 384]
    assert [small.count(kind) for kind in sizes] == [6, 6, 6]


def test_a_cpu_and_several_gpus_go_without(tmp_path):
    assert type(passes_for(trainer_of(tmp_path, None))).__name__ == "Plain"


class Cuda:
    """What of `torch.cuda` a recorder asks for, told in order."""

    def __init__(self):
        self.told: list[str] = []

    def Stream(self):
        return self

    def wait_stream(self, other: object) -> None:
        self.told.append("wait")

    def graph_pool_handle(self) -> tuple[int, int]:
        return (0, 1)

    def CUDAGraph(self):
        return self

    def current_stream(self):
        return self

    def stream(self, _: object):
        return contextlib.nullcontext()

    def capture_begin(self, pool: object, capture_error_mode: str) -> None:
        assert pool == (0, 1) and not gc.isenabled()
        self.told.append("begin")

    def capture_end(self) -> None:
        self.told.append("end")
        if "broken" in self.told:
            raise RuntimeError("invalid capture")

    def replay(self) -> None:
        self.told.append("replay")


@pytest.mark.parametrize("error", [None, ValueError, torch.OutOfMemoryError])
def test_a_recording_begins_and_ends_whatever_happens(monkeypatch, error):
    cuda = Cuda()
    for name in ("Stream", "graph_pool_handle", "CUDAGraph", "current_stream", "stream"):
        monkeypatch.setattr(f"torch.cuda.{name}", getattr(cuda, name))

    def work() -> None:
        cuda.told.append("work" if error is None else "broken")
        if error is not None:
            raise error("no")

    if error is None:
        Recorder().record(work)()
        assert cuda.told == ["wait", "begin", "work", "end", "wait", "replay"]
    else:
        with pytest.raises(error):  # and not what ending the broken recording raises
            Recorder().record(work)
        assert cuda.told == ["wait", "begin", "broken", "end"]
    assert gc.isenabled()


def test_nothing_is_recorded_where_memory_is_short(monkeypatch):
    for name, value in (("memory_reserved", 30), ("memory_allocated", 25)):
        monkeypatch.setattr(f"torch.cuda.{name}", lambda value=value: value)
    for free, ready in ((10, True), (4, False)):
        monkeypatch.setattr("torch.cuda.mem_get_info", lambda free=free: (free, 100))
        assert Recorder().ready() == ready


def test_a_copy_in_sixteen_bits_trains_the_same_network(courses, tmp_path):
    plain, copied = trainer_of(tmp_path, None), Trainer(small_net(), Budget(warmup_steps=1), tmp_path)
    twin = twin_of(copied.net)
    copied.use(twin)
    copied.passes = Recorded(copied, Again())  # type: ignore[arg-type]
    assert all(p.dtype == torch.bfloat16 for p in twin.parameters())
    told, heard = steps(plain, courses, 8), steps(copied, courses, 8)
    for one, other in zip(told, heard, strict=True):
        losses = {key for key in one if key.endswith(("loss", "ink", "shape"))}
        assert all(torch.allclose(one[key], other[key], rtol=0.05, atol=0.02) for key in losses), (one, other)
    moved = [p.bfloat16().equal(q) for p, q in zip(copied.net.parameters(), twin.parameters(), strict=True)]
    assert all(moved)


def test_gradients_of_the_copy_point_where_those_of_the_network_do(courses, tmp_path):
    net = small_net()
    for name, p in net.named_parameters():  # away from the start, where half of the weights are zero
        p.data += 0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name)))
    trainer = Trainer(net, Budget(), tmp_path)
    twin, exact = twin_of(net), prepare_for_gpu(net)
    for course in courses:
        batch = course.replay.draw(3, random.Random(0), silence=0.0)  # type: ignore[call-arg]
        t, noise = trainer.noised(batch, torch.Generator().manual_seed(0))
        found = []
        for fast in (exact, twin):
            trainer.fast = fast
            loss, _ = trainer.loss(batch, course.replay.reader.prefix, t, noise)
            found.append(torch.autograd.grad(loss, list(fast.parameters()), allow_unused=True))
        pairs = [(a.flatten(), b.float().flatten()) for a, b in zip(*found, strict=True) if a is not None]
        whole, other = (torch.cat(side) for side in zip(*pairs, strict=True))
        assert torch.cosine_similarity(whole, other, dim=0) > 0.99
