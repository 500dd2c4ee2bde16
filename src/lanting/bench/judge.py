"""A measurement beside its limit: percent, and what held it back."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from lanting.bench.limits import Limits
from lanting.bench.subject import Subject, Times
from lanting.bench.watch import Part, Watch, split
from lanting.bench.work import Work

NEAR = 0.75  # of the limit: from here on the limit itself is what holds back


@dataclass(frozen=True, slots=True)
class Loss:
    """One part of a run: its seconds, those it would take at the limit, and what `type` it multiplies ("" where it
    should take none at all)."""

    part: str
    type: str
    seconds: float
    limit: float
    calls: int

    @property
    def lost(self) -> float:
        return max(0.0, self.seconds - self.limit)


@dataclass(frozen=True, slots=True)
class Row:
    """A case, measured. `form` is what its weights are held in, `by` "kernels" where those took part, else "torch";
    `limit` seconds are the least that `bound` ("memory", or a type of number) allows."""

    group: str
    name: str
    form: str
    by: str
    times: Times
    work: Work
    limit: float
    bound: str
    losses: tuple[Loss, ...]

    @property
    def seconds(self) -> float:
        """Of the fastest run."""
        return self.times.best

    @property
    def percent(self) -> float:
        """Of the limit."""
        return 100 * self.limit / self.seconds

    @property
    def rate(self) -> float:
        """Operations a second."""
        return self.work.operations / self.seconds

    def worst(self) -> list[Loss]:
        """What lost most, the most first; a second one where it lost at least half as much."""
        order = sorted((loss for loss in self.losses if loss.lost), key=lambda loss: -loss.lost)
        return [loss for loss in order[:2] if loss.lost >= order[0].lost / 2]

    @property
    def near(self) -> bool:
        return self.percent >= 100 * NEAR or not any(loss.lost for loss in self.losses)

    def to_dict(self) -> dict[str, Any]:
        """For programs."""
        return {
            "group": self.group,
            "name": self.name,
            "form": self.form,
            "by": self.by,
            "seconds": self.seconds,
            "median_seconds": self.times.median,
            "runs": self.times.runs,
            "operations": self.work.operations,
            "operations_per_second": self.rate,
            "bytes": self.work.bytes,
            "limit_seconds": self.limit,
            "bound": self.bound,
            "percent": self.percent,
            "held_back_by": [self.bound] if self.near else [loss.part for loss in self.worst()],
            "parts": [asdict(loss) for loss in self.losses],
        }


def limit_of(work: Work, limits: Limits) -> tuple[float, str]:
    """(the least seconds, what sets them): operations at each type's best rate, or bytes at the memory's."""
    by_type: dict[str, float] = {}
    for share in work.shares:
        by_type[share.type] = by_type.get(share.type, 0.0) + share.operations / limits.operations(share.type)
    computing, moving = sum(by_type.values()), work.bytes / limits.bandwidth
    return (moving, "memory") if moving > computing else (computing, max(by_type, key=lambda name: by_type[name]))


def judge(case: tuple[str, str], subject: Subject, times: Times, watch: Watch, limits: Limits) -> Row:
    """`case` is the group and the name."""
    work = subject.work
    limit, bound = limit_of(work, limits)
    losses = tuple(loss_of(part, work, limits) for part in split(watch, times.best))
    by = "kernels" if watch.kernels else "torch"
    return Row(*case, subject.form, by, times, work, limit, bound, losses)


def loss_of(part: Part, work: Work, limits: Limits) -> Loss:
    """A part beside what it would take at best; products also read the weights."""
    shares = [share for share in work.shares if share.part == part.name]
    if not shares:
        return Loss(part.name, "", part.seconds, 0.0, part.calls)
    limit, bound = limit_of(Work(tuple(shares)), limits)
    if part.name in ("linears", "convolutions"):
        limit = max(limit, work.bytes / limits.bandwidth)
    return Loss(part.name, bound, part.seconds, limit, part.calls)
