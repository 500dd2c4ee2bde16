"""Everything a server holds, opened together and closed together: what dialects and the studio are handed.

`open_house` takes the folder (one server has it at a time) and can fail in words; `living` finds what a killed server
left, starts the workers, and at the end lets them finish or put their jobs aside.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sqlite3
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict, dataclass, field

from filelock import FileLock, Timeout

from lanting.core.errors import RequestError
from lanting.serve.desk import Desk
from lanting.serve.errors import StoreError
from lanting.serve.fetch import Limits
from lanting.serve.files import Files, day
from lanting.serve.hand import Hand, processes
from lanting.serve.jobs import (
    DONE,
    RUNNING,
    Event,
    Job,
    dumps,
    end,
    ended_before,
    last_seq,
    put_back,
    remove,
    unfinished,
)
from lanting.serve.keys import Keyring
from lanting.serve.ledger import Ledger
from lanting.serve.meters import Meters
from lanting.serve.pace import Pace
from lanting.serve.pictures import Eyes
from lanting.serve.settings import Settings, check
from lanting.serve.shift import mend, work
from lanting.serve.signing import Signer, secret_of

Hire = Callable[[Settings], Sequence[Hand]]  # who draws: the hands of all workers
PULSE = 0.5  # seconds between news of places
SWEEP = 3600.0  # seconds between sweepings
LAST = 5.0  # seconds that ends may take to be written when the server stops
logger = logging.getLogger("lanting.serve")


@dataclass
class House:
    """One server."""

    settings: Settings
    lock: FileLock
    desk: Desk
    keyring: Keyring
    signer: Signer
    meters: Meters
    eyes: Eyes
    hire: Hire = processes
    tasks: list[asyncio.Task[None]] = field(default_factory=list[asyncio.Task[None]])  # one for each worker
    helpers: list[asyncio.Task[None]] = field(default_factory=list[asyncio.Task[None]])  # cancelled at the end

    @property
    def ready(self) -> bool:
        """It takes jobs, and somebody draws them."""
        desk = self.desk
        return desk.accepting and desk.well and all(model.ready for model in desk.models.values())

    @asynccontextmanager
    async def living(self) -> AsyncIterator[House]:
        await recover(self)
        for hand in self.hire(self.settings):
            model = self.desk.models[hand.post.served.name]
            model.hands.append(hand)
            self.tasks.append(asyncio.create_task(work(self.desk, model, hand)))
        self.helpers += [asyncio.create_task(help_(self.desk)) for help_ in (tell_places, sweep, mend)]
        for task in (*self.tasks, *self.helpers):
            task.add_done_callback(noted)
        try:
            yield self
        finally:
            await self.drain(0.0)
            self.desk.leaving.set()
            for model in self.desk.models.values():
                model.call()
            await asyncio.wait(self.tasks, timeout=15)
            if self.desk.endings:  # they wait for ever where the disk is full; the next server finds those ends
                await asyncio.wait(self.desk.endings, timeout=LAST)
            rest = [*self.tasks, *self.helpers, *self.desk.endings]
            for task in rest:
                task.cancel()
            await asyncio.gather(*rest, return_exceptions=True)
            for model in self.desk.models.values():
                for hand in model.hands:
                    hand.kill()
            await remember(self.desk)
            await self.desk.ledger.close()
            self.lock.release()

    async def drain(self, seconds: float) -> None:
        """Take no more jobs, and let what is being drawn end; what takes longer is put aside and goes on later."""
        desk = self.desk
        desk.accepting = False
        until = time.monotonic() + seconds
        while desk.runs and time.monotonic() < until:
            await asyncio.sleep(0.05)
        for run in list(desk.runs.values()):
            await desk.stop(run, "pause", patience=5.0)
        until = time.monotonic() + 10.0  # an end that can't be written is found in its folder by the next server
        while desk.runs and time.monotonic() < until:
            await asyncio.sleep(0.02)
        for job in desk.feed.watched():
            desk.feed.put(Event(job, int(time.time() * 1000), "stopping"), keep=False)


def open_house(settings: Settings, hire: Hire = processes) -> House:
    """Take the folder and open the queue. Raises RequestError where another server has it, StoreError, OutputError."""
    check(settings)
    files = Files(settings.data)
    lock = FileLock(settings.data / "lock")
    with suppress(OSError):
        settings.data.mkdir(parents=True, exist_ok=True, mode=0o700)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise RequestError(
            "another server uses {folder}: stop it, or give this one its own with --data", folder=settings.data
        ) from None
    except OSError as error:
        raise StoreError(
            "nothing can be written to {folder}: {reason}; choose another place with --data",
            **{"folder": settings.data, "reason": error.strerror or error},
        ) from None
    files.prepare()
    ledger, meters = Ledger(settings.data / "queue.sqlite"), Meters()
    caps = settings.caps
    eyes = Eyes(Limits(caps.fetch_bytes, caps.fetch_seconds) if settings.urls else None)
    desk, signer = Desk(settings, ledger, files, meters), Signer(ledger.at_once(secret_of))
    house = House(settings, lock, desk, Keyring(ledger), signer, meters, eyes, hire)
    if settings.needs_keys and not any(key.revoked is None for key in house.keyring.now()):
        lock.release()
        raise RequestError(
            "others may come, so a key is needed and there is none: run 'lanting keys create NAME' first"
        )
    return house


async def recover(house: House) -> None:
    """What a server that stopped or was killed left: finished folders are finished jobs, the rest waits again."""
    desk, callers = house.desk, await house.keyring.callers()
    jobs = await desk.ledger.read(unfinished)
    for name, model in desk.models.items():
        model.pace = await desk.ledger.read(lambda db, name=name: pace_of(db, name))
    sequence = await desk.ledger.read(lambda db: {job.id: last_seq(db, job.id) for job in jobs})
    desk.sequence.update(sequence)
    await desk.ledger.write(lambda db: settle_all(db, desk, jobs))
    left = await desk.ledger.read(unfinished)
    desk.files.keep_checkpoints({job.id for job in left})
    for job in left:
        desk.enqueue(job, callers[job.owner].share if job.owner in callers else 1.0)
    for job in jobs:
        if job.model not in desk.models:
            logger.warning("job of a model that is not served", extra={"job": job.id, "model": job.model})
    if jobs:
        logger.info("jobs recovered", extra={"finished": len(jobs) - len(left), "waiting": len(left)})


def settle_all(db: sqlite3.Connection, desk: Desk, jobs: Sequence[Job]) -> None:
    """In one transaction."""
    for job in jobs:
        outcome = desk.files.outcome(job.id)
        if outcome is not None:
            body = {"seconds": outcome["seconds"], "images": len(outcome["images"])}
            end(db, desk.event(job.id, DONE, **body), outcome, None)
        elif job.state == RUNNING:
            put_back(db, desk.event(job.id, "interrupted", crashed=False), crashed=False)


def pace_of(db: sqlite3.Connection, name: str) -> Pace:
    """What the last server learnt."""
    row = db.execute("SELECT value FROM facts WHERE name = ?", (f"pace {name}",)).fetchone()
    return Pace() if row is None else Pace(**json.loads(row[0]))


async def remember(desk: Desk) -> None:
    """How fast models are, for the next server."""
    paces = [(f"pace {name}", dumps(asdict(model.pace))) for name, model in desk.models.items()]
    with suppress(StoreError):
        await desk.ledger.write(lambda db: db.executemany("INSERT OR REPLACE INTO facts VALUES (?, ?)", paces))


def noted(task: asyncio.Task[None]) -> None:
    """What goes on as long as the server should not end before, and not without a word."""
    if not task.cancelled() and (error := task.exception()) is not None:
        logger.error("a part of the server has ended: start it anew", exc_info=error)


async def tell_places(desk: Desk) -> None:
    while True:
        await asyncio.sleep(PULSE)
        desk.broadcast()


async def sweep(desk: Desk) -> None:
    """Forget what is older than the server keeps."""
    while True:
        try:
            before = day(desk.settings.keep_days)
            while jobs := await desk.ledger.read(lambda db, before=before: ended_before(db, before)):
                await asyncio.to_thread(desk.files.forget, jobs)  # first: a server killed here finds the rest again
                await desk.ledger.write(lambda db, jobs=jobs: remove(db, jobs))
            used = pictures_of(await desk.ledger.read(unfinished))  # may be older than any limit
            await asyncio.to_thread(desk.files.forget_pictures, before, used)
        except (StoreError, OSError):
            logger.warning("sweeping failed: nothing can be written")
        await asyncio.sleep(SWEEP)


def pictures_of(jobs: Sequence[Job]) -> set[str]:
    """The hashes of what they were sent with."""
    asked = [job.asked["request"] for job in jobs]
    return {one["sha256"] for request in asked for one in (*request["images"], request["mask"]) if one is not None}
