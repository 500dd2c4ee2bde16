"""Bodies of requests, bounded in bytes, time and values: each by itself, and in bytes all that are being read together.

Bytes are counted when they arrive, not when they are announced: somebody who announces much and sends little would else
keep others out. A request's first bytes are not counted, so that what carries no pictures is read whatever uploads are
under way. What comes after a refusal is read and dropped for a while: a connection that is closed over unread bytes is
reset, and the client never sees why. Parsing large JSON in a thread was tried and rejected: the parser lets no other
thread run meanwhile. But what is large in requests that mean something is pictures, and those are few long words, which
are parsed in no time; what takes long is many short ones.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.types import Message, Receive

from lanting.serve.errors import ClosedError, LargeError
from lanting.serve.settings import Caps

# marks between values of one JSON body: understanding a million takes seconds, in which nobody is answered
VALUES = 20_000
MARKS = (b",", b"[", b"{")
SMALL = 64 << 10  # bytes of each request that are not counted; the connection holds about as many by itself
PATIENCE = 10.0  # seconds that a request waits for room, all in all
LOOK = 0.05  # seconds between looks whether there is room
LINGER, SILENCE = 30.0, 5.0  # seconds that the rest of a refused body is dropped, all in all and without a byte


@dataclass
class Room:
    """Bytes of all bodies that are in memory and not understood yet; at most `most`."""

    most: int
    held: int = 0


class Arriving:
    """One body's messages, as the application asks for them. Whoever makes it calls `leave` at the end.

    Raises LargeError for too much, or too late; ClosedError where there is no room for long.
    """

    def __init__(self, caps: Caps, room: Room, receive: Receive, head: Headers) -> None:
        self.caps, self.room, self.receive = caps, room, receive
        self.whole = not ("content-length" in head or "transfer-encoding" in head)  # there is none
        self.json = "json" in head.get("content-type", "").lower()
        self.bytes, self.held, self.values = 0, 0, 0
        self.until, self.patience = time.monotonic() + caps.body_seconds, PATIENCE

    async def __call__(self) -> Message:
        if self.whole:  # whoever listens on has understood the body, and waits for its client to leave
            self.leave()
            return await self.receive()
        try:
            message = await asyncio.wait_for(self.receive(), max(self.until - time.monotonic(), 0.001))
        except TimeoutError:
            raise LargeError("the request took too long to arrive: send it faster, or less") from None
        piece = message.get("body", b"")
        self.bytes += len(piece)
        self.values += sum(piece.count(mark) for mark in MARKS) if self.json else 0
        self.whole = message["type"] != "http.request" or not message.get("more_body", False)
        if self.bytes > self.caps.body:
            raise LargeError("the request is larger than {most} MB: send less", most=self.caps.body >> 20)
        if self.values > VALUES:
            raise LargeError("the request holds more than {most:,} values: send fewer", most=VALUES)
        await self.enter(max(self.bytes - SMALL, 0) - self.held)
        return message

    async def enter(self, more: int) -> None:
        """Room for so many bytes; waits for it, and the body has that much longer to arrive."""
        while more and self.room.held + more > self.room.most:
            if self.patience <= 0:
                raise ClosedError("too many large requests are being read: try again in a moment")
            began = time.monotonic()
            await asyncio.sleep(LOOK)
            spent = time.monotonic() - began
            self.patience, self.until = self.patience - spent, self.until + spent
        self.held += more
        self.room.held += more

    async def drop(self) -> None:
        """Read what was not, and forget it."""
        self.leave()
        with suppress(TimeoutError):
            async with asyncio.timeout(LINGER):
                while not self.whole:
                    message = await asyncio.wait_for(self.receive(), SILENCE)
                    self.whole = message["type"] != "http.request" or not message.get("more_body", False)

    def leave(self) -> None:
        """Its bytes count no longer."""
        self.room.held -= self.held
        self.held = 0
