"""Who watches which job, and what they have not read yet.

A reader that is slow loses steps and previews, never the end: what waits for one watcher is bounded, so a thousand
clients that do not read cost no memory.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from lanting.serve.jobs import Event

UNREAD = 64  # events that may wait for one watcher


class Reader:
    """One watcher's events."""

    def __init__(self) -> None:
        self._events: deque[Event] = deque()
        self._woken = asyncio.Event()

    def put(self, event: Event) -> None:
        if len(self._events) >= UNREAD and not self._drop() and not event.last:
            return
        self._events.append(event)
        self._woken.set()

    async def get(self) -> Event:
        while not self._events:
            self._woken.clear()
            await self._woken.wait()
        return self._events.popleft()

    def _drop(self) -> bool:
        """Make room: the oldest step goes."""
        for index, event in enumerate(self._events):
            if event.kind in ("step", "place", "checkpoint"):
                del self._events[index]
                return True
        return False


class Feed:
    """Events of jobs to those who watch them; what was said of unfinished jobs since the server started."""

    def __init__(self) -> None:
        self._readers: dict[str, set[Reader]] = defaultdict(set)
        self._said: dict[str, list[Event]] = {}

    def watched(self) -> list[str]:
        """The jobs that somebody watches."""
        return [job for job, readers in self._readers.items() if readers]

    def said(self, job: str) -> list[Event]:
        return list(self._said.get(job, ()))

    def put(self, event: Event, keep: bool = True) -> None:
        """To all who watch; `keep` for those who come later."""
        if keep and event.kind != "place":
            said = self._said.setdefault(event.job, [])
            if event.preview is not None:
                _forget_preview(said)
            said.append(event)
        for reader in self._readers.get(event.job, ()):
            reader.put(event)
        if event.last:
            self._said.pop(event.job, None)

    @contextmanager
    def reader(self, job: str) -> Iterator[Reader]:
        reader = Reader()
        self._readers[job].add(reader)
        try:
            yield reader
        finally:
            self._readers[job].discard(reader)
            if not self._readers[job]:
                del self._readers[job]


def _forget_preview(said: list[Event]) -> None:
    """Of all steps that were said, one keeps its preview: who comes late sees the picture so far."""
    for index in range(len(said) - 1, -1, -1):
        if said[index].preview is not None:
            said[index] = replace(said[index], preview=None)
            return
