"""What training is made of: where batches come from, how often each kind, how long and how hard, and how far it is.

Plain values that `train.loop` reads; presets and feeds know them without knowing the loop.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from lanting.train.replay import Batch, Reader

STOCK = 512  # examples of every kind before the first step


class Source(Protocol):
    """Where batches come from: `replay.Replay` in the trainer itself, `ring.Ring` on a GPU."""

    reader: Reader
    capacity: int

    @property
    def items(self) -> Sequence[Any]: ...

    def add(self, count: int, rng: random.Random) -> None: ...

    def draw(self, count: int, rng: random.Random) -> Batch: ...


@dataclass(frozen=True)
class Course:
    """One kind of batch: where it comes from, how often, how large, and how many examples are new each time.

    A share moves from `early` to `share` over the budget's `turn`.
    """

    name: str
    replay: Source
    share: float
    batch: int
    fresh: int
    early: float

    def due(self, progress: float, turn: tuple[float, float]) -> float:
        """The share at a progress of 0..1."""
        begin, end = turn
        return self.early + (self.share - self.early) * min(1.0, max(0.0, (progress - begin) / (end - begin)))


@dataclass(frozen=True)
class Budget:
    """How long and how hard to train."""

    minutes: float = 94.0  # of training time, summed over resumed runs
    lr: float = 2e-3
    warmup_steps: int = 100
    decay_share: float = 0.35  # last part of the budget, linear to 2 %
    picks: int = 2  # batches per step and process
    what: float = 0.1  # weights of the helper heads
    where: float = 0.1
    ink: float = 0.5
    shape: float = 0.3
    scene: float = 0.3
    shift: float = 3.0  # times are drawn uniformly, then shifted towards noise
    starts: float = 0.33  # share of edits at t = 1: later the noisy target shows where things go, and nothing is learnt
    ema: float = 0.998
    turn: tuple[float, float] = (0.2, 0.5)  # small canvases, where strokes are learnt fastest, give way to large ones
    save_every: float = 120.0  # seconds
    log_every: float = 20.0

    def rate(self, step: int, seconds: float) -> float:
        left = max(0.0, 1 - seconds / (60 * self.minutes))
        decay = min(1.0, left / self.decay_share) * 0.98 + 0.02
        return self.lr * min(1.0, (step + 1) / self.warmup_steps) * decay


@dataclass
class Clock:
    """What a resumed run must continue from."""

    step: int = 0
    seen: int = 0
    seconds: float = 0.0
