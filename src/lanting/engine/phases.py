"""What a drawing tells of its way: seconds and Progress per phase, and sentences for what a machine's size causes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
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


class sentences:
    """Turn the two failures that a machine's size causes into sentences."""

    def __init__(self, device: torch.device):
        self.device = device

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, torch.cuda.OutOfMemoryError) or (  # Apple's GPUs and some libraries have no type for it
            isinstance(error, RuntimeError) and "out of memory" in str(error)
        ):
            raise RequestError(
                "{device} has too little memory for this picture: use a smaller size or --device cpu",
                device=self.device,
            ) from error
        if isinstance(error, MemoryError) or (
            isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
        ):
            raise ModelError(
                "this machine has too little memory for the model at this size: 'lanting plan' says what would fit"
            ) from error
