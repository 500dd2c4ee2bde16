"""What one worker draws just now: a job, or several whose steps it takes together.

Who may join, in one sentence: whoever is next in line anyway, if his drawing is alike, has no lower priority than those
that are drawn, and leaves all of them time. So jobs begin in the order in which they would begin without company, and
nobody is overtaken; where the next one does not fit, the table empties and he is drawn.
"""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lanting.core.lang import say
from lanting.serve.desk import Desk
from lanting.serve.endings import conclude
from lanting.serve.errors import StoreError
from lanting.serve.hand import Hand
from lanting.serve.jobs import DONE, Job, begin, find
from lanting.serve.line import Entry
from lanting.serve.state import Model, Run, left

PATIENCE = 30.0  # seconds a worker has to stop before it is killed
MOST_ROOMS = 1000  # kinds of jobs whose room is remembered
LOOK = 0.5  # seconds after which the line is looked at again, though nothing came


@dataclass(slots=True)
class Place:
    """A job at the table."""

    run: Run
    entry: Entry


@dataclass
class Table:
    """Of one worker. `room`: how many jobs like the present ones it draws together, as it said now or the last time."""

    desk: Desk
    model: Model
    hand: Hand
    places: dict[str, Place] = field(default_factory=dict[str, Place])
    room: int = 1
    rooms: dict[str, int] = field(default_factory=dict[str, int])  # alike -> room
    looked: float = -LOOK  # monotonic: when the line was
    hearing: asyncio.Task[Mapping[str, Any]] | None = None

    # ---------------------------------------------------------------- who sits down
    async def begin(self, entry: Entry) -> None:
        """Have one job drawn, unless a killed server finished it already.

        Its beginning is written when there is a commit anyway: a server that forgets it draws a waiting job, and that
        is right.
        """
        desk = self.desk
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
        run = desk.runs[job.id] = Run(job, self.hand, deadline=time.monotonic() + job.timeout)
        if not self.places:
            self.room, self.looked = self.rooms.get(entry.alike, 1), -LOOK
        self.places[job.id] = Place(run, entry)
        await self.hand.send(order_for(desk, job))

    async def fill(self) -> None:
        """Let those join who may. The line is looked at where something came or left, and now and then."""
        if not self.hand.come.is_set() and time.monotonic() < self.looked + LOOK:
            return
        self.hand.come.clear()
        self.looked = time.monotonic()
        while 0 < len(self.places) < self.room and (entry := self.joining()) is not None:
            await self.begin(entry)

    def joining(self) -> Entry | None:
        """The next in line, taken, if he may join; one whom another worker can draw at once is left to that."""
        desk, name, now = self.desk, self.model.served.name, time.time()
        if any(hand.idle and hand.ready for hand in self.model.hands if hand is not self.hand):
            return None
        entry = next(desk.line.order(name, now), None) if desk.accepting and desk.well else None
        return desk.line.take(name, now) if entry is not None and self.fits(entry, now) else None

    def fits(self, entry: Entry, now: float) -> bool:
        others = [place.entry for place in self.places.values()]
        alike = bool(entry.alike) and all(entry.alike == other.alike for other in others)
        return alike and all(entry.level(now) >= other.level(now) for other in others) and self.in_time(entry)

    def in_time(self, entry: Entry) -> bool:
        """Whether everybody is done in time, though nothing were gained by going together."""
        count, pace = len(self.places) + 1, self.model.pace
        own = pace.seconds(entry.cost)
        if own is None:  # nothing was ever drawn
            return True
        for place in self.places.values():
            rest = (left(place.run, pace) or 0.0) * count / (count - 1)
            if time.monotonic() + rest > place.run.deadline:
                return False
        return own * count <= entry.timeout

    # ---------------------------------------------------------------- what happens
    async def listen(self, seconds: float) -> None:
        """The worker's next word, if it comes within so long; and a look at the clock."""
        self.hearing = self.hearing or asyncio.create_task(self.hand.hear())
        await asyncio.wait({self.hearing}, timeout=seconds)
        if self.hearing.done():
            said, self.hearing = self.hearing.result(), None
            await self.heard(said)
        for place in self.places.values():
            if time.monotonic() > place.run.deadline:
                await self.overdue(place.run)

    async def heard(self, said: Mapping[str, Any]) -> None:
        if said["is"] == "dead":
            for id_ in list(self.places):
                await self.leave(id_, said)
        elif said["job"] not in self.places:
            return
        elif said["is"] == "room":
            self.room, self.looked = said["room"], -LOOK
            if len(self.rooms) > MOST_ROOMS:
                self.rooms.clear()
            self.rooms[self.places[said["job"]].entry.alike] = self.room
        elif said["is"] in ("done", "failed", "stopped"):
            await self.leave(said["job"], said)
        else:
            note(self.desk, self.places[said["job"]].run, said)

    async def leave(self, id_: str, said: Mapping[str, Any]) -> None:
        """A job's turn ends. A success is written while the next job is drawn."""
        place, self.looked = self.places.pop(id_), -LOOK
        ending = asyncio.create_task(conclude(self.desk, self.model, place.run, said, place.entry))
        self.desk.endings.add(ending)
        ending.add_done_callback(self.desk.endings.discard)
        if said["is"] != "done":
            await ending

    async def overdue(self, run: Run) -> None:
        if run.why is None:
            await self.desk.stop(run, "timeout", PATIENCE)
        else:
            self.hand.kill()
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
        "most": desk.settings.batch,
    }


def note(desk: Desk, run: Run, said: Mapping[str, Any]) -> None:
    """What happens on the way, to the log and to who watches."""
    job = run.job.id
    if said["is"] != "progress":
        run.resumed = run.resumed or said["is"] == "resumed"
        desk.tell(job, said["is"], step=said["step"], steps=said["steps"])
        return
    for sentence, values in said.get("notices", ()):
        desk.tell(job, "notice", message=say(sentence, **values))
    if said["phase"] != "denoise":
        desk.tell(job, "phase", phase=said["phase"], seconds=said["seconds"])
        return
    spent = said["seconds"] - (run.stepped if run.step else 0.0)
    run.step, run.steps, run.stepped = said["step"], said["steps"], said["seconds"]
    desk.meters.step.observe(max(spent, 0.0))
    if said["preview"]:
        run.preview = base64.b64decode(said["preview"])
    desk.tell(job, "step", run.preview, step=run.step, steps=run.steps, seconds=run.stepped)
