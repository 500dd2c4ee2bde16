"""Whose turn it is on an engine: one device draws one picture at a time, and other threads wait for the end of it.

A drawing is a generator, so a thread can have one that is unfinished and ask for another. It would wait for itself for
ever, and is told so instead. Rejected: letting it in, as a lock that counts would: both drawings would move weights and
hooks on the same networks.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

from lanting.core.errors import LantingError

E = TypeVar("E")


class Turn:
    """A lock that knows the thread that would have to open it. Who takes it may be interrupted at any moment."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.holder: threading.Thread | None = None

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Waits for its turn. Raises LantingError where this thread itself has it."""
        if self.holder is threading.current_thread():
            raise LantingError("this engine is still drawing for this thread: finish or close that drawing first")
        with self.lock:
            try:
                self.holder = threading.current_thread()
                yield
            finally:
                self.holder = None

    def passed(self, events: Iterator[E]) -> Iterator[E]:
        """The same events. Who asks for the next one may be another thread, and has the turn from then on."""
        for event in events:
            yield event
            self.holder = threading.current_thread()
