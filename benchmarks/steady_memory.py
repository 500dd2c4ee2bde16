"""Does memory stay flat? Draws with nano, sizes and tasks mixed, on one engine, and compares the process's memory.

    python benchmarks/steady_memory.py [--requests 200] [--streamed] [--json FILE]

The requests come in rounds of the same nine, with prompts that never repeat. Memory is the resident set after a round,
once the C library has been asked to give back what it keeps for later; growth is from the first two rounds, which warm
up, to the last two. Above 1 % it fails. `--streamed`: blocks from disk, text
encoder and transformer taking turns, modulation tabulated.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from lanting import Engine, Request
from lanting.plan import Plan

SIZES = ((224, 96), (128, 64), (192, 192))
TASKS = ("text_to_image", "image_to_image", "inpaint")
WARM = 2  # rounds
LIMIT = 0.01  # growth
ARENA_MAX = -8  # mallopt's number


def memory() -> int:
    """Bytes of this process that are in memory (Linux), apart from free memory that malloc holds."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * 4096


def requests(count: int) -> Iterator[Request]:
    """All tasks in all sizes, over and over; every prompt, seed and picture is new."""
    kinds = list(product(TASKS, SIZES))
    for number in range(count):
        task, size = kinds[number % len(kinds)]
        extra: dict[str, Any] = {}
        if task != "text_to_image":
            extra["images"] = (Image.new("RGB", size, (number % 256, 80, 160)),)
        if task == "inpaint":
            extra["mask"] = mask(size)
        yield Request(prompt=f'a red sign that says "N{number}"', task=task, size=size, steps=1, seed=number, **extra)


def mask(size: tuple[int, int]) -> Image.Image:
    """White in the middle."""
    sheet = Image.new("L", size)
    ImageDraw.Draw(sheet).rectangle((size[0] // 4, size[1] // 4, size[0] // 2, size[1] // 2), fill=255)
    return sheet


def streamed() -> Plan:
    """nano in as little memory as it can."""
    return Plan(
        model="nano",
        device="cpu",
        dtype="float32",
        transformer="fp32",
        text_encoder="fp32",
        blocks=6,
        resident_blocks=0,
        streamed="disk",
        modulation_table=True,
        encoder="unload",
        parked="disk",
        vae_tile=0,
        peak_vram=0,
        peak_ram=0,
        disk=0,
    )


def measure(count: int, plan: Plan | None = None) -> list[int]:
    """Memory after every round of nine requests."""
    seen = []
    with Engine.open("nano", device="cpu", plan=plan) as engine:
        for number, request in enumerate(requests(count), start=1):
            engine.run(request)
            if number % (len(SIZES) * len(TASKS)) == 0:
                seen.append(memory())
    return seen


def growth(seen: list[int]) -> float:
    """From the warm-up to the end, as a share."""
    return max(seen[-WARM:]) / max(seen[:WARM]) - 1


def one_heap() -> None:
    """All threads share one heap of malloc: which thread freed what in which order is chance, and keeps up to 7 MB more
    after one round than after another."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(ARENA_MAX, 1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--streamed", action="store_true")
    parser.add_argument("--json", type=Path)
    wish = parser.parse_args()
    one_heap()
    seen = measure(wish.requests, streamed() if wish.streamed else None)
    if len(seen) < 2 * WARM:
        parser.error(f"--requests must be at least {2 * WARM * len(SIZES) * len(TASKS)}")
    for number, size in enumerate(seen, start=1):
        print(f"round {number}: {size / 1e6:.1f} MB")
    print(f"growth after warm-up: {growth(seen):+.2%} over {wish.requests} requests")
    if wish.json:
        wish.json.write_text(json.dumps({"bytes": seen, "growth": growth(seen)}, indent=1), encoding="utf-8")
    return int(growth(seen) > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
