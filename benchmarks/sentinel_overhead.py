"""What the sentinels cost when nothing is wrong: nano with and without them, one after the other, again and again.

    python benchmarks/sentinel_overhead.py [-n 60] [--out FILE.json]

Pairs of pictures in turn, one thread; the median over pairs of processor time with by processor time without, of the
whole picture, with an interval from resampling; and what one check takes by itself, as a share of a step. The bound in
docs/quality.md is 1 %. nano is the worst case: its steps are thousands of times shorter than the full model's, and a
check is as long for both but for the latents' size.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import torch

from lanting import Engine, Request
from lanting.attach.safe_vae import SafeVae
from lanting.attach.sentinel import Sentinel
from lanting.kernels import library

RESULTS = Path(__file__).parent / "results"
ASKED = Request('a red sign with white text "Fresh Bread"', seed=3, steps=6, guidance_scale=2.0)


@contextmanager
def unwatched() -> Iterator[None]:
    """No sentinel does anything."""
    call, enter = Sentinel.__call__, SafeVae.__enter__
    Sentinel.__call__ = lambda self, ask, again: ask()  # type: ignore[method-assign]
    SafeVae.__enter__ = lambda self: self  # type: ignore[method-assign]
    try:
        yield
    finally:
        Sentinel.__call__, SafeVae.__enter__ = call, enter  # type: ignore[method-assign]


def seconds(engine: Engine) -> float:
    began = time.process_time()
    engine.run(ASKED)
    return time.process_time() - began


def interval(numbers: list[float]) -> tuple[float, float]:
    """95 % of the medians of resampled lists."""
    rng = random.Random(0)
    medians = sorted(median(rng.choices(numbers, k=len(numbers))) for _ in range(2000))
    return medians[50], medians[-51]


def one_check() -> float:
    """Seconds of looking at one velocity of nano's usual size."""
    watch = Sentinel({}, torch.bfloat16, {})
    velocity = torch.randn(1, 84, 64).bfloat16()
    began = time.process_time()
    for _ in range(2000):
        watch.sound(velocity)
    return (time.process_time() - began) / 2000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-n", type=int, default=60, help="pairs of pictures")
    parser.add_argument("--out", type=Path, default=RESULTS / "sentinel-overhead.json")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    library.use_threads(1)
    ratios, plain = [], []
    with Engine.open("nano", device="cpu") as engine:
        engine.run(ASKED)
        for index in range(asked.n):
            if index % 2:
                watched = seconds(engine)
            with unwatched():
                without = seconds(engine)
            if not index % 2:
                watched = seconds(engine)
            ratios.append(watched / without)
            plain.append(without)
    low, high = interval(ratios)
    check = one_check()
    steps = ASKED.steps or 1
    told = {
        "pairs": asked.n,
        "kernels": library.instruction_set(),
        "overhead": round(median(ratios) - 1, 5),
        "low": round(low - 1, 5),
        "high": round(high - 1, 5),
        "check_microseconds": round(check * 1e6, 1),
        "checks_of_a_picture": round(steps * check / median(plain), 5),
    }
    asked.out.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    print("overhead {overhead:+.2%} [{low:+.2%}, {high:+.2%}]".format(**told))
    print("a check takes {check_microseconds} µs; a picture's: {checks_of_a_picture:.2%} of it".format(**told))


if __name__ == "__main__":
    main()
