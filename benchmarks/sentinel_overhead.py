"""What the sentinels cost when nothing is wrong: nano with and without them, one after the other, again and again.

    python benchmarks/sentinel_overhead.py [-n 60] [--out FILE.json]

Twice, with one thread and processor time of whole pictures: pairs in turn, the median of with by without and an
interval from resampling (wide on a busy machine); and by clocking the sentinels' own code while pictures are drawn,
which is no difference of two large numbers. The bound is 1 %. nano is the worst case: its steps are thousands of times
shorter than the full model's, and a check is as long for both but for the latents' size.
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
from typing import Any

import torch

import lanting.engine.engine as engine_module
from lanting import Engine, Request
from lanting.attach import safe_vae
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
    engine.models.prompts.clear()  # so that the text encoder is watched, too
    began = time.process_time()
    engine.run(ASKED)
    return time.process_time() - began


def interval(numbers: list[float]) -> tuple[float, float]:
    """95 % of the medians of resampled lists."""
    rng = random.Random(0)
    medians = sorted(median(rng.choices(numbers, k=len(numbers))) for _ in range(2000))
    return medians[50], medians[-51]


@contextmanager
def counted(spent: list[float]) -> Iterator[None]:
    """Adds to `spent` the seconds that sentinels take: begin, end, and every look. The rest of a call is drawing."""
    parts = [
        (Sentinel, "__init__"),
        (Sentinel, "__enter__"),
        (Sentinel, "__exit__"),
        (Sentinel, "sound"),
        (SafeVae, "__init__"),
        (SafeVae, "__enter__"),
        (SafeVae, "__exit__"),
        (safe_vae, "finite"),
        (engine_module, "key_of"),
    ]
    old = [getattr(owner, name) for owner, name in parts]

    def timed(work: Any) -> Any:
        def call(*args: Any, **more: Any) -> Any:
            began = time.process_time()
            try:
                return work(*args, **more)
            finally:
                spent.append(time.process_time() - began)

        return call

    for (owner, name), work in zip(parts, old, strict=True):
        setattr(owner, name, timed(work))
    try:
        yield
    finally:
        for (owner, name), work in zip(parts, old, strict=True):
            setattr(owner, name, work)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-n", type=int, default=60, help="pairs of pictures")
    parser.add_argument("--out", type=Path, default=RESULTS / "sentinel-overhead.json")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    library.use_threads(1)
    ratios = []
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
        spent: list[float] = []
        with counted(spent):
            whole = sum(seconds(engine) for _ in range(asked.n))
    low, high = interval(ratios)
    told = {
        "pairs": asked.n,
        "kernels": library.instruction_set(),
        "overhead": round(median(ratios) - 1, 5),
        "low": round(low - 1, 5),
        "high": round(high - 1, 5),
        "microseconds_a_picture": round(sum(spent) / asked.n * 1e6, 1),
        "share": round(sum(spent) / whole, 5),
    }
    asked.out.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    print("with by without: {overhead:+.2%} [{low:+.2%}, {high:+.2%}]".format(**told))
    print("in the sentinels: {microseconds_a_picture} µs a picture, {share:.2%} of its time".format(**told))


if __name__ == "__main__":
    main()
