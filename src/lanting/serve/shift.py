"""One worker's day: take the next job, have it drawn (`table`), record how it ended (`endings`); start another worker
where one died."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from typing import Any

from lanting.core.lang import say
from lanting.serve.desk import Desk
from lanting.serve.errors import StoreError
from lanting.serve.hand import Hand
from lanting.serve.line import Entry
from lanting.serve.state import Model
from lanting.serve.table import Table
from lanting.specs import Defaults, ModelSpec

TICK = 0.5  # seconds between looks at the clock
logger = logging.getLogger("lanting.serve")


async def work(desk: Desk, model: Model) -> None:
    """Until the server stops."""
    hand = desk.hands[model.served.name] = Hand(desk.settings, model.served)
    table = Table(desk, model, hand)
    wait = 0.5
    try:
        while not desk.stopping or table.places:
            if table.places:
                await table.fill()
                await table.listen(TICK)
                continue
            if not hand.ready:
                wait = 0.5 if await start(desk, model, hand) else min(wait * 2, 30.0)
                if not hand.ready:
                    await asyncio.sleep(wait)
                    continue
            entry = await following(desk, model)
            if entry is not None:
                await table.begin(entry)
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
    """Whether ledger and pictures can be written again."""
    try:
        await desk.ledger.write(
            lambda db: db.execute("INSERT OR REPLACE INTO facts VALUES ('alive', ?)", (time.time(),))
        )
    except StoreError:
        return False
    return await asyncio.to_thread(desk.files.writable)
