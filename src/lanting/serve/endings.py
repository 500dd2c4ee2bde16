"""How a job's turn with a worker ends: done, failed in words, cancelled, or back in the queue with its checkpoint.

Whatever happens to the worker, the jobs it had end up somewhere. One on which workers died three times is reported, not
tried again.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lanting.serve.desk import Desk
from lanting.serve.errors import DrawingError, StoreError, on_record
from lanting.serve.jobs import CANCELLED, DONE, FAILED, Job, put_back
from lanting.serve.line import Entry
from lanting.serve.state import Model, Run

CRASHES = 3
logger = logging.getLogger("lanting.serve")


async def conclude(desk: Desk, model: Model, run: Run, said: Mapping[str, Any], entry: Entry) -> None:
    """Record the end, or put the job back."""
    try:
        if said["is"] == "done" and not run.resumed:
            own = {"denoise": said["work"]} if "work" in said else {}  # of shared steps, its share
            images = said["outcome"]["images"]
            tries = sum(one.get("text", {}).get("tries", 1) for one in images) / max(len(images), 1)
            model.pace.learn(run.job.cost * tries, {**said["outcome"]["seconds"], **own})
        if not await recorded(desk, run, said):
            await interrupted(desk, model, run, entry, bool(said.get("lost")))
    finally:
        desk.runs.pop(run.job.id, None)
        if run.job.id in desk.line.drawing:
            desk.line.finished(run.job.id)


async def recorded(desk: Desk, run: Run, said: Mapping[str, Any]) -> bool:
    """Whether the job has ended; False where it was interrupted."""
    job = run.job
    if said["is"] == "done":
        await desk.close_job(job, DONE, said["outcome"])
    elif run.why == "cancelled":
        await desk.close_job(job, CANCELLED, on_record("cancelled", DrawingError("cancelled")))
    elif run.why == "timeout":
        error = DrawingError(
            "the drawing took longer than {seconds:g} s and was stopped: ask for less", seconds=job.timeout
        )
        await desk.close_job(job, FAILED, on_record("timeout", error))
    elif said["is"] == "failed" and said.get("disk") and not await asyncio.to_thread(desk.files.writable):
        logger.error("no room for a picture", extra={"job": job.id})
        run.why, desk.well = "pause", False  # drawn again when there is room
        return False
    elif said["is"] == "failed":
        await failed(desk, job, said)
    else:
        return False
    return True


async def failed(desk: Desk, job: Job, said: Mapping[str, Any]) -> None:
    """In the engine's words where it could explain itself; in general ones where it could not, with all in the log."""
    extra = {"job": job.id, "kind": said["kind"], "trace": said.get("trace"), "reason": said["sentence"]}
    logger.error("job failed", extra=extra)
    code = "invalid_request" if said["code"] == 2 else "drawing_failed"
    told = on_record(code, DrawingError("something went wrong inside; the server's log has it under {job}", job=job.id))
    if said["sentence"]:
        told |= {"message": said["sentence"], "words": said["words"]}
    await desk.close_job(job, FAILED, told)


async def interrupted(desk: Desk, model: Model, run: Run, entry: Entry, lost: bool) -> None:
    """The server stops, or the worker died: the job goes on later from its checkpoint, or is reported. A worker that
    was `lost` with the machine it was on did not die of a drawing."""
    job, crashed = run.job, run.why != "pause" and not lost
    if lost:
        extra = {"job": job.id, "model": job.model, "worker": number_of(model, run)}
        logger.error("a machine of the cluster is gone", extra=extra)
    if crashed:
        extra = {"job": job.id, "model": job.model, "crashes": job.crashes + 1, "worker": number_of(model, run)}
        logger.error("worker died", extra=extra)
        desk.meters.crashes.labels(job.model).inc()
    if crashed and job.crashes + 1 >= CRASHES:
        error = DrawingError("the engine died {count} times on this drawing: ask for a smaller one", count=CRASHES)
        await desk.close_job(job, FAILED, on_record("drawing_failed", error))
        return
    event = desk.event(job.id, "interrupted", crashed=crashed)
    try:
        await desk.ledger.write(lambda db: put_back(db, event, crashed))
    except StoreError:
        desk.well = False  # its row says "running": it is found again when the server starts, or by the line now
    if run.why == "cancelled":  # while that was written
        await desk.close_job(job, CANCELLED, on_record("cancelled", DrawingError("cancelled")))
        return
    desk.feed.put(event)
    desk.line.returned(replace(entry, alike="") if crashed else entry)  # alone, then: it may be what the worker died of


def number_of(model: Model, run: Run) -> int | None:
    """Which worker had it, where there are several."""
    return run.hand.post.number if run.hand is not None and len(model.hands) > 1 else None
