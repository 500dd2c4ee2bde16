"""The server's side of one worker process: start it, send orders, hear what it says, kill it when it hangs."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from lanting.serve.settings import Served, Settings

LONGEST_LINE = 64 << 20  # bytes: a preview is far below
DEAD: Mapping[str, Any] = {"is": "dead"}


class Hand:
    """One model's worker."""

    def __init__(self, settings: Settings, served: Served) -> None:
        self.settings, self.served = settings, served
        self.process: asyncio.subprocess.Process | None = None
        self.told: Mapping[str, Any] = {}  # what the worker said when it was ready

    @property
    def ready(self) -> bool:
        return bool(self.told) and self.process is not None and self.process.returncode is None

    async def start(self) -> Mapping[str, Any]:
        """Start the process and wait for its first words: {"is": "ready"}, {"is": "refused"} or DEAD."""
        self.told = {}
        self.process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "lanting.serve.worker"),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            limit=LONGEST_LINE,
            start_new_session=True,  # Ctrl-C is the server's to handle
        )
        order = {"opener": self.settings.opener, "every": self.settings.every, "model": self.served.model}
        await self.send({**order, "options": dict(self.served.options)})
        said = await self.hear()
        self.told = said if said["is"] == "ready" else {}
        return said

    async def send(self, order: Mapping[str, Any]) -> None:
        """To a worker that may have died: then nothing, `hear` will tell."""
        if self.process is None or self.process.stdin is None:
            return
        with suppress(ConnectionError, RuntimeError):
            self.process.stdin.write(json.dumps(order, ensure_ascii=False).encode() + b"\n")
            await self.process.stdin.drain()

    async def hear(self) -> Mapping[str, Any]:
        """The next thing it says; DEAD when it is gone."""
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
        """Let it go by closing the pipe; kill it where that takes too long."""
        if self.process is None:
            return
        if self.process.stdin is not None:
            self.process.stdin.close()
        try:
            await asyncio.wait_for(self.process.wait(), patience)
        except TimeoutError:
            self.kill()
            await self.process.wait()
