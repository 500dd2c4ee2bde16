"""One worker's day: take the next job, have it drawn, record how it ended; start another worker where one died.

Whatever happens to the worker, the job it had ends up somewhere: done, failed in words, cancelled, or back in the queue
with its checkpoint. A job on which workers died three times is reported, not tried again.
"""

from __future__ import annotations

import asyncio
import base64
import logging
import time
from collections.abc import Mapping
from typing import Any

from lanting.core.lang import say
from lanting.serve.desk import Desk
from lanting.serve.errors import DrawingError, StoreError, on_record
from lanting.serve.hand import Hand
from lanting.serve.jobs import CANCELLED, DONE, FAILED, Job, begin, find, put_back
from lanting.serve.line import Entry
from lanting.serve.state import Model, Run
from lanting.specs import Defaults, ModelSpec

CRASHES = 3
TICK = 0.5  # seconds between looks at the clock
PATIENCE = 30.0  # seconds a worker has to stop before it is killed
logger = logging.getLogger("lanting.serve")


async def work(desk: Desk, model: Model) -> None:
    """Until the server stops."""
    hand = Hand(desk.settings, model.served)
    desk.hands[model.served.name] = hand
    wait = 0.5
    try:
        while not desk.stopping:
            if not hand.ready:
                wait = 0.5 if await start(desk, model, hand) else min(wait * 2, 30.0)
                if not hand.ready:
                    await asyncio.sleep(wait)
                    continue
            entry = await following(desk, model)
            if entry is not None:
                await handle(desk, model, hand, entry)
    finally:
        model.ready = False
        await hand.close()


async def start(desk: Desk, model: Model, hand: Hand) -> bool:
    """A worker with its engine open; what it says of itself is kept."""
    said = await hand.start()
    model.ready = hand.ready
    if said["is"] == "ready":
        model.spec, model.refused, model.words = spec_of(said["spec"]), None, None
        model.loras, model.notes = list(said["loras"]), list(said["notes"])
        logger.info("worker ready", extra={"model": model.served.name, "notes": model.notes or None})
        return True
    model.refused = said.get("sentence") or say("the worker ended before it was ready; its log says why")
    model.words = said.get("words")
    logger.error("worker not ready", extra={"model": model.served.name, "reason": model.refused})
    desk.meters.crashes.labels(model.served.name).inc()
    return False


def spec_of(table: Mapping[str, Any]) -> ModelSpec:
    """A release as `dataclasses.asdict` and JSON left it."""
    own = dict(table["defaults"])
    own |= {"size": tuple(own["size"]), "sizes": {name: tuple(size) for name, size in own["sizes"].items()}}
    return ModelSpec(**{**table, "tasks": tuple(table["tasks"]), "defaults": Defaults(**own)})


async def following(desk: Desk, model: Model) -> Entry | None:
    """The next job; None now and then while there is none, and when no more are to be begun."""
    if desk.accepting and desk.well and (entry := desk.line.take(model.served.name, time.time())) is not None:
        return entry
    model.come.clear()
    try:
        await asyncio.wait_for(model.come.wait(), TICK)
    except TimeoutError:
        desk.well = desk.well or await healthy(desk)
    return None


async def healthy(desk: Desk) -> bool:
    """Whether the ledger can be written again."""
    try:
        await desk.ledger.write(
            lambda db: db.execute("INSERT OR REPLACE INTO facts VALUES ('alive', ?)", (time.time(),))
        )
    except StoreError:
        return False
    return True


async def handle(desk: Desk, model: Model, hand: Hand, entry: Entry) -> None:
    """Draw one job, unless a killed server finished it already.

    Its beginning is written when there is a commit anyway: a server that forgets it draws a waiting job, and that is
    right. Its end is written while the next job is drawn.
    """
    try:
        job = await desk.ledger.read(lambda db: find(db, entry.id))
    except StoreError:
        desk.well = False
        desk.line.returned(entry)
        return
    if job is None or job.over:
        desk.line.finished(entry.id)
        return
    if (outcome := desk.files.outcome(job.id)) is not None:
        await desk.close_job(job, DONE, outcome)
        desk.line.finished(job.id)
        return
    event = desk.event(job.id, "started")
    desk.ledger.later(lambda db: begin(db, event))
    desk.feed.put(event)
    desk.meters.waited.observe(max(event.at - job.created, 0.0))
    run = desk.runs[job.id] = Run(job, deadline=time.monotonic() + job.timeout)
    said = await drawn(desk, hand, run)
    ending = asyncio.create_task(conclude(desk, model, run, said, entry))
    desk.endings.add(ending)
    ending.add_done_callback(desk.endings.discard)
    if said["is"] != "done":
        await ending


