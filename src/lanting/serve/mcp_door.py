"""MCP over HTTP, imported when somebody first asks for it: its library takes as long to load as all others together."""

from __future__ import annotations

import asyncio
import importlib

from starlette.types import ASGIApp, Receive, Scope, Send

from lanting.serve.house import House


class McpDoor:
    """The ASGI application behind /mcp; host, origin and key are the guard's business."""

    def __init__(self, house: House) -> None:
        self.house = house
        self.app: ASGIApp | None = None
        self.opening = asyncio.Lock()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self.opening:
            self.app = self.app or await self.open()
        await self.app(scope, receive, send)

    async def open(self) -> ASGIApp:
        """The application, its sessions kept until the server stops."""
        module = await asyncio.to_thread(importlib.import_module, "lanting.serve.mcp_tools")
        app, sessions = module.http_app(self.house)
        begun = asyncio.Event()

        async def keep() -> None:
            async with sessions:
                begun.set()
                await asyncio.Event().wait()

        self.house.helpers.append(asyncio.create_task(keep()))
        await begun.wait()
        return app
