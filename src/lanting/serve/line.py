"""Who is next. Pure arithmetic over what is waiting; the ledger is what survives.

A job's level is its priority, one more for every five minutes of waiting, so nothing waits for ever. Among the keys
whose next job has the highest level, the one that has had the least of the engine for its share comes first, and each
key's own jobs in their order. A key that comes back begins where the least served active one stands: idling saves
nothing up. Rejected: first come first served, where one script with a thousand prompts closes the server to others.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

PATIENCE = 300.0  # seconds of waiting that raise a job by a level
HIGHEST = 1


@dataclass(frozen=True, slots=True)
class Entry:
    """A waiting job. `cost` in any unit that is the same for all; jobs of one `alike` may be drawn together."""

    id: str
    owner: str
    model: str
    priority: int
    created: float
    cost: float
    share: float = 1.0
    alike: str = ""  # "": like no other
    timeout: float = float("inf")  # seconds of drawing

    def level(self, now: float) -> int:
        return min(self.priority + int(max(now - self.created, 0.0) / PATIENCE), max(HIGHEST, self.priority))

    def rank(self, now: float) -> tuple[int, float, str]:
        """Among the jobs of one key."""
        return -self.level(now), self.created, self.id


class Line:
    """All that is waiting, and what every active key has had."""

    def __init__(self) -> None:
        self.waiting: dict[str, Entry] = {}
        self.served: dict[str, float] = {}  # owner -> cost / share of what was begun
        self.drawing: dict[str, Entry] = {}
        self.moved = 0  # how often somebody began, ended or left: those behind stand elsewhere since

    def __len__(self) -> int:
        return len(self.waiting)

    def held_by(self, owner: str) -> int:
        return sum(entry.owner == owner for entry in self.waiting.values())

    def active(self) -> set[str]:
        return {entry.owner for entry in (*self.waiting.values(), *self.drawing.values())}

    def add(self, entry: Entry) -> None:
        others = self.active()
        if entry.owner not in others:
            floor = min((self.served.get(owner, 0.0) for owner in others), default=0.0)
            self.served[entry.owner] = max(self.served.get(entry.owner, 0.0), floor)
        self.waiting[entry.id] = entry

    def remove(self, job: str) -> Entry | None:
        """The entry, if it was waiting."""
        self.moved += 1
        return self.waiting.pop(job, None)

    def take(self, model: str, now: float) -> Entry | None:
        """The next job of a model; it counts for its key from now on."""
        entry = next(self.order(model, now), None)
        if entry is not None:
            del self.waiting[entry.id]
            self.drawing[entry.id] = entry
            self.moved += 1
            self.served[entry.owner] = self.served.get(entry.owner, 0.0) + entry.cost / entry.share
        return entry

    def finished(self, job: str) -> None:
        """A job that was taken has ended, or went back into the line by `add`."""
        self.drawing.pop(job, None)
        self.moved += 1
        if not self.waiting and not self.drawing:
            self.served.clear()

    def returned(self, entry: Entry) -> None:
        """A job that was taken and not finished: it waits again, and its key is not charged twice."""
        self.drawing.pop(entry.id, None)
        self.moved += 1
        self.add(entry)
        self.served[entry.owner] -= entry.cost / entry.share

    def order(self, model: str, now: float) -> Iterator[Entry]:
        """The order in which jobs of a model will be taken if nothing else comes."""
        queues: dict[str, list[Entry]] = defaultdict(list)
        for entry in self.waiting.values():
            if entry.model == model:
                queues[entry.owner].append(entry)
        for queue in queues.values():
            queue.sort(key=lambda entry: entry.rank(now), reverse=True)
        heap = [self._key(queue[-1], self.served.get(owner, 0.0), now) for owner, queue in queues.items()]
        heapq.heapify(heap)
        while heap:
            _, served, _, _, owner = heapq.heappop(heap)
            entry = queues[owner].pop()
            yield entry
            if queues[owner]:
                heapq.heappush(heap, self._key(queues[owner][-1], served + entry.cost / entry.share, now))

    @staticmethod
    def _key(head: Entry, served: float, now: float) -> tuple[int, float, float, str, str]:
        return -head.level(now), served, head.created, head.id, head.owner