async def drawn(desk: Desk, hand: Hand, run: Run) -> Mapping[str, Any]:
    """The worker's last word on a job; meanwhile its steps are told, and the clock is watched."""
    await hand.send(order_for(desk, run.job))
    hearing: asyncio.Task[Mapping[str, Any]] | None = None
    while True:
        hearing = hearing or asyncio.create_task(hand.hear())
        await asyncio.wait({hearing}, timeout=TICK)
        if hearing.done():
            said, hearing = hearing.result(), None
            if said["is"] in ("done", "failed", "stopped", "dead"):
                return said
            note(desk, run, said)
        if time.monotonic() > run.deadline:
            if run.why is None:
                await desk.stop(run, "timeout", PATIENCE)
            else:
                hand.kill()
                run.deadline = float("inf")


def order_for(desk: Desk, job: Job) -> dict[str, Any]:
    request, files = job.asked["request"], desk.files
    return {
        "do": "draw",
        "job": job.id,
        "request": request,
        "lora": job.asked["lora"],
        "pictures": [str(files.picture(one["sha256"])) for one in request["images"]],
        "mask": None if request["mask"] is None else str(files.picture(request["mask"]["sha256"])),
        "checkpoint": str(files.checkpoint(job.id)),
        "results": str(files.results / job.id),
    }


def note(desk: Desk, run: Run, said: Mapping[str, Any]) -> None:
    """What happens on the way, to the log and to who watches."""
    job = run.job.id
    if said["is"] != "progress":
        run.resumed = run.resumed or said["is"] == "resumed"
        desk.tell(job, said["is"], step=said["step"], steps=said["steps"])
        return
    if said["phase"] != "denoise":
        desk.tell(job, "phase", phase=said["phase"], seconds=said["seconds"])
        return
    spent = said["seconds"] - (run.stepped if run.step else 0.0)
    run.step, run.steps, run.stepped = said["step"], said["steps"], said["seconds"]
    desk.meters.step.observe(max(spent, 0.0))
    if said["preview"]:
        run.preview = base64.b64decode(said["preview"])
    desk.tell(job, "step", run.preview, step=run.step, steps=run.steps, seconds=run.stepped)


async def conclude(desk: Desk, model: Model, run: Run, said: Mapping[str, Any], entry: Entry) -> None:
    """Record the end, or put the job back."""
    try:
        if said["is"] == "done" and not run.resumed:
            model.pace.learn(run.job.cost, said["outcome"]["seconds"])
        if not await recorded(desk, run, said):
            await interrupted(desk, model, run, entry)
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


async def interrupted(desk: Desk, model: Model, run: Run, entry: Entry) -> None:
    """The server stops, or the worker died: the job goes on later from its checkpoint, or is reported."""
    job, crashed = run.job, run.why != "pause"
    if crashed:
        logger.error("worker died", extra={"job": job.id, "model": job.model, "crashes": job.crashes + 1})
        desk.meters.crashes.labels(job.model).inc()
        model.ready = False
    if crashed and job.crashes + 1 >= CRASHES:
        error = DrawingError("the engine died {count} times on this drawing: ask for a smaller one", count=CRASHES)
        await desk.close_job(job, FAILED, on_record("drawing_failed", error))
        return
    event = desk.event(job.id, "interrupted", crashed=crashed)
    try:
        await desk.ledger.write(lambda db: put_back(db, event, crashed))
    except StoreError:
        desk.well = False  # its row says "running": it is found again when the server starts, or by the line now
    desk.feed.put(event)
    desk.line.returned(entry)
