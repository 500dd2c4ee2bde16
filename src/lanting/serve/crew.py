"""Several orders of one worker, drawn with shared steps: each has its own events, checkpoints, end and way to stop.

Orders that come meanwhile sit down between two steps; the server sends only those that fit (`serve.table`). When the
engine can't share a step, everybody's latents go to his checkpoint, and the drawings go on one by one from there.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lanting.core.checkpoint import Checkpoint
from lanting.core.errors import RequestError
from lanting.core.types import Result
from lanting.serve.worker import Bench, dismiss, fail, finish, now_and_then, request_of, save, saved, stopped

logger = logging.getLogger("lanting.serve")


@dataclass(slots=True)
class Chair:
    """An order at the table; `resume` until the engine has taken it."""

    order: Mapping[str, Any]
    resume: Checkpoint | None

    @property
    def job(self) -> str:
        return self.order["job"]


def draw_together(bench: Bench, order: Mapping[str, Any], room: int) -> None:
    """An order and those that come while it is drawn, at most `room` at a time, until none is left."""
    chairs: dict[Any, Chair] = {}
    with closing(bench.engine.together(forced=order["most"] is not None)) as shared:
        sit(bench, shared, chairs, order)
        while shared.seats and not shared.apart:
            dismiss(bench)
            while len(shared.seats) < room and (new := joining(bench)) is not None:
                sit(bench, shared, chairs, new)
            for seat, event in shared.round():
                hear(bench, shared, chairs, seat, event)
        if shared.apart:
            logger.info("steps are not shared", extra={"reason": shared.apart})
            put_aside(bench, shared, chairs)


def joining(bench: Bench) -> Mapping[str, Any] | None:
    """An order that waits and is not to be drawn alone."""
    job = next((job for job, order in bench.later.items() if order["most"] != 1), None)
    return None if job is None else bench.later.pop(job)


def sit(bench: Bench, shared: Any, chairs: dict[Any, Chair], order: Mapping[str, Any], anew: bool = False) -> None:
    """`anew`: whatever its checkpoint says."""
    resume = None if anew else saved(Path(order["checkpoint"]))
    try:
        bench.hang(order["lora"])
        seat = shared.join(request_of(order), previews=now_and_then(), every=bench.every, resume=resume)
    except Exception as error:
        fail(bench, order["job"], error)
        bench.stops.pop(order["job"], None)
        return
    chairs[seat] = Chair(order, resume)


def hear(bench: Bench, shared: Any, chairs: dict[Any, Chair], seat: Any, event: Any) -> None:
    """One event of one drawing."""
    chair = chairs[seat]
    if isinstance(event, RequestError) and chair.resume is not None:
        Path(chair.order["checkpoint"]).unlink(missing_ok=True)  # of another version of the model: from the start, then
        sit(bench, shared, chairs, chair.order, anew=True)
        return
    if chair.resume is not None and not isinstance(event, Exception):
        bench.send("resumed", job=chair.job, step=chair.resume.step, steps=chair.resume.steps)
        chair.resume = None
    if isinstance(event, Exception):
        fail(bench, chair.job, event)
    elif isinstance(event, Result):
        try:
            finish(bench, chair.order, event, work=round(seat.work, 4))
        except Exception as error:
            fail(bench, chair.job, error)
    elif stopped(bench, chair.order, event):
        shared.leave(seat)
        bench.send("stopped", job=chair.job, why=bench.stops[chair.job])
    else:
        return
    bench.stops.pop(chair.job, None)


def put_aside(bench: Bench, shared: Any, chairs: Mapping[Any, Chair]) -> None:
    """Everybody who is left, to his checkpoint and then alone, before those who came later; no more are sent now."""
    aside: dict[str, Mapping[str, Any]] = {}
    for seat in shared.seats:
        order = chairs[seat].order
        bench.send("room", job=order["job"], room=1)
        if (checkpoint := shared.put_aside(seat)) is not None:
            save(bench, order["job"], Path(order["checkpoint"]), checkpoint)
        aside[order["job"]] = {**order, "most": 1}
    bench.later = aside | bench.later
