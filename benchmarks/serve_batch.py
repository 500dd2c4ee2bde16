"""What jobs gain by sharing their steps: the same jobs one by one and together, in turn, again and again.

    python benchmarks/serve_batch.py [-n 9] [--out FILE.json]

nano on one thread, prompts of different length; a number above 1 means that a job costs so many times less processor
time together. Three measurements: "steps", one step of so many drawings against the same steps alone; "jobs", whole
pictures, prompt and decoding included, by the engine; "served", whole jobs through two live servers, one with
`--batch 1`, by the processor time of their workers. "1" is what the way there costs a drawing that finds no company.
Bits are compared: every picture must be the one drawn alone.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from lanting import Engine, Request, Result
from lanting.engine.together import Seat
from lanting.flow.loop import velocity

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "serve")]

from fakeserve import Server, running, wait_for  # noqa: E402

from serve_load import machine  # noqa: E402

WORDS = (
    'a red sign that says "STAY"',
    'a blue sign with white text "Fresh Bread and Coffee" and a border',
    "绿色招牌“茶馆”，白色的字",
    "a sign",
    'a yellow sign that says "HELLO WORLD" in black',
    "green",
    "a big red sign with stars",
    'a white sign that says "OPEN"',
)
SIZES = ((128, 64), (128, 128), (224, 96), (192, 192), (256, 256))
TICKS = os.sysconf("SC_CLK_TCK")


def wishes(size: tuple[int, int], count: int, guidance: float = 2.0) -> list[Request]:
    return [Request(WORDS[i], size=size, seed=i, guidance_scale=guidance) for i in range(count)]


def alone(engine: Engine, asked: Sequence[Request]) -> tuple[float, list[Result]]:
    began = time.process_time()
    found = [engine.run(one) for one in asked]
    return time.process_time() - began, found


def together(engine: Engine, asked: Sequence[Request]) -> tuple[float, list[Result]]:
    began, found = time.process_time(), dict[Seat, Result]()
    with closing(engine.together()) as shared:
        seats = [shared.join(one, every=0) for one in asked]
        while shared.seats:
            found |= {seat: event for seat, event in shared.round() if isinstance(event, Result)}
            assert not shared.apart, shared.apart
    return time.process_time() - began, [found[seat] for seat in seats]


def steps(engine: Engine, asked: Sequence[Request], rounds: int) -> float:
    """Of one step, from noise."""
    ratios: list[float] = []
    with closing(engine.together()) as shared:
        for one in asked:
            shared.join(one, every=0)
        for _ in shared.round():
            pass
        seats = list(shared.seats)
        questions = [seat.drawing.asks for seat in seats]
        net = engine.models.transformer
        for _ in range(rounds):
            began = time.process_time()
            with torch.no_grad():
                for each in questions:
                    assert each is not None
                    velocity(net, each.canvas, each.latents, each.sigma)
            middle = time.process_time()
            shared._answer(seats)
            ratios.append((middle - began) / (time.process_time() - middle))
    return median(ratios)


def jobs(engine: Engine, asked: Sequence[Request], rounds: int) -> float:
    """Of whole pictures."""
    ratios: list[float] = []
    together(engine, asked)  # where it is proved that bits stay
    for _ in range(rounds):
        single, before = alone(engine, asked)
        shared, after = together(engine, asked)
        ratios.append(single / shared)
        for one, other in zip(before, after, strict=True):
            assert np.array_equal(np.asarray(one.images[0]), np.asarray(other.images[0])), "bits differ"
    return median(ratios)


def spent(server: Server) -> float:
    """Processor seconds of a server's worker."""
    children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text().split()
    fields = Path(f"/proc/{children[0]}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def drawn(server: Server, size: tuple[int, int], turn: int) -> float:
    """Seconds of eight jobs that wait together."""
    began = spent(server)
    body = {"size": f"{size[0]}x{size[1]}", "guidance_scale": 2.0}
    ids = [server.submit(words, seed=turn, **body)["id"] for words in WORDS]
    for one in ids:
        server.ended(one, 120)
    return spent(server) - began


def served(rounds: int) -> dict[str, float]:
    """Of whole jobs, through servers."""
    how: dict[str, Any] = {"opener": "lanting.serve.worker:open_engine", "options": {"device": "cpu"}}
    found: dict[str, float] = {}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        off, auto = (stack.enter_context(running(folder / str(b), **how, batch=b)) for b in (1, None))
        for server in (off, auto):
            wait_for(lambda server=server: server.get("/readyz").status_code == 200, 60)
        for size in SIZES:
            for server in (off, auto):
                drawn(server, size, 0)
            ratios = [drawn(off, size, turn) / drawn(auto, size, turn) for turn in range(1, rounds + 1)]
            found[f"{size[0]}x{size[1]}"] = round(median(ratios), 3)
            print("served", size, found[f"{size[0]}x{size[1]}"], flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-n", type=int, default=9, help="rounds")
    parser.add_argument("--out", type=Path, default=RESULTS / "serve-batch.json")
    given = parser.parse_args()
    torch.set_num_threads(1)
    engine = Engine.open("nano", device="cpu")
    warm = engine.run(Request("a sign", steps=1))
    table: dict[str, Any] = {
        "machine": machine(),
        "kernels": warm.recipes[0].versions.get("kernels"),
        "rounds": given.n,
        "sizes": {},
    }
    for size in SIZES:
        room = engine.room(wishes(size, 1)[0])
        row: dict[str, Any] = {"together at most": room}
        for count in sorted({1, 2, 4, min(room, len(WORDS))}):
            asked = wishes(size, count)
            row[str(count)] = {what.__name__: round(what(engine, asked, given.n), 3) for what in (steps, jobs)}
        table["sizes"][f"{size[0]}x{size[1]}"] = row
        print(size, json.dumps(row), flush=True)
    engine.close()
    table["served, 8 waiting"] = served(given.n)
    given.out.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
