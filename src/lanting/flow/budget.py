"""How a budget of error is spent on steps: arithmetic on a few numbers, without a model.

An error is the length of what a velocity is off by, relative to the velocity. A picture is its noise minus the sum of
width times velocity over all steps, so a step's error counts by the step's width in sigma. What is not computed can't
be measured; it is forecast from what the same saving would have cost where everything was computed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from lanting.core.quality import FIRST, Quality

STEEPEST = 2.0  # how many times faster than last time an error may be expected to grow


class Forecast:
    """The error of a saving, in proportion to a lever: a distance in sigma, or a change that was seen."""

    def __init__(self) -> None:
        self.rate: float | None = None  # error per lever, the last time it was measured
        self.before: float | None = None  # and the time before

    def learn(self, error: float, lever: float) -> None:
        """What the saving would have cost here. Something that is not finite is never trusted again."""
        if lever > 0:
            self.before, self.rate = self.rate, error / lever if math.isfinite(error) else math.inf

    def expected(self, lever: float) -> float:
        """Infinite until it was measured once. An error that has grown is expected to go on growing as it did."""
        if self.rate is None:
            return math.inf
        growth = self.rate / self.before if self.before else 1.0
        return self.rate * lever * min(max(growth, 1.0), STEEPEST) if self.rate < math.inf else math.inf


class Budget:
    """What may be left out, step by step: no step beyond `quality.step`, and in each no more than its share of
    `quality.mean` plus what earlier steps have left.

    sigmas  the schedule, steps + 1 falling numbers
    """

    def __init__(self, quality: Quality, sigmas: Sequence[float]):
        self.quality = quality
        self.widths = [a - b for a, b in pairwise(sigmas)]
        self.closed = 0.0  # spent by the steps before this one
        self.index = -1
        self.error = 0.0  # expected of this step

    def begin(self) -> None:
        """The next step."""
        self.closed, self.error, self.index = self.spent, 0.0, self.index + 1

    def may(self, error: float, age: int = 1) -> bool:
        """Whether this step affords so much more error, by using what is `age` steps old; if so, it is spent."""
        wanted = self.error + error
        due = self.quality.mean * sum(self.widths[: self.index + 1])
        affordable = self.closed + self.widths[self.index] * wanted <= due
        if (
            self.quality.exact
            or self.index < FIRST
            or age > self.quality.age
            or wanted > self.quality.step
            or not affordable
        ):
            return False
        self.error = wanted
        return True

    @property
    def spent(self) -> float:
        """The sum of width times error so far, this step included: what the latents may be off by."""
        return self.closed + (self.widths[self.index] * self.error if self.index >= 0 else 0.0)
