"""What a drawing tells of its way: seconds and Progress per phase, and sentences for what a machine's size causes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from lanting.core.errors import ModelError, RequestError
from lanting.core.types import Progress

if TYPE_CHECKING:
    from PIL.Image import Image

Previews = bool | Callable[[], bool]


class Phases:
    """Seconds per phase, and the Progress of each."""

    def __init__(self) -> None:
        self.began = time.perf_counter()
        self.seconds: dict[str, float] = {}

    def end(self, phase: str) -> None:
        now = time.perf_counter()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self.began
        self.began = now

    def tick(self, phase: str, step: int, steps: int, preview: Image | None = None) -> Progress:
        spent = self.seconds.get(phase, time.perf_counter() - self.began)
        return Progress(phase, step, steps, spent, preview)

    def finished(self) -> Iterator[Progress]:
        """One Progress for every phase that has ended."""
        for phase in self.seconds:
            yield self.tick(phase, 1, 1)


@contextmanager
def sentences(device: torch.device) -> Iterator[None]:
    """Turn the two failures that a machine's size causes into sentences."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        reason = str(error)
        if isinstance(error, MemoryError) or "can't allocate memory" in reason:
            raise ModelError(
                "this machine has too little memory for the model at this size: 'lanting plan' says what would fit"
            ) from error
        # Apple's GPUs and some libraries have no type of their own for it
        if isinstance(error, torch.cuda.OutOfMemoryError) or "out of memory" in reason:
            raise RequestError(
                "{device} has too little memory for this picture: use a smaller size or --device cpu", device=device
            ) from error
        raise
