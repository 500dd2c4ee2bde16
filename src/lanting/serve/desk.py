"""The one interface below all dialects: submit, watch, cancel, look up. It knows the queue, not HTTP and no engine.

Everything runs on one event loop, so plain dictionaries need no locks; whatever blocks is in threads (`Ledger`, hashing
of pictures) or in the workers' processes (`shift`). What is only in memory here can be made again from the ledger.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import AsyncGenerator, Coroutine, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from lanting.serve.errors import (
    BusyError,
    ClosedError,
    ConflictError,
    DrawingError,
    MissingError,
    StoreError,
    UnknownModelError,
    as_told,
    on_record,
)
from lanting.serve.feed import Feed
from lanting.serve.files import ID, Files
from lanting.serve.intake import Order, Prepared, prepare, store_pictures, with_timeout
from lanting.serve.jobs import (
    CANCELLED,
    DONE,
    Caller,
    Event,
    Job,
    Search,
    end,
    events_after,
    find,
    history,
    insert,
    log,
)
from lanting.serve.ledger import Ledger
from lanting.serve.line import Entry, Line
from lanting.serve.loras import check_names
from lanting.serve.settings import Settings
from lanting.serve.state import Model, Place, Run, ends, left
from lanting.specs import get_spec, spec_names

if TYPE_CHECKING:
    from lanting.serve.meters import Meters

T = TypeVar("T")
FRESH = 0.2  # seconds that computed places are good for, where nobody began or ended meanwhile
logger = logging.getLogger("lanting.serve")


class Desk:
    """Jobs of all clients. `serve.shift` takes them from here and tells back."""

    def __init__(self, settings: Settings, ledger: Ledger, files: Files, meters: Meters) -> None:
        self.settings, self.ledger, self.files, self.meters = settings, ledger, files, meters
        self.line, self.feed = Line(), Feed()
        self.runs: dict[str, Run] = {}
        self.models = {
            one.name: Model(one, get_spec(one.model) if one.model in spec_names() else None) for one in settings.models
        }
        self.accepting, self.leaving = True, asyncio.Event()
        self.coming: Counter[str] = Counter()  # owner -> jobs that are being written
        self.sequence: dict[str, int] = {}
        self.endings: set[asyncio.Task[Any]] = set()  # what is being written
        self.told: dict[str, int] = {}  # waiting job -> how many are ahead, as its watchers know it
        self.well = True  # the last write went through

    # ---------------------------------------------------------------- submit
    async def submit(self, order: Order, caller: Caller) -> Job:
        """The accepted job, on the disk when this returns; the earlier one where its idempotency key is known.

        Raises LantingError: a wrong value, a full queue (429), a server that starts or stops (503), a full disk (503).
        """
        model = self.model(order.model)
        if not self.accepting:
            raise ClosedError("the server is stopping: try again in a moment")
        if model.refused:
            raise self.why_not(model)
        if model.spec is None:
            raise ClosedError("the model is being loaded: try again in a moment")
        with self._seat(caller, model):
            if order.request.images:
                prepared = await asyncio.to_thread(self._prepare, order, model, caller)
            else:
                prepared = self._prepare(order, model, caller)
            return await self.surely(self._accept(prepared, order, caller))

    async def surely(self, work: Coroutine[Any, Any, T]) -> T:
        """What must not be left half-done where its client leaves: in the ledger and not in the line, say."""
        task = asyncio.create_task(work)
        self.endings.add(task)
        task.add_done_callback(self.endings.discard)
        return await asyncio.shield(task)

    def _prepare(self, order: Order, model: Model, caller: Caller) -> Prepared:
        assert model.spec is not None
        if order.request.tries is not None and model.reads is False:
            from lanting.reading import missing

            raise missing()
        if model.ready:
            check_names(order.lora, [one["name"] for one in model.loras])
        prepared = prepare(order, model.spec, model.served.name, caller, self.settings)
        store_pictures(order.request, prepared.job.asked["request"], self.files)
        return replace(prepared, job=with_timeout(prepared.job, self.settings.timeout))

    async def _accept(self, prepared: Prepared, order: Order, caller: Caller) -> Job:
        job = prepared.job
        once = None if order.once is None else (order.once, prepared.digest)
        event = self.event(job.id, "accepted", model=job.model, dialect=job.dialect)
        try:
            known = await self.ledger.write(lambda db: insert(db, job, event, once))
        except StoreError:
            self.sequence.pop(job.id, None)
            raise
        except KeyError:
            self.sequence.pop(job.id, None)
            raise ConflictError(
                "this idempotency key was used for another request: send a new key, or the same request"
            ) from None
        if known != job.id:
            self.sequence.pop(job.id, None)
            return await self.job(known, caller)
        self.feed.put(event)
        self.enqueue(job, caller.share)
        self.meters.accepted.labels(job.dialect).inc()
        logger.info("job accepted", extra={"job": job.id, "owner": job.owner, "dialect": job.dialect})
        return job

    @contextmanager
    def _seat(self, caller: Caller, model: Model) -> Iterator[None]:
        """A place in the queue, held while the job is written. Raises BusyError."""
        most, held = self.settings.caps.waiting, sum(self.coming.values()) + len(self.line)
        own = self.coming[caller.id] + self.line.held_by(caller.id)
        if held < most and (own < max(most // 2, 1) or not self.settings.needs_keys):
            self.coming[caller.id] += 1
            try:
                yield
            except StoreError:
                self.well = False
                raise
            finally:
                self.coming[caller.id] -= 1
            return
        error = BusyError("the queue is full: {count} jobs wait; try again in a moment", count=held)
        one = model.pace.seconds(sum(entry.cost for entry in self.line.waiting.values()) / max(len(self.line), 1))
        error.retry_after = min(max((one or 1.0) / max(model.workers, 1), 1.0), 300.0)
        self.meters.refused.inc()
        raise error

    def enqueue(self, job: Job, share: float) -> None:
        alike = "" if job.crashes else str(job.asked.get("alike", ""))  # a worker died of it, or beside it: alone, then
        own = (job.id, job.owner, job.model, job.priority, job.created, job.cost)
        self.line.add(Entry(*own, share, alike, job.timeout))
        if job.model in self.models:
            self.models[job.model].call()

    # ---------------------------------------------------------------- look up
    def model(self, name: str | None) -> Model:
        served = self.settings.model(name)
        if served is None:
            known = ", ".join(self.models)
            raise UnknownModelError("no model is called {name} here; there are: {known}", name=name, known=known)
        return self.models[served.name]

    def why_not(self, model: Model) -> ClosedError:
        """Why a model can't be used. The engine's words may name folders, so only this computer hears them."""
        if self.settings.needs_keys or model.refused is None:
            return ClosedError("the model {name} can't be opened; the server's log says why", name=model.served.name)
        sentence, values = model.words or (model.refused, {})
        return ClosedError(sentence, **values)

    async def job(self, id_: str, caller: Caller) -> Job:
        """Raises MissingError, also for somebody else's."""
        job = await self.ledger.read(lambda db: find(db, id_)) if ID.fullmatch(id_) else None
        if job is None or job.owner != caller.id:
            raise MissingError("there is no job {id}", id=repr(id_[:40]))
        return job

    async def history(self, search: Search) -> list[Job]:
        return await self.ledger.read(lambda db: history(db, search))

    def place(self, job: Job) -> Place | None:
        """None for a job that has ended. A little old where many wait, and the last one for whom has just come."""
        if job.over:
            return None
        if (place := self.places(job.model).get(job.id)) is not None:
            return place
        waiting = sum(entry.model == job.model for entry in self.line.waiting.values())
        drawn = sum(entry.model == job.model for entry in self.line.drawing.values())
        return Place(max(drawn + waiting - 1, 0), waiting, None)

    def places(self, name: str) -> dict[str, Place]:
        """Of every unfinished job of a model."""
        model = self.models.get(name)
        if model is None:
            return {}
        at, moved, places = model.places
        if moved != self.line.moved or time.monotonic() - at > FRESH:
            places = self._places(model)
            model.places = (time.monotonic(), self.line.moved, places)
        return places

    def _places(self, model: Model) -> dict[str, Place]:
        waiting = [*self.line.order(model.served.name, time.time())]
        drawn = [entry.id for entry in self.line.drawing.values() if entry.model == model.served.name]
        runs = {id_: self.runs[id_] for id_ in drawn if id_ in self.runs}  # a worker is about to take the others
        etas = ends([entry.cost for entry in waiting], model, [*runs.values()])
        places = {id_: Place(0, len(waiting), left(runs[id_], model.pace) if id_ in runs else None) for id_ in drawn}
        for index, (entry, eta) in enumerate(zip(waiting, etas, strict=True)):
            places[entry.id] = Place(len(drawn) + index, len(waiting), eta)
        return places

    # ---------------------------------------------------------------- watch
    def event(self, job: str, kind: str, preview: bytes | None = None, **body: Any) -> Event:
        """The next event of a job; its number is above all before it, also of a server that was killed."""
        seq = max(self.sequence.get(job, 0) + 1, int(time.time() * 1000))
        self.sequence[job] = seq
        return Event(job, seq, kind, body, preview)

    def tell(self, job: str, kind: str, preview: bytes | None = None, **body: Any) -> None:
        """Something that happened on the way: to watchers now, to the ledger with the next commit."""
        event = self.event(job, kind, preview, **body)
        self.feed.put(event)
        self.ledger.later(lambda db: log(db, event))

    async def watch(self, id_: str, caller: Caller, after: int = 0) -> AsyncGenerator[Event]:
        """Every event of a job after number `after`, then those to come; ends with the job, or when the server stops.

        Raises MissingError at the first `anext`.
        """
        await self.job(id_, caller)
        with self.feed.reader(id_) as reader:
            new = [event for event in self.feed.said(id_) if event.seq > after]  # before the ledger: it grows meanwhile
            old = await self.ledger.read(lambda db: events_after(db, id_, after))
            known = {event.seq: event for event in (*old, *new)}  # the ledger keeps no preview
            for _, event in sorted(known.items()):
                after = event.seq
                yield event
                if event.last:
                    return
            while True:
                event = await reader.get()
                if event.seq > after:
                    yield event
                if event.last or event.kind == "stopping":
                    return

    async def wait(self, id_: str, caller: Caller) -> Job:
        """The job when it has ended, or as it is when the server stops before."""
        async for event in self.watch(id_, caller):
            if event.last:
                break
        return await self.job(id_, caller)

    # ---------------------------------------------------------------- cancel
    async def cancel(self, id_: str, caller: Caller) -> Job:
        """The job, cancelled or about to be; one that has ended stays as it ended."""
        job = await self.job(id_, caller)
        if not job.over:
            await self.surely(self._cancel(job))
        return await self.job(id_, caller)

    async def _cancel(self, job: Job) -> None:
        if (entry := self.line.remove(job.id)) is not None:
            try:
                await self.close_job(job, CANCELLED, on_record("cancelled", DrawingError("cancelled")), tries=1)
            except StoreError:
                self.line.add(entry)
                raise
            return
        while job.id in self.line.drawing and job.id not in self.runs:  # a worker is just about to take it
            await asyncio.sleep(0.01)
        if (run := self.runs.get(job.id)) is not None:
            await self.stop(run, "cancelled")

    async def stop(self, run: Run, why: str, patience: float = 30.0) -> None:
        """Ask the worker to stop a job within a step; it is killed where it does not. Who cancels what is being put
        aside does not want it back; the server, which stops, waits no longer for that."""
        if run.why is None or (run.why, why) == ("pause", "cancelled"):
            until = time.monotonic() + patience
            run.why, run.deadline = why, until if run.why is None else min(until, run.deadline)
            if run.hand is not None:
                await run.hand.send({"do": "stop", "job": run.job.id, "why": why})

    async def close_job(self, job: Job, state: str, told: Mapping[str, Any], tries: int | None = None) -> None:
        """Record how a job ended, and tell who watches.

        told   its outcome where it is done, else what `on_record` made of the error
        tries  None: wait while the disk is full, because an end must not be lost; else raise StoreError
        """
        done = state == DONE
        body = {"seconds": told["seconds"], "images": len(told["images"])} if done else as_told(told)
        event = self.event(job.id, state, **body)
        while True:
            try:
                first = await self.ledger.write(
                    lambda db: end(db, event, told if done else None, None if done else told)
                )
                break
            except StoreError:
                self.well = False
                tries = None if tries is None else tries - 1
                if tries == 0:
                    raise
                await asyncio.sleep(1)
        self.well = True
        self.sequence.pop(job.id, None)
        self.files.checkpoint(job.id).unlink(missing_ok=True)
        if first:
            self.feed.put(event)
            self.meters.ended.labels(state).inc()
            self.meters.latency.observe(max(event.at - job.created, 0.0))
            logger.info("job ended", extra={"job": job.id, "state": state, "model": job.model})

    def broadcast(self) -> None:
        """The places of those who wait, to those who watch them, where they moved by a tenth: in a long queue every
        picture moves everyone by one, and telling all of them would cost more than drawing. Called twice a second."""
        told: dict[str, int] = {}
        for id_ in self.feed.watched():
            entry = self.line.waiting.get(id_)
            place = None if entry is None else self.places(entry.model).get(id_)
            if place is None:
                continue
            before = told[id_] = self.told.get(id_, 1 << 30)
            if abs(before - place.ahead) > before // 10:
                told[id_] = place.ahead
                eta = None if place.eta is None else round(place.eta, 1)
                self.feed.put(self.event(id_, "place", ahead=place.ahead, waiting=place.waiting, eta=eta))
        self.told = told
