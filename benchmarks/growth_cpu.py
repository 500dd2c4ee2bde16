"""How time and memory of a full-width block grow from 256 x 256 to 2048 x 2048 pixels, against its own operations.

    python benchmarks/growth_cpu.py [--sides 256 512 ...] [--kind "int4 64"] [--out FILE.json] [--plot FILE.png]

Each size runs in a process of its own: seconds of processor time (the better of two after one to warm up, one thread)
and what the resident set grew by over loading. Fitted are seconds = a + b * operations of the Linears + c * operations
of attention, by least squares of relative errors; 1 / b and 1 / c are the rates at which each kind of work is done.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from block_cpu import TEXT, WIDTH, oracle, ours, packed
from lanting.kernels import library
from lanting.nn.mmdit import Context
from lanting.nn.rope import RopeCache

SIDES = (256, 512, 768, 1024, 1328, 1536, 2048)
PIXELS = 16  # of a token's side
INK = {"time": "#1f5fbf", "gigabytes": "#c8372d"}


def operations(side: int) -> tuple[float, float]:
    """(of the Linears, of attention) for a square picture."""
    tokens = (side // PIXELS) ** 2 + TEXT
    return 2.0 * 12 * WIDTH**2 * tokens, 4.0 * tokens**2 * WIDTH


@torch.inference_mode()
def one(side: int, kind: str) -> dict[str, float]:
    """Time and memory of one size, in this process."""
    torch.set_num_threads(1)
    library.use_threads(1)
    block = ours(dict(oracle().state_dict()), torch.randn(1, 1, WIDTH).bfloat16(), packed(kind))
    rows = side // PIXELS
    ctx = Context(torch.zeros(1, 1, WIDTH), rows * rows, RopeCache((16, 56, 56), False)(((1, rows, rows),), TEXT, CPU))
    img, txt = (torch.randn(1, n, WIDTH).bfloat16() for n in (rows * rows, TEXT))
    before = resident()
    seconds = []
    for _ in range(3):
        began = time.process_time()
        block(img, txt, ctx)
        seconds.append(time.process_time() - began)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"seconds": min(seconds[1:]), "bytes": max(0, peak - before)}


CPU = torch.device("cpu")


def resident() -> int:
    """What is in memory now; the peak so far is made to be that (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def fit(rows: list[dict[str, Any]]) -> dict[str, float]:
    """The three numbers, and the largest relative error of what they predict."""
    work = np.array([[1.0, *operations(row["side"])] for row in rows])
    seconds = np.array([row["seconds"] for row in rows])
    found = np.linalg.lstsq(work / seconds[:, None], np.ones(len(rows)), rcond=None)[0]
    worst = float(np.abs(work @ found / seconds - 1).max())
    fixed, linears, attention = map(float, found)
    return {"fixed": fixed, "linears_gflops": 1e-9 / linears, "attention_gflops": 1e-9 / attention, "worst": worst}


def plot(rows: list[dict[str, Any]], fitted: dict[str, float], path: Path) -> None:
    """Time, that of the first size being 1, and gigabytes over operations, all logarithmic; the line is the fit."""
    width, height, left, top = 760, 420, 70, 40
    sheet = Image.new("RGB", (width, height), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    tera = [sum(operations(row["side"])) / 1e12 for row in rows]
    one = rows[0]["seconds"]
    series = {"time": [r["seconds"] / one for r in rows], "gigabytes": [r["bytes"] / 1e9 for r in rows]}
    low, high = min(map(min, series.values())) / 1.5, max(map(max, series.values())) * 1.5

    def at(x: float, y: float) -> tuple[float, float]:
        u = np.log(x / tera[0]) / np.log(tera[-1] / tera[0])
        v = np.log(y / low) / np.log(high / low)
        return left + u * (width - left - 110), height - 50 - v * (height - 50 - top)

    draw.rectangle((left - 10, top - 10, width - 100, height - 45), outline="#bbb")
    for x, row in zip(tera, rows, strict=True):
        place = at(x, low)
        draw.text((place[0], height - 40), f"{row['side']} px", "#333", font, anchor="ma")
        draw.text((place[0], height - 22), f"{x:.2g} T", "#777", font, anchor="ma")
    for exponent in range(int(np.floor(np.log10(low))), int(np.ceil(np.log10(high))) + 1):
        if low < 10.0**exponent < high:
            draw.text((left - 16, at(tera[0], 10.0**exponent)[1]), f"{10.0**exponent:g}", "#333", font, anchor="rm")
    for name, values in series.items():
        for x, y in zip(tera, values, strict=True):
            u, v = at(x, y)
            draw.ellipse((u - 4, v - 4, u + 4, v + 4), fill=INK[name])
        draw.text((width - 92, at(tera[-1], values[-1])[1]), name, INK[name], font, anchor="lm")
    predicted = [
        (fitted["fixed"] + a / fitted["linears_gflops"] / 1e9 + b / fitted["attention_gflops"] / 1e9) / one
        for a, b in (operations(row["side"]) for row in rows)
    ]
    draw.line([at(x, y) for x, y in zip(tera, predicted, strict=True)], fill=INK["time"], width=1)
    title = "One block of 60 at 4 bits: by the side of a square picture, and tera-operations with 128 words"
    draw.text((left, 8), title, "#000", font)
    sheet.save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sides", type=int, nargs="+", default=list(SIDES))
    parser.add_argument("--kind", default="int4 64")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--plot", type=Path)
    asked = parser.parse_args()
    if asked.one:
        print(json.dumps(one(asked.one, asked.kind)))
        return
    rows = []
    for side in asked.sides:
        command = [sys.executable, __file__, "--one", str(side), "--kind", asked.kind]
        told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        rows.append({"side": side, **json.loads(told.strip().splitlines()[-1])})
        linears, attention = operations(side)
        rate = (linears + attention) / rows[-1]["seconds"] / 1e9
        print(f"{side:5d}² {rate:5.0f} GFLOP/s  {rows[-1]['bytes'] / 1e6:8.0f} MB", flush=True)
    fitted = fit(rows)
    print({name: round(value, 4) for name, value in fitted.items()})
    if asked.out:
        about = {"kind": asked.kind, "kernels": library.instruction_set(), "fit": fitted}
        asked.out.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")
    if asked.plot:
        plot(rows, fitted, asked.plot)


if __name__ == "__main__":
    main()
