"""The server's side of one worker: start it, send orders, hear what it says, kill it when it hangs.

`Hand` is what the rest of the server knows; a `ProcessHand` holds a process of this machine by its pipes, and hands of
other rooms hold workers elsewhere (`lanting.cluster`).
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from lanting.core.processes import apart
from lanting.serve.settings import Settings
from lanting.serve.staff import Post, posts

LONGEST_LINE = 64 << 20  # bytes: a preview is far below
DEAD: Mapping[str, Any] = {"is": "dead"}
logger = logging.getLogger("lanting.serve")


class Hand(ABC):
    """One worker of a model. Everything here runs on the server's event loop."""

    def __init__(self, settings: Settings, post: Post) -> None:
        self.settings, self.post = settings, post
        self.told: Mapping[str, Any] = {}  # what the worker said when it was ready
        self.refused: str | None = None  # why it can't open its model, in a sentence; until it can
        self.words: list[Any] | None = None  # the same as [template, values]
        self.come = asyncio.Event()  # something may be there for it
        self.idle = False  # it waits for a job
        self.waits = False  # for room elsewhere, which is no error

    @property
    @abstractmethod
    def alive(self) -> bool:
        """Whether somebody is there who may be opening an engine."""

    @property
    def ready(self) -> bool:
        return bool(self.told) and self.alive

    @property
    def opening(self) -> dict[str, Any]:
        """The first order: what to open."""
        served = self.post.served
        order = {"opener": self.settings.opener, "every": self.settings.every, "model": served.model}
        return {**order, "options": dict(served.options)}

    @abstractmethod
    async def start(self) -> Mapping[str, Any]:
        """Start the worker and wait for its first words: {"is": "ready"}, {"is": "refused"} or DEAD. May be
        cancelled; `close` follows then."""

    @abstractmethod
    async def send(self, order: Mapping[str, Any]) -> None:
        """To a worker that may have died: then nothing, `hear` will tell."""

    @abstractmethod
    async def hear(self) -> Mapping[str, Any]:
        """The next thing it says; DEAD when it is gone."""

    @abstractmethod
    def kill(self) -> None:
        """At once, whatever it is doing."""

    @abstractmethod
    async def close(self, patience: float = 2.0) -> None:
        """Let it go; kill it where that takes longer than so many seconds."""


class ProcessHand(Hand):
    """A process of this machine."""

    process: asyncio.subprocess.Process | None = None

    @property
    def alive(self) -> bool:
        return self.process is not None and self.process.returncode is None

    async def start(self) -> Mapping[str, Any]:
        self.told = {}
        try:
            self.process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "lanting.serve.worker"),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                limit=LONGEST_LINE,
                env=os.environ | dict(self.post.environ),
                **apart(),  # Ctrl-C is the server's to handle
            )
        except OSError as error:  # of memory, processes or open files there are too few just now
            logger.error("no process for a worker", extra={"model": self.post.served.name, "reason": str(error)})
            return DEAD
        await self.send(self.opening)
        said = await self.hear()
        self.told = said if said["is"] == "ready" else {}
        return said

    async def send(self, order: Mapping[str, Any]) -> None:
        if self.process is None or self.process.stdin is None:
            return
        with suppress(ConnectionError, RuntimeError):
            self.process.stdin.write(json.dumps(order, ensure_ascii=False).encode() + b"\n")
            await self.process.stdin.drain()

    async def hear(self) -> Mapping[str, Any]:
        if self.process is None or self.process.stdout is None:
            return DEAD
        line = await self.process.stdout.readline()
        if not line.endswith(b"\n"):
            await self.process.wait()
            return DEAD
        return json.loads(line)

    def kill(self) -> None:
        if self.process is not None and self.process.returncode is None:
            with suppress(ProcessLookupError):
                self.process.kill()

    async def close(self, patience: float = 2.0) -> None:
        """Closing the pipe is enough for one that listens."""
        if self.process is None:
            return
        if self.process.stdin is not None:
            self.process.stdin.close()
        try:
            await asyncio.wait_for(self.process.wait(), patience)
        except TimeoutError:
            self.kill()
            await self.process.wait()


def processes(settings: Settings) -> list[Hand]:
    """The workers of a server that draws on its own machine."""
    return [ProcessHand(settings, post) for post in posts(settings)]
