"""Something that can be timed: its work, how it is run, and how it is watched.

On one thread the clock is the processor's own, which other programs hardly disturb; on several it is the wall's.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from lanting.bench.watch import Watch
from lanting.bench.work import Work

Clock = Callable[[], float]
MOST = 100  # runs


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds of the fastest run, of the middle one, and how many there were."""

    best: float
    median: float
    runs: int


@dataclass(frozen=True)
class Subject:
    """`call` does the work once; what holds its numbers is `form`. Where its seconds are not those of the whole call,
    as of a step of a picture, it reads the clock that it is given and returns them; `look` then watches that part."""

    form: str
    work: Work
    call: Callable[[Clock], object]
    look: Callable[[Watch], object] | None = None
    close: Callable[[], object] = lambda: None

    def run(self, clock: Clock) -> float:
        """Seconds."""
        began = clock()
        with torch.no_grad():
            told = self.call(clock)
        return told if isinstance(told, float) else clock() - began

    def watched(self, watch: Watch) -> None:
        """Once more, slower."""
        if self.look is not None:
            self.look(watch)
            return
        with torch.no_grad(), watch.looking():
            self.call(watch.clock)

    def times(self, clock: Clock, least: int, seconds: float) -> Times:
        """After a run that doesn't count, at least `least` runs and so many seconds of them."""
        self.run(clock)
        found: list[float] = []
        while len(found) < least or (sum(found) < seconds and len(found) < MOST):
            found.append(self.run(clock))
        return Times(min(found), statistics.median(found), len(found))


def clock_for(threads: int) -> Clock:
    """The clock for work on so many threads."""
    return time.process_time if threads == 1 else time.perf_counter
