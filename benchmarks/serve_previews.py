"""What previews cost a server's worker: nano with and without them, in turn, again and again.

    python benchmarks/serve_previews.py [-n 40] [--out FILE.json]

One thread, processor time of whole pictures as the worker draws them: the engine's previews, made into JPEG and a line
of JSON. "as served" has at most one in so many seconds, and that is what `lanting serve` does; "every step" is what it
would be without that. The share is what previews add, clocked in their own code while pictures are drawn, over the rest
of the picture: a difference of two whole pictures is larger than it by noise alone, and is given beside it with an
interval from resampling. The bound is 1 %. nano is the worst case: its steps are thousands of times shorter than the
full model's, and a preview is as long for both but for the latents' size.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

from lanting import Engine, Progress, Request, Result
from lanting.serve.worker import SIGHT, Bench, now_and_then, tell
from serve_load import machine

RESULTS = Path(__file__).parent / "results"
WORDS = 'a red sign with white text "Fresh Bread"'
CASES = {
    "224x96, guided": Request(WORDS, seed=3, steps=8, guidance_scale=2.0),
    "224x96, not guided": Request(WORDS, seed=3, steps=8, guidance_scale=1.0),
    "256x256, guided": Request(WORDS, seed=3, steps=8, guidance_scale=2.0, size=(256, 256)),
    "224x96, not guided, long": Request(WORDS, seed=3, steps=40, guidance_scale=1.0),
}


class Clock:
    """Adds up what previews take in the engine and in the worker."""

    def __init__(self, engine: Engine):
        self.engine, self.spent, self.count = engine, 0.0, 0
        self.preview = engine._preview

    def __enter__(self) -> Clock:
        self.engine._preview = self.timed(self.preview)  # type: ignore[method-assign]
        return self

    def __exit__(self, *exception: object) -> None:
        del self.engine.__dict__["_preview"]

    def timed(self, work: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            began = time.process_time()
            try:
                return work(*args)
            finally:
                self.spent += time.process_time() - began

        return call

    def tell(self, bench: Bench, event: Progress) -> None:
        """What the worker does with an event; less what it does with one that has no preview."""
        if event.preview is None:
            tell(bench, "job", event)
            return
        self.count += 1
        self.timed(tell)(bench, "job", event)


def drawn(engine: Engine, request: Request, previews: Any) -> tuple[float, float, int]:
    """(seconds of a picture, of them for previews, how many)."""
    bench = Bench(engine, io.StringIO().write, every=4)
    began = time.process_time()
    with Clock(engine) as clock:
        for event in engine.stream(request, previews):
            if not isinstance(event, Result):
                clock.tell(bench, event)
    return time.process_time() - began, clock.spent, clock.count


def interval(numbers: list[float]) -> list[float]:
    """95 % of the medians of resampled lists."""
    rng = random.Random(0)
    medians = sorted(median(rng.choices(numbers, k=len(numbers))) for _ in range(2000))
    return [round(medians[50], 4), round(medians[-51], 4)]


def measure(engine: Engine, request: Request, rounds: int) -> dict[str, Any]:
    """Both ways and none, in turn."""
    ways: dict[str, Callable[[], Any]] = {"as served": now_and_then, "every step": lambda: True}
    shares: dict[str, list[float]] = {name: [] for name in ways}
    ratios: dict[str, list[float]] = {name: [] for name in ways}
    counts: dict[str, list[int]] = {name: [] for name in ways}
    for _ in range(rounds):
        without, _, _ = drawn(engine, request, False)
        for name, way in ways.items():
            whole, spent, count = drawn(engine, request, way())
            shares[name].append(spent / (whole - spent))
            ratios[name].append(whole / without)
            counts[name].append(count)
    return {
        name: {
            "share": round(median(shares[name]), 5),
            "previews": median(counts[name]),
            "with / without": round(median(ratios[name]), 4),
            "with / without, 95 %": interval(ratios[name]),
        }
        for name in ways
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-n", type=int, default=40, help="rounds")
    parser.add_argument("--out", type=Path, default=RESULTS / "serve-previews.json")
    given = parser.parse_args()
    torch.set_num_threads(1)
    engine = Engine.open("nano", device="cpu")
    found = {}
    for name, request in CASES.items():
        drawn(engine, request, True)
        found[name] = measure(engine, request, given.n)
        print(name, json.dumps(found[name]), flush=True)
    table = {"machine": machine()}
    table |= {"seconds between previews": SIGHT, "rounds": given.n, "cases": found}
    given.out.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
