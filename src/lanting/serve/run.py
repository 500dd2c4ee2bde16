"""Listen until told to stop. The first SIGTERM or Ctrl-C drains: no new jobs, running ones end or are put aside, those
who watch are told; a second one leaves at once, and the queue survives that too."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from dataclasses import replace
from types import FrameType
from typing import Any

import uvicorn

from lanting.core.errors import RequestError
from lanting.serve.app import Studio, build_app
from lanting.serve.hand import processes
from lanting.serve.house import Hire, House, open_house
from lanting.serve.settings import Settings, check

BACKLOG = 2048


class Server(uvicorn.Server):
    """uvicorn, which drains before it closes connections."""

    def __init__(self, config: uvicorn.Config, house: House) -> None:
        super().__init__(config)
        self.house = house
        self.draining: asyncio.Task[None] | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.draining is not None or not self.started:
            super().handle_exit(sig, frame)
            return
        loop = asyncio.get_event_loop()
        self.draining = loop.create_task(self.drain())

    async def drain(self) -> None:
        await self.house.drain(self.house.settings.drain)
        self.should_exit = True


def listen(settings: Settings) -> socket.socket:
    """The bound socket. Raises RequestError where the port is taken or the address is not this machine's."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    # Windows means something else by the first: that several programs may listen on one port at once
    sock.setsockopt(socket.SOL_SOCKET, getattr(socket, "SO_EXCLUSIVEADDRUSE", socket.SO_REUSEADDR), 1)
    try:
        sock.bind((settings.host, settings.port))
    except OSError as error:
        sock.close()
        raise RequestError(
            "the server can't listen on {host} port {port}: {reason}; choose another with --port",
            **{"host": settings.host, "port": settings.port, "reason": error.strerror or error},
        ) from None
    sock.listen(BACKLOG)
    return sock


def spoken() -> Any:
    """How HTTP is read: by httptools where it is installed, else by h11, which bounds heads itself."""
    try:
        from lanting.serve.heads import Heads
    except ImportError:
        return "auto"
    return Heads


def serve(
    settings: Settings, opened: Callable[[House], None], studio: Studio | None = None, hire: Hire = processes
) -> None:
    """Until a signal ends it. `opened` is called when the port is open; `hire` says who draws. Raises LantingError
    before that."""
    sock = listen(check(settings))
    settings = replace(settings, port=sock.getsockname()[1])
    try:
        house = open_house(settings, hire)
        app = build_app(house, studio)
        config = uvicorn.Config(
            app,
            http=spoken(),
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=30,
            timeout_graceful_shutdown=10,
            h11_max_incomplete_event_size=64 << 10,
        )
        opened(house)
        with asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:  # uvloop where it is installed
            runner.run(Server(config, house).serve(sockets=[sock]))
    finally:
        sock.close()
