"""Where Triton's kernels run, and which of several ways is the fastest here.

`TRITON_INTERPRET=1` lets Triton run its kernels on the CPU, in Python: for tests, not for work.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch

from lanting.kernels.gpu.names import OLDEST

FLOATS = (8, 9)  # Ada: the first with 8-bit floats
TRIES = 3


@cache
def found() -> bool:
    """Whether Triton can be imported."""
    if find_spec("triton") is None:
        return False
    try:
        import triton.language  # noqa: F401
    except Exception:  # built for another Python, say, or half removed
        return False
    return True


def interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def capability(device: torch.device) -> tuple[int, int]:
    """Of an NVIDIA GPU; (0, 0) of everything else."""
    if device.type != "cuda" or torch.version.hip is not None:
        return (0, 0)
    return torch.cuda.get_device_capability(device)


def available(device: torch.device) -> bool:
    """Whether Triton's kernels run there."""
    fits = interpreted() if device.type == "cpu" else capability(device) >= OLDEST
    return fits and found()


def has_floats(device: torch.device) -> bool:
    """Whether 8-bit floats are worth making: the CPU's twins define them, so there they are, too."""
    return device.type == "cpu" or capability(device) >= FLOATS


def recording() -> bool:
    """Whether a CUDA graph is being recorded: nothing may be timed or waited for then."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def on(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@cache
def second(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


@contextmanager
def beside(device: torch.device) -> Iterator[None]:
    """What is asked for inside may run beside what follows, until `meet`: while a graph is recorded, and only then.

    Who uses it keeps everything that is read inside alive until `meet`, since memory is used again in the order of one
    stream. Outside of recordings Python is what takes the time, and tuning wants the GPU for itself.
    """
    if device.type != "cuda" or not recording():
        yield
        return
    second(device).wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(second(device)):
        yield


def meet(device: torch.device) -> None:
    """Wait for what runs beside."""
    if device.type == "cuda" and recording():
        torch.cuda.current_stream(device).wait_stream(second(device))


class Tuner:
    """Remembers which of several ways to do the same is the fastest, by timing each once for every key.

    Only for ways that give the same numbers: which one is taken must not show in a picture. A way that fails, for want
    of shared memory say, is left out.
    """

    def __init__(self) -> None:
        self.picks: dict[Hashable, int] = {}

    def __call__(self, key: Hashable, ways: Sequence[Callable[[], Any]], device: torch.device) -> Any:
        """The result of the way that is best for `key`."""
        pick = self.picks.get(key)
        if pick is None:
            if device.type != "cuda" or len(ways) == 1 or recording():
                return ways[0]()
            times = [self.time(way) for way in ways]
            if min(times) == float("inf"):
                return ways[0]()  # and raise what it raises
            pick = self.picks[key] = times.index(min(times))
        return ways[pick]()

    def time(self, way: Callable[[], Any]) -> float:
        """Milliseconds, or infinity where it fails."""
        try:
            way()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            for _ in range(TRIES):
                way()
            end.record()
            end.synchronize()
            return begin.elapsed_time(end) / TRIES
        except torch.OutOfMemoryError:
            raise
        except Exception:
            return float("inf")


@cache
def tuner() -> Tuner:
    """The one of this process."""
    return Tuner()
