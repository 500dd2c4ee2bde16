"""This machine's limits: what it does at best, on so many threads. Everything else is a share of these.

Operations are the faster of two measurements: the kernels' loop of bare instructions, and the best product that torch
makes, which may use instructions that the kernels don't and is all there is where they are not built. Bytes are
read or copied in a buffer far larger than the caches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from lanting.bench.subject import Clock, clock_for
from lanting.kernels import library
from lanting.kernels import limits as kernels
from lanting.plan import detect

TORCH = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LEAST = 256 << 20  # bytes to read and copy, where the caches are small
SIDE = 1024  # of the products that are tried


@dataclass(frozen=True, slots=True)
class Rate:
    """Operations a second, and what reached it: an instruction set of the kernels, or "torch"."""

    value: float
    source: str


@dataclass(frozen=True)
class Limits:
    """`best` holds one Rate for each type that this machine multiplies; `product` what torch makes of it."""

    threads: int
    best: dict[str, Rate]
    product: dict[str, float]
    read: float
    copy: float

    def operations(self, kind: str) -> float:
        """A second, in a type of number; those without instructions of their own are widened to float32."""
        return self.best.get(kind, self.best["float32"]).value

    @property
    def bandwidth(self) -> float:
        return max(self.read, self.copy)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """So many threads for torch and for the kernels."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        with kernels.threads(count):
            yield
    finally:
        torch.set_num_threads(before)


def measure(count: int, runs: int = kernels.RUNS) -> Limits:
    """A few seconds on `count` threads."""
    clock = clock_for(count)
    with threads(count):
        product = {name: product_rate(dtype, runs, clock) for name, dtype in TORCH.items()}
        best = {name: Rate(value, "torch") for name, value in product.items()}
        for name in kernels.PEAKS:
            own = kernels.operations(name, runs if count == 1 else 4 * runs)  # all threads at once is rarer
            if own is not None and (name not in best or own > best[name].value):
                best[name] = Rate(own, library.instruction_set())
        if best["bfloat16"].source == "torch" and best["float32"].value > best["bfloat16"].value:
            del best["bfloat16"]  # no instructions for it, and torch does it slower than wider numbers
        size = buffer_size()
        read, copy = (kernels.bandwidth(size, each, runs) or moved(size, each, runs, clock) for each in (False, True))
    return Limits(count, best, product, read, copy)


def product_rate(dtype: torch.dtype, runs: int, clock: Clock) -> float:
    """Operations a second of torch's best product of square matrices."""
    a, b = (torch.full((SIDE, SIDE), 0.5, dtype=dtype) for _ in range(2))
    return 2 * SIDE**3 / fastest(lambda: torch.mm(a, b), runs // 4, clock)


def moved(size: int, copy: bool, runs: int, clock: Clock) -> float:
    """Bytes a second, where there are no kernels to measure it."""
    source = torch.ones(size // (8 if copy else 4))
    if not copy:
        return source.nbytes / fastest(lambda: torch.sum(source), runs // 8, clock)
    target = torch.empty_like(source)
    return 2 * source.nbytes / fastest(lambda: target.copy_(source), runs // 4, clock)


def fastest(call: Callable[[], object], runs: int, clock: Clock) -> float:
    """Seconds of the fastest run, behind one that doesn't count."""
    call()
    found: list[float] = []
    for _ in range(max(2, runs)):
        began = clock()
        call()
        found.append(clock() - began)
    return min(found)


def buffer_size() -> int:
    """Four times the last caches, so that nothing waits in them; not more than a quarter of what is free."""
    size = max(LEAST, 4 * last_caches())
    free = detect().ram_free
    return min(size, max(free // 4, 16 << 20)) if free else size


def last_caches(root: Path = Path("/sys/devices/system/cpu")) -> int:
    """Bytes of all caches of the last level together, as Linux knows them; 0 elsewhere."""
    levels: dict[int, dict[str, int]] = {}
    for folder in root.glob("cpu[0-9]*/cache/index*"):
        try:
            level, shared, size = (
                (folder / name).read_text(encoding="ascii").strip() for name in ("level", "shared_cpu_list", "size")
            )
            levels.setdefault(int(level), {})[shared] = int(size.rstrip("K")) * 1024
        except (OSError, ValueError):
            continue
    return sum(levels[max(levels)].values()) if levels else 0
