"""Reading the transformer while the text encoder is read and reads: on a GPU neither keeps the other waiting.

Files, the bus and the GPU are three things, and loading one network after the other uses one of them at a time. Only
where both are to be in memory together, and on a GPU: on a CPU weights are mapped, not read, and both want its cores.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from threading import Thread
from typing import Any

import torch


class Ahead:
    """At most one piece of work beside what goes on; whoever needs its result waits for it."""

    def __init__(self) -> None:
        self.future: Future[Any] | None = None

    def begin(self, work: Callable[[], object]) -> None:
        """Start it, unless some is under way."""
        if self.future is None:
            self.future = Future()
            Thread(target=self._run, args=(work, self.future), daemon=True).start()

    @staticmethod
    def _run(work: Callable[[], object], future: Future[Any]) -> None:
        try:
            with torch.no_grad():  # a thread has a gradient mode of its own
                future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    def meet(self) -> None:
        """Wait until it is done; raises what it raised."""
        future, self.future = self.future, None
        if future is not None:
            future.result()

    def end(self) -> None:
        """Wait until it is done, whatever came of it: it is not wanted any more."""
        future, self.future = self.future, None
        if future is not None:
            future.exception()
