"""What is known of running jobs and served models just now; all of it can be made again from the ledger."""

from __future__ import annotations

import heapq
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lanting.serve.jobs import Job
from lanting.serve.pace import Pace
from lanting.serve.settings import Served
from lanting.specs import ModelSpec

if TYPE_CHECKING:
    from lanting.serve.hand import Hand


@dataclass
class Run:
    """A job that is being drawn now."""

    job: Job
    hand: Hand | None = None  # of the worker that draws it
    began: float = field(default_factory=time.monotonic)
    why: str | None = None  # it is to stop: "cancelled", "timeout", "pause"
    deadline: float = 0.0  # monotonic; then it is stopped, or killed where it was to stop already
    step: int = 0
    steps: int = 0
    stepped: float = 0.0  # seconds of drawing until this step
    preview: bytes | None = None
    resumed: bool = False


@dataclass(frozen=True, slots=True)
class Place:
    """Where a job stands: `ahead` others come first (0: it is being drawn), of `waiting`; seconds until it is done."""

    ahead: int
    waiting: int
    eta: float | None


@dataclass
class Model:
    """What is known of a served model. Its workers may stand differently; it can draw as soon as one of them can."""

    served: Served
    spec: ModelSpec | None
    pace: Pace = field(default_factory=Pace)
    hands: list[Hand] = field(default_factory=list["Hand"])  # of its workers
    loras: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    notes: list[str] = field(default_factory=list[str])
    reads: bool | None = None  # its workers can read pictures back; None: none has said so yet
    places: tuple[float, int, dict[str, Place]] = (0.0, 0, {})  # when they were computed, `Line.moved` then

    @property
    def workers(self) -> int:
        """How many can draw."""
        return sum(hand.ready for hand in self.hands)

    @property
    def waits(self) -> int:
        """How many workers wait for room in a cluster."""
        return sum(hand.waits for hand in self.hands)

    @property
    def ready(self) -> bool:
        return self.workers > 0

    @property
    def crew(self) -> dict[str, int]:
        """As whoever watches the server is told it."""
        told = {"count": len(self.hands), "ready": self.workers, "waiting for the cluster": self.waits}
        told["refused"] = sum(hand.refused is not None for hand in self.hands)
        return {name: count for name, count in told.items() if count or name in ("count", "ready")}

    @property
    def refused(self) -> str | None:
        """Why it can't be opened, in a sentence; None while a worker can open it, or may yet."""
        return self.hands[0].refused if self.hands and all(hand.refused for hand in self.hands) else None

    @property
    def words(self) -> list[Any] | None:
        """The same as [template, values]."""
        return self.hands[0].words if self.refused else None

    def call(self) -> None:
        """Something waits for this model: whichever worker looks first has it."""
        for hand in self.hands:
            hand.come.set()


def left(run: Run, pace: Pace) -> float | None:
    """Seconds until a job that is being drawn is done, from its own steps once there are some."""
    spent = time.monotonic() - run.began
    if run.step and not run.resumed:
        return max(run.stepped / run.step * (run.steps - run.step) + pace.beside / 2, 0.0)
    whole = pace.seconds(run.job.cost)
    return None if whole is None else max(whole - spent, 0.0)


def ends(costs: Sequence[float], model: Model, runs: Sequence[Run]) -> list[float | None]:
    """Seconds until jobs that wait in this order are done: each begins with the worker that has an end first. Of
    several that one worker draws together each takes the longer for the others: what is left is their mean."""
    pace, rests = model.pace, defaultdict[int, list[float]](list)
    for run in runs:
        rests[id(run.hand)].append(left(run, pace) or 0.0)
    free = [sum(each) / len(each) for each in rests.values()]
    free += [0.0] * max(model.workers - len(free), 0 if free else 1)
    heapq.heapify(free)
    found: list[float | None] = []
    for cost in costs:
        own = pace.seconds(cost)
        found.append(None if own is None else heapq.heapreplace(free, free[0] + own) + own)
    return found
