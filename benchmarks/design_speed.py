"""How many labelled designs one core makes a second: choosing and phrasing them, drawing them, both.

    python benchmarks/design_speed.py [--batch 64] [--batches 8] [--rounds 10]

Prints the median and the best of the rounds in processor time, which other work on the machine disturbs little but
not at all: caches and cores are shared. Drawing ends with uint8 pictures in memory; the atlas is loaded before.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable
from statistics import median

import torch

from lanting.train.atlas import default_atlas
from lanting.train.design import WIDE
from lanting.train.designs import DesignMaker, Labelled
from lanting.train.draw import render

SIZES = ((128, 128), WIDE, (192, 192))
REQUIRED = 2000  # labelled pictures a second per core at 128 x 128


def seconds(work: Callable[[], object]) -> float:
    begin = time.process_time()
    work()
    return time.process_time() - begin


def measure(size: tuple[int, int], batch: int, batches: int, rounds: int) -> dict[str, tuple[float, float]]:
    """Pictures a second, median and best, of sampling, drawing and both."""
    maker, rng = DesignMaker(1), random.Random(5)
    drawn: list[Labelled] = []
    times: dict[str, list[float]] = {"sampling": [], "drawing": [], "both": []}

    def sample() -> None:
        drawn[:] = [maker.sample(rng, size) for _ in range(batch * batches)]

    def draw() -> None:
        for at in range(0, len(drawn), batch):
            render([labelled.design for labelled in drawn[at : at + batch]])

    for _ in range(rounds + 1):
        parts = seconds(sample), seconds(draw)
        for name, spent in zip(times, (*parts, sum(parts)), strict=True):
            times[name].append(spent)
    count = batch * batches
    return {name: (count / median(all_of[1:]), count / min(all_of[1:])) for name, all_of in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--batches", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=10)
    given = parser.parse_args()
    torch.set_num_threads(1)
    default_atlas()
    for size in SIZES:
        found = measure(size, given.batch, given.batches, given.rounds)
        rates = ", ".join(f"{name} {mid:.0f}/s (best {best:.0f})" for name, (mid, best) in found.items())
        share = f"; {found['both'][0] / REQUIRED:.2f} of what is required" if size == (128, 128) else ""
        print(f"{size[0]} x {size[1]}: {rates}{share}", flush=True)


if __name__ == "__main__":
    main()
