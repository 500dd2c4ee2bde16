"""Where the time of training steps goes, on the host and on its GPU: a few steps timed by parts, a few more profiled.

The time of a part on the GPU is what passes there between its first operation and its last, waiting for the host
included; host and GPU work at the same time. The steps that are looked at are real ones and a little slower.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lanting.train.course import Course
from lanting.train.graphs import Figures, Passes, Recorded
from lanting.train.loop import Trainer
from lanting.train.replay import Batch

FILE = "profile.txt"
ROWS = 30  # of the profiler's tables


class Stopwatch:
    """Times calls by the names of their parts."""

    def __init__(self, device: torch.device):
        self.on_gpu = device.type == "cuda"
        self.host: dict[str, list[float]] = {}
        self.events: dict[str, list[tuple[Any, Any]]] = {}
        self.undo: list[Callable[[], None]] = []

    def timed(self, part: str, work: Callable[..., Any]) -> Callable[..., Any]:
        """`work`, timed."""
        spent, marks = self.host.setdefault(part, []), self.events.setdefault(part, [])

        def run(*words: Any, **named: Any) -> Any:
            begin, began = self.mark(), time.perf_counter()
            try:
                return work(*words, **named)
            finally:
                spent.append(time.perf_counter() - began)
                marks.append((begin, self.mark()))

        return run

    def mark(self) -> Any:
        if not self.on_gpu:
            return None
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def watch(self, owner: Any, name: str, part: str) -> None:
        """Time a method of one object until `close`."""
        setattr(owner, name, self.timed(part, getattr(owner, name)))
        self.undo.append(lambda: delattr(owner, name))

    def close(self) -> None:
        for undo in reversed(self.undo):
            undo()
        self.undo.clear()

    def table(self, steps: int) -> list[str]:
        """Lines: calls and milliseconds a step."""
        if self.on_gpu:
            torch.cuda.synchronize()
        lines = [f"{'ms a step':<24}{'calls':>8}{'host':>10}{'GPU':>10}"]
        for part, spent in self.host.items():
            host, gpu = 1000 * sum(spent) / steps, float("nan")
            if self.on_gpu:
                gpu = sum(begin.elapsed_time(end) for begin, end in self.events[part]) / steps
            lines.append(f"{part:<24}{len(spent) / steps:>8.1f}{host:>10.2f}{gpu:>10.2f}")
        return lines


class TimedPasses:
    """Passes whose calls are timed; everything else is theirs."""

    def __init__(self, passes: Passes, watch: Stopwatch):
        self.passes, self.call = passes, watch.timed("  forward and backward", passes.__call__)
        self.gather, self.clear, self.forget = passes.gather, passes.clear, passes.forget

    def __call__(self, name: str, batch: Batch, prefix: Sequence[int], t: Tensor, noise: Tensor) -> Figures:
        return self.call(name, batch, prefix, t, noise)


def opened(trainer: Trainer, courses: Sequence[Course]) -> Stopwatch:
    """A stopwatch on every part of a step. Parts that belong to another are indented below it."""
    watch = Stopwatch(trainer.device)
    watch.watch(trainer, "step", "step")
    for course in courses:
        watch.watch(course.replay, "add", "  take in designs")
        if hasattr(course.replay, "put"):
            watch.watch(course.replay, "put", "    one chunk")
        watch.watch(course.replay, "draw", "  draw a batch")
    watch.watch(trainer, "noised", "  times and noise")
    plain = trainer.passes
    trainer.passes = TimedPasses(plain, watch)
    watch.undo.append(lambda: setattr(trainer, "passes", plain))
    watch.watch(trainer, "update", "  update")
    for optimizer in trainer.optimizers:
        watch.watch(optimizer, "step", f"    {type(optimizer).__name__}")
    watch.watch(trainer, "follow", "    average")
    return watch


class Profile:
    """Looks at `steps` steps by parts and at as many with torch's profiler, whenever a step of `starts` is reached."""

    def __init__(self, trainer: Trainer, courses: Sequence[Course], out: Path, starts: Sequence[int], steps: int):
        self.trainer, self.courses, self.path, self.steps = trainer, courses, out / FILE, steps
        self.plan: dict[int, Callable[[], None]] = {}
        for start in starts:
            self.plan |= {start: self.open, start + steps: self.turn, start + 2 * steps: self.end}
        self.taken = 0
        self.began = 0.0
        self.watch: Stopwatch | None = None
        self.profiler: Any = None
        self.plan.get(0, lambda: None)()

    def after_step(self) -> None:
        self.taken += 1
        self.plan.get(self.taken, lambda: None)()

    def finish(self) -> None:
        """Close what is open."""
        if self.watch is not None:
            self.watch.close()
        if self.profiler is not None:
            self.end()

    def open(self) -> None:
        self.watch, self.began = opened(self.trainer, self.courses), self.now()

    def now(self) -> float:
        if self.trainer.device.type == "cuda":
            torch.cuda.synchronize()
        return time.monotonic()

    def turn(self) -> None:
        """Tell what the stopwatch saw, begin with the profiler."""
        assert self.watch is not None
        whole = 1000 * (self.now() - self.began) / self.steps
        self.watch.close()
        lines = [f"steps {self.taken - self.steps} to {self.taken}: {whole:.1f} ms each on the clock"]
        self.tell([*lines, *self.watch.table(self.steps), *recordings(self.trainer)])
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self.trainer.device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        with suppress(RuntimeError):  # a machine may not let anyone look
            self.profiler = torch.profiler.profile(activities=activities)
            self.profiler.start()

    def end(self) -> None:
        """Tell what the profiler saw."""
        profiler, self.profiler = self.profiler, None
        try:
            profiler.stop()
            found = profiler.key_averages()
        except (RuntimeError, AttributeError, AssertionError) as error:
            self.tell([f"no profile: {error}"])
            return
        sorts = ["self_cpu_time_total"]
        if self.trainer.device.type == "cuda":
            sorts.append("self_device_time_total")
        for sort in sorts:
            self.tell([found.table(sort_by=sort, row_limit=ROWS, max_name_column_width=60)])

    def tell(self, lines: Sequence[str]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write("\n".join(lines) + "\n\n")
        print("\n".join(lines[:40]), flush=True)


def recordings(trainer: Trainer) -> list[str]:
    """How many shapes came, and how many of them are recorded; how often anything was compiled."""
    lines = []
    if isinstance(trainer.passes, Recorded):
        playback = trainer.passes.playback
        failed = ", recording failed" if playback.failed else ""
        lines.append(f"{len(playback.met)} shapes of batches, {len(playback.kept)} of them recorded{failed}")
    with suppress(ImportError, AttributeError):
        from torch._dynamo.utils import counters

        lines.append(f"compiled: {dict(counters['stats'])}, broken off: {dict(counters['graph_break'])}")
    return lines


def profiled(train: Callable[..., bool], out: Path, starts: Sequence[int], steps: int) -> Callable[..., bool]:
    """`loop.train` that leaves a profile in `out`."""

    def run(trainer: Trainer, courses: Sequence[Course], log: Any, seed: int, every: Callable[[Trainer], None]) -> bool:
        profile = Profile(trainer, courses, out, starts, steps)

        def each(trainer: Trainer) -> None:
            every(trainer)
            profile.after_step()

        done = train(trainer, courses, log, seed, each)
        profile.finish()
        return done

    return run
