"""What this processor can do at best, measured by the kernels themselves (csrc/limits.h): operations of each type of
number that stay in registers, and bytes of memory that are read or copied.

The fastest of many short runs counts: a machine can be disturbed, but not be faster than it is. Without the kernels
there is nothing to measure with, and `operations` and `bandwidth` return None.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ctypes import c_int32, c_int64, c_void_p

from lanting.kernels.library import library, thread_count, use_threads

PEAKS = {"float32": 0, "bfloat16": 1, "int8": 2}
WARM = 0.05  # seconds until threads are awake and the clock has settled
TURN = 0.0015  # seconds of one run: short, so that some run undisturbed on all threads of a busy machine
RUNS = 60
WINDOWS = 8  # parts of a buffer that are timed one by one; each has left the caches when its turn comes again


@contextmanager
def threads(count: int) -> Iterator[None]:
    """So many threads for the kernels, and then as many as they have at the start."""
    use_threads(count)
    try:
        yield
    finally:
        use_threads(thread_count())


def probe() -> ctypes.CDLL | None:
    """The library with its two measuring calls, None where there is none or an older one."""
    found = library()
    if found is None or not hasattr(found, "lt_spin"):
        return None
    found.lt_spin.argtypes, found.lt_spin.restype = [c_int32, c_int64, c_int64], c_int64
    found.lt_pass.argtypes = [c_void_p, c_void_p, c_int64]
    return found


def operations(kind: str, runs: int = RUNS) -> float | None:
    """Operations a second in one of PEAKS, a multiplication and an addition being two; None where this processor has
    no instructions of its own for it, or there are no kernels."""
    found, pieces = probe(), 16 * (os.cpu_count() or 1)
    each = found.lt_spin(PEAKS[kind], 1, pieces) if found is not None else 0
    if found is None or each <= 0:
        return None
    rounds = 10
    while (spent := clock(found.lt_spin, PEAKS[kind], rounds, pieces)) < WARM:
        rounds *= 2
    rounds = max(1, int(rounds * TURN / spent))
    return each * rounds / min(clock(found.lt_spin, PEAKS[kind], rounds, pieces) for _ in range(runs))


def bandwidth(size: int, copy: bool = False, runs: int = RUNS) -> float | None:
    """Bytes a second of memory read, or read and written by copying, in a buffer of `size` bytes: take several times
    what the caches hold. None without the kernels."""
    found = probe()
    if found is None:
        return None
    with buffer(size) as start:
        found.lt_pass(start, start, size)  # touched, else all of it is one page of zeros
        span = size // (2 * WINDOWS) if copy else size // WINDOWS
        starts = [start + run % WINDOWS * span for run in range(runs)]
        spent = min(clock(found.lt_pass, at, at + size // 2 if copy else None, span) for at in starts)
    return span * (2 if copy else 1) / spent


@contextmanager
def buffer(size: int) -> Iterator[int]:
    """The address of fresh memory, in large pages where the system gives them."""
    memory = mmap.mmap(-1, size)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    held = ctypes.c_char.from_buffer(memory)
    try:
        yield ctypes.addressof(held)
    finally:
        del held
        memory.close()


def clock(work: Callable[..., object], *given: object) -> float:
    """Seconds of a call."""
    began = time.perf_counter()
    work(*given)
    return time.perf_counter() - began
