"""Heads of requests, bounded in bytes and time before anybody looks at them, as bodies are behind the door.

uvicorn bounds them with h11 alone, in bytes; with httptools, which answers twice as fast, one connection could fill the
memory with a single header, and connections that never say what they want would stay for ever.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

LONGEST = 320 << 10  # bytes: far above what anybody sends, plus what may come in one piece with it
SECONDS = 60.0


class Heads(HttpToolsProtocol):
    """One connection."""

    open, heard = True, 0  # a head is awaited or being read; bytes of it so far
    overdue: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self.await_head()

    def await_head(self) -> None:
        self.forget()
        self.open, self.heard = True, 0
        self.overdue = self.loop.call_later(SECONDS, self.give_up)

    def give_up(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:  # what was asked before is still answered
            self.overdue = self.loop.call_later(SECONDS, self.give_up)
        elif not self.transport.is_closing():
            self.transport.close()

    def forget(self) -> None:
        if self.overdue is not None:
            self.overdue.cancel()
            self.overdue = None

    def data_received(self, data: bytes) -> None:
        if self.open and self.heard > LONGEST:
            self.send_400_response("The head of this request is too long.")
            return
        super().data_received(data)
        if self.open:
            self.heard += len(data)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.await_head()

    def on_headers_complete(self) -> None:
        self.open = False
        self.forget()
        super().on_headers_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        self.forget()
        super().connection_lost(exc)
