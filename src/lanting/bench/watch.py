"""Where the time of a case goes: every operation of torch and every call of a kernel, sorted into a few parts.

An operation that takes no longer than the smallest one there is does no work worth the name, so that much of each
counts as "small", with the time that passes between operations.

A block that is one call is watched as single calls of the same kernels, whose seconds are its parts. What torch does to
prepare them is left out, since the one call does without it. Rejected: PyTorch's profiler, which does not see the
kernels and takes longer than small networks do.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lanting.attach.whole import apart
from lanting.kernels import library

LINEARS = ("mm", "addmm", "bmm", "baddbmm", "linear", "matmul", "lt_product")
CONVOLUTIONS = ("convolution", "_convolution", "mkldnn_convolution")
ATTENTION = ("_scaled_dot_product", "scaled_dot_product", "lt_attend")
PARTS = ("linears", "convolutions", "attention", "between", "small")


@dataclass(frozen=True, slots=True)
class Part:
    """`seconds` of one run, in `calls` operations."""

    name: str
    seconds: float
    calls: int


class Watch(TorchDispatchMode):
    """Seconds of every operation that runs while it looks, by part."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        super().__init__()
        self.clock = clock
        self.spent: dict[str, list[float]] = {}
        self.within: dict[str, list[float]] = {}  # the same, of kernels that are one call when nobody looks
        self.kernels = 0  # calls of them
        self.blocks = 0  # such calls
        self.inside = False  # one of them now

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.inside:
            return func(*args, **(kwargs or {}))
        began = self.clock()
        out = func(*args, **(kwargs or {}))
        self.note(func.overloadpacket.__name__, self.clock() - began)
        return out

    def note(self, name: str, seconds: float) -> None:
        kept = self.within if self.inside else self.spent
        kept.setdefault(part_of(name), []).append(seconds)

    @contextmanager
    def block(self) -> Iterator[None]:
        """Around the kernels of one."""
        self.blocks, self.inside = self.blocks + 1, True
        try:
            yield
        finally:
            self.inside = False

    @contextmanager
    def looking(self) -> Iterator[None]:
        """Operations of torch pass by the mode itself; the library's functions are replaced meanwhile."""
        found = library.library()
        plain = {name: getattr(found, name) for name in library.CALLS} if found is not None else {}
        for name, call in plain.items():
            setattr(found, name, partial(self.timed, name, call))
        try:
            with self, apart(self.block):
                yield
        finally:
            for name, call in plain.items():
                setattr(found, name, call)

    def timed(self, name: str, call: Callable[..., Any], *given: Any) -> Any:
        """One call of a kernel."""
        began = self.clock()
        out = call(*given)
        self.note(name, self.clock() - began)
        self.kernels += 1
        return out


def part_of(name: str) -> str:
    """The part that an operation belongs to."""
    if name in LINEARS:
        return "linears"
    if name in CONVOLUTIONS or name.startswith("lt_conv"):
        return "convolutions"
    return "attention" if name.startswith(ATTENTION) else "between"


def smallest(clock: Callable[[], float]) -> float:
    """Seconds of an operation on one number, watched."""
    watch, one = Watch(clock), torch.ones(1)
    with watch.looking(), torch.no_grad():
        for _ in range(200):
            torch.neg(one)
    return statistics.median(watch.spent["between"])


def split(watch: Watch, seconds: float) -> tuple[Part, ...]:
    """The parts of a run that was watched, and that takes `seconds` when nobody does."""
    least, every = smallest(watch.clock), sum(map(sum, (*watch.spent.values(), *watch.within.values())))
    found = {name: sum(max(0.0, each - least) for each in spent) for name, spent in watch.spent.items()}
    for name, spent in watch.within.items():
        found[name] = found.get(name, 0.0) + sum(spent)
    small = sum(min(each, least) for spent in watch.spent.values() for each in spent)
    found["small"] = small + max(0.0, seconds - every)
    scale = seconds / (sum(found.values()) or 1.0)
    counts = {name: len(watch.spent.get(name, ())) + len(watch.within.get(name, ())) for name in found}
    counts["small"] = watch.blocks + sum(map(len, watch.spent.values()))
    return tuple(Part(name, found[name] * scale, counts[name]) for name in PARTS if found.get(name))
