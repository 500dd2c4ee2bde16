"""One worker's day: take the next job, have it drawn (`table`), record how it ended (`endings`); start another worker
where one died. Workers of a model take from one line, and none knows of the others."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Coroutine, Mapping
from contextlib import suppress
from typing import Any, TypeVar

from lanting.core.lang import say
from lanting.serve.desk import Desk
from lanting.serve.errors import StoreError
from lanting.serve.hand import Hand
from lanting.serve.line import Entry
from lanting.serve.state import Model
from lanting.serve.table import Table
from lanting.specs import Defaults, ModelSpec

TICK = 0.5  # seconds between looks at the clock
T = TypeVar("T")
logger = logging.getLogger("lanting.serve")


async def work(desk: Desk, model: Model, hand: Hand) -> None:
    """Until the server stops."""
    table = Table(desk, model, hand)
    wait = 0.5
    try:
        while not desk.leaving.is_set() or table.places:
            if table.places:
                await table.fill()
                await table.listen(TICK)
                continue
            if not hand.ready:
                wait = 0.5 if await start(desk, model, hand) else min(wait * 2, 30.0)
                if not hand.ready:
                    await until_leaving(desk, asyncio.sleep(wait))
                    continue
            entry = await following(desk, model, hand)
            if entry is not None:
                await table.begin(entry)
    finally:
        hand.told = {}
        await hand.close()


async def start(desk: Desk, model: Model, hand: Hand) -> bool:
    """A worker with its engine open; what it says of itself is kept."""
    said = await until_leaving(desk, hand.start())
    if said is None:
        return False
    extra = {"model": model.served.name, "worker": hand.post.number if len(model.hands) > 1 else None}
    extra["where"] = said.get("where")
    if said["is"] == "ready":
        model.spec, hand.refused, hand.words = spec_of(said["spec"]), None, None
        model.loras, model.notes, model.reads = list(said["loras"]), list(said["notes"]), bool(said.get("reads"))
        logger.info("worker ready", extra={**extra, "notes": model.notes or None})
        return True
    hand.refused = said.get("sentence") or say("the worker ended before it was ready; its log says why")
    hand.words = said.get("words")
    logger.error("worker not ready", extra={**extra, "reason": hand.refused})
    desk.meters.crashes.labels(model.served.name).inc()
    return False


async def until_leaving(desk: Desk, doing: Coroutine[Any, Any, T]) -> T | None:
    """What it comes to; None where the server stops before: nobody waits then for a model to be loaded."""
    task, leaving = asyncio.create_task(doing), asyncio.create_task(desk.leaving.wait())
    try:
        await asyncio.wait({task, leaving}, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        leaving.cancel()
        if not task.done():
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task


def spec_of(table: Mapping[str, Any]) -> ModelSpec:
    """A release as `dataclasses.asdict` and JSON left it."""
    own = dict(table["defaults"])
    own |= {"size": tuple(own["size"]), "sizes": {name: tuple(size) for name, size in own["sizes"].items()}}
    return ModelSpec(**{**table, "tasks": tuple(table["tasks"]), "defaults": Defaults(**own)})


async def following(desk: Desk, model: Model, hand: Hand) -> Entry | None:
    """The next job; None now and then while there is none, and when no more are to be begun."""
    hand.idle = False
    if desk.accepting and desk.well and (entry := desk.line.take(model.served.name, time.time())) is not None:
        return entry
    hand.come.clear()
    hand.idle = True
    with suppress(TimeoutError):
        await asyncio.wait_for(hand.come.wait(), TICK)
    return None


async def mend(desk: Desk) -> None:
    """Where something could not be written: look whether it can be again."""
    while True:
        await asyncio.sleep(TICK)
        if not desk.well:
            desk.well = await healthy(desk)


async def healthy(desk: Desk) -> bool:
    """Whether ledger and pictures can be written again."""
    try:
        await desk.ledger.write(
            lambda db: db.execute("INSERT OR REPLACE INTO facts VALUES ('alive', ?)", (time.time(),))
        )
    except StoreError:
        return False
    return await asyncio.to_thread(desk.files.writable)
