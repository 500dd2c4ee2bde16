"""What is known of running jobs and served models just now; all of it can be made again from the ledger."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import Any

from lanting.serve.jobs import Job
from lanting.serve.pace import Pace
from lanting.serve.settings import Served
from lanting.specs import ModelSpec


@dataclass
class Run:
    """A job that is being drawn now."""

    job: Job
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
    """What is known of a served model."""

    served: Served
    spec: ModelSpec | None
    pace: Pace = field(default_factory=Pace)
    ready: bool = False
    refused: str | None = None  # why it can't be opened, in a sentence
    words: list[Any] | None = None  # the same as [template, values]
    loras: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    notes: list[str] = field(default_factory=list[str])
    come: asyncio.Event = field(default_factory=asyncio.Event)  # something waits for this model
    places: tuple[float, dict[str, Place]] = (0.0, {})


def left(run: Run, pace: Pace) -> float | None:
    """Seconds until a job that is being drawn is done, from its own steps once there are some."""
    spent = time.monotonic() - run.began
    if run.step and not run.resumed:
        return max(run.stepped / run.step * (run.steps - run.step) + pace.beside / 2, 0.0)
    whole = pace.seconds(run.job.cost)
    return None if whole is None else max(whole - spent, 0.0)
