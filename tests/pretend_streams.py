"""Streams, events and graphs of a GPU that isn't there, for `pretend`.

Copies to it on a stream of its own wait until somebody waits for them: a block that is used before it has arrived
shows what was there before. A graph writes down operations and does them again into the same results, which are rubbish
until then; what can't be recorded is refused. All else is done at once: a stream that doesn't wait for the one before
it is not noticed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils import _pytree as tree

aten = torch.ops.aten
ASKS = {aten._local_scalar_dense.default, aten.equal.default, aten.nonzero.default, aten.masked_select.default}


class Refused(RuntimeError):
    """What a GPU would not have done."""


def tensors_in(values: Any) -> list[torch.Tensor]:
    return [x for x in tree.tree_leaves(values) if isinstance(x, torch.Tensor)]


class Stream:
    """Copies wait here until somebody waits for them."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.waiting: list[Callable[[], object]] = []
        self.count = 0

    def later(self, work: Callable[[], object]) -> None:
        self.waiting.append(work)
        self.count += 1

    def until(self, count: int) -> None:
        while self.waiting and self.count - len(self.waiting) < count:
            self.waiting.pop(0)()

    def synchronize(self) -> None:
        self.until(self.count)

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event

    def wait_event(self, event: Event) -> None:
        event.synchronize()

    def wait_stream(self, other: Stream) -> None:
        other.synchronize()


class Event:
    def __init__(self, *_: Any, **__: Any) -> None:
        self.stream, self.count = MAIN, 0

    def record(self, stream: Stream | None = None) -> None:
        self.stream = stream or GPU.stream or MAIN
        self.count = self.stream.count

    def synchronize(self) -> None:
        self.stream.until(self.count)

    wait = synchronize

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: Event) -> float:
        return 1.0


class Graph:
    """What was done while it was recorded, done again into the same results."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.steps: list[tuple[Any, Any, Any, list[torch.Tensor]]] = []

    def check(self, func: Any, tensors: list[torch.Tensor]) -> None:
        if func in ASKS:
            raise Refused(f"{func}: the CPU would have to wait for a number while a graph is recorded")
        if any(x.dim() and x.device.type == "cpu" for x in tensors):
            raise Refused(f"{func}: a copy between devices while a graph is recorded")

    def keep(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        self.steps.append((func, args, kwargs, tensors_in(out)))

    def replay(self) -> None:
        for func, args, kwargs, kept in self.steps:
            for new, old in zip(tensors_in(func(*args, **kwargs)), kept, strict=True):
                if new.data_ptr() != old.data_ptr():
                    old.copy_(new)

    def spoil(self) -> None:
        """Nothing is computed while a graph is recorded: results are rubbish until it is played."""
        taken = {x.data_ptr() for _, args, kwargs, _ in self.steps for x in tensors_in((args, kwargs))}
        for _, _, _, kept in self.steps:
            for x in kept:
                if x.data_ptr() not in taken and x.is_floating_point():
                    x.fill_(float("nan"))

    def reset(self) -> None:
        self.steps.clear()

    def capture_begin(self, **_: Any) -> None:
        GPU.tape = self

    def capture_end(self) -> None:
        GPU.tape, GPU.graphs = None, GPU.graphs + 1
        self.spoil()


MAIN = Stream()
GPU = SimpleNamespace(stream=None, tape=None, graphs=0, count=1, done=0)


@contextmanager
def on_stream(stream: Stream | None) -> Iterator[None]:
    before, GPU.stream = GPU.stream, stream if stream is not MAIN else None
    try:
        yield
    finally:
        GPU.stream = before


@contextmanager
def recorded(graph: Graph, *_: Any, **__: Any) -> Iterator[None]:
    graph.capture_begin()
    try:
        yield
    except BaseException:
        GPU.tape = None
        raise
    graph.capture_end()
