"""Freed memory goes back to the system, so that a process holds what its tensors need and a plan can say how much.

glibc keeps freed blocks of up to 32 MB in its heap, where the next, larger tensor does not fit: decoding 384 x 384
pixels on a CPU then holds 591 MB for tensors that never exceed 227. With a fixed threshold every large tensor is a
mapping of its own, which ends with it; decoding holds 297 MB. Small tensors stay in the heap, where they are fast.
Small ones that packing left behind lie among weights that stay; `tidy` gives the system what is free between them.
Rejected: another allocator (jemalloc, tcmalloc), which has to be there before the program starts.
"""

from __future__ import annotations

import ctypes
import os
import sys
from functools import cache

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # mallopt's numbers
LARGE = 1 << 20  # bytes; at 4 MB, packing a model while it is loaded left up to a third more behind


@cache
def return_memory() -> bool:
    """Ask glibc for it, once per process; whether it was done. People who set malloc's own variables are left alone."""
    set_by_hand = any(name.startswith(("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD")) for name in os.environ)
    if not sys.platform.startswith("linux") or set_by_hand:
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return False
    return bool(mallopt(MMAP_THRESHOLD, LARGE)) and bool(mallopt(TRIM_THRESHOLD, 4 * LARGE))


def tidy() -> None:
    """Give back what is free between things that stay, when much was made and let go; takes milliseconds."""
    if return_memory():
        ctypes.CDLL(None).malloc_trim(0)
