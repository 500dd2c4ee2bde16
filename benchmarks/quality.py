"""What `--quality` costs and gains on nano: time, and how near the pictures come to the exact ones, in one run.

    python benchmarks/quality.py [-n 40] [--settings 0 1 2] [--first 3] [--out FILE.json] [--plot FILE.png]
    python benchmarks/quality.py --from FILE.json --plot FILE.png   # only the plot

Every picture is drawn at every level, one after the other and in another order each time, so that whatever else the
machine does meets all of them alike; beside them stands the exact way with fewer steps, which is the other way to be
sooner. Time is processor time of the steps alone, one thread, as a share of the exact way's. FLIP and SSIMULACRA2
compare with the exact picture; `read` is the share of lines that an optical reader reads, `done` that of edits that
were made. `off` is what the latents are really off by, in the unit of the budget, `forecast` what was expected, and
`beyond` how many pictures are off by more than the level's budget for the mean.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from ssimulacra2 import compute_ssimulacra2
from torch import Tensor

from lanting import Engine, Request
from lanting.core.quality import LEVELS
from lanting.core.types import Progress, Result
from lanting.evals.draw import by_rule
from lanting.evals.edit import is_done
from lanting.evals.flip import mean_flip
from lanting.evals.ocr import judges
from lanting.evals.scores import compare, share_of
from lanting.evals.sets import Case, edit_cases, text_cases
from lanting.flow import budget
from lanting.kernels import library

RESULTS = Path(__file__).parent / "results"
KINDS = ("rewrite", "translate", "ground", "letters", "add", "remove", "move")
INK = {"level": "#1f5fbf", "fewer": "#c8372d"}


@dataclass(frozen=True)
class Way:
    """One way of drawing: a level, or exact with a share of the steps."""

    name: str
    quality: str = "exact"
    share: float = 1.0


@dataclass(frozen=True)
class Setting:
    """What is drawn; None: the release's own."""

    name: str
    edits: bool
    steps: int | None
    guidance: float | None


SETTINGS = (
    Setting("20 steps, guidance 2", False, 20, 2.0),
    Setting("6 steps, guidance 2 (nano's own)", False, None, None),
    Setting("edits, 20 steps, no guidance", True, 20, 1.0),
)
WAYS = (*(Way(name, name) for name in LEVELS), Way("fewer 0.8", share=0.8), Way("fewer 0.6", share=0.6))


@dataclass(frozen=True)
class Shot:
    """One picture drawn one way."""

    image: Image.Image
    latents: Tensor  # (1, N, C)
    seconds: float  # of the processor, for the steps
    words: tuple[str, ...]
    forecast: float


class Bench:
    """nano, its latents as they come to be decoded, and a reader."""

    def __init__(self) -> None:
        self.engine = Engine.open("nano", device="cpu")
        self.seen: list[Tensor] = []
        codec = self.engine.models.codec
        decode = codec.decode
        codec.decode = lambda tokens, grid: (self.seen.append(tokens.float()), decode(tokens, grid))[1]  # type: ignore[method-assign]
        self.judge = judges(("pp",), "en")[0][0]

    def shoot(self, case: Case, seed: int, setting: Setting, way: Way) -> Shot:
        steps = setting.steps or self.engine.spec.defaults.steps
        sources = tuple(by_rule(case.sources))
        asked = Request(
            case.prompt,
            images=sources,
            size=None if sources else case.design.size,
            seed=seed,
            steps=max(1, round(steps * way.share)),
            guidance_scale=setting.guidance,
            quality=way.quality,
        )
        began = ended = time.process_time()
        for event in self.engine.stream(asked):
            if isinstance(event, Progress) and event.phase in ("load", "encode"):
                began = time.process_time()
            elif isinstance(event, Progress) and event.phase == "denoise":
                ended = time.process_time()
            elif isinstance(event, Result):
                chosen = event.recipes[0].request.get("choices", {})
                words = tuple(str(chosen.get("steps", "")).split())
                return Shot(event.images[0], self.seen.pop(), ended - began, words, float(chosen.get("error", 0)))
        raise RuntimeError("the engine ended without a result")

    def right(self, case: Case, image: Image.Image) -> tuple[float, int]:
        """(right, of): lines read, or the edit done."""
        if case.edit is not None:
            return float(is_done(image.convert("RGB"), case, self.judge)), 1
        found = compare(case.lines, self.judge.read(image, case.script))
        return float(found.lines_right), found.lines


def off(latents: Tensor, exact: Tensor) -> float:
    """Difference of the latents by the length of what was walked: noise minus picture, root of one plus its square."""
    return float((latents - exact).square().mean().sqrt() / (1 + exact.square().mean()).sqrt())


def flip_of(one: Image.Image, other: Image.Image) -> float:
    return mean_flip(torch.from_numpy(np.array(one)), torch.from_numpy(np.array(other)))


def ssimulacra2_of(one: Image.Image, other: Image.Image) -> float:
    files = [BytesIO(), BytesIO()]
    for image, file in zip((one, other), files, strict=True):
        image.save(file, "PNG")
        file.seek(0)
    return float(compute_ssimulacra2(files[0], files[1]))


def passes(words: tuple[str, ...], blocks: int) -> float:
    """Passes through all blocks; the first block alone is a share of one."""
    cost = {"F": 1.0, "C": 1 / blocks, "L": 1 / blocks}
    return sum(cost.get(letter.upper(), 0.0) for word in words for letter in word)


def measure(bench: Bench, setting: Setting, count: int) -> dict[str, dict[str, Any]]:
    """Every way's row."""
    cases = edit_cases(KINDS, count, seed=11) if setting.edits else text_cases("words", "en", count, seed=11)
    rows: dict[str, defaultdict[str, list[Any]]] = {way.name: defaultdict(list) for way in WAYS}
    for index, case in enumerate(cases):
        turn = [*WAYS[index % len(WAYS) :], *WAYS[: index % len(WAYS)]]
        shots = {way.name: bench.shoot(case, index, setting, way) for way in turn}
        exact = shots["exact"]
        for name, shot in shots.items():
            row = rows[name]
            row["seconds"].append(shot.seconds)
            row["share"].append(shot.seconds / exact.seconds)
            row["right"].append(bench.right(case, shot.image))
            row["flip"].append(flip_of(shot.image, exact.image))
            row["off"].append(off(shot.latents, exact.latents))
            row["forecast"].append(shot.forecast)
            row["ssimulacra2"].append(100.0 if name == "exact" else ssimulacra2_of(shot.image, exact.image))
            row["words"].append(shot.words)
        print(f"{setting.name}: {index + 1}/{len(cases)}", end="\r", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return {way.name: summary(rows[way.name], LEVELS[way.quality].mean) for way in WAYS}


def summary(row: defaultdict[str, list[Any]], most: float) -> dict[str, Any]:
    table: dict[str, Any] = {"pictures": len(row["flip"]), "time": round(median(row["share"]), 3)}
    table |= {name: round(mean(row[name]), 4) for name in ("flip", "ssimulacra2", "off", "forecast")}
    table |= {f"{name} worst": round(max(row[name]), 4) for name in ("flip", "off", "forecast")}
    if most:
        table["beyond"] = sum(off > most for off in row["off"])
    table["right"] = share_of(*zip(*row["right"], strict=True)).as_json()
    if row["words"][0]:
        both = sum(len(row["words"][0][0]) for _ in row["words"][0])
        table["passes nano"] = round(mean(passes(words, 6) for words in row["words"]) / both, 3)
        table["passes 60 blocks"] = round(mean(passes(words, 60) for words in row["words"]) / both, 3)
        table["words"] = " ".join(row["words"][0])
    return table


def table_of(rows: dict[str, dict[str, Any]]) -> str:
    lines = ["| | time | of 60 blocks | FLIP | worst | SSIM2 | right | off | worst | forecast | beyond |"]
    lines.append("|" + "---|" * 11)
    for name, row in rows.items():
        right = "{share:.0%} [{low:.0%}, {high:.0%}]".format(**row["right"])
        blocks = f"{row['passes 60 blocks']:.2f}" if "passes 60 blocks" in row else ""
        numbers = f"{row['flip']:.4f} | {row['flip worst']:.4f} | {row['ssimulacra2']:.1f} | {right}"
        beyond = f"{row['beyond']} of {row['pictures']}" if "beyond" in row else ""
        off = f"{row['off']:.4f} | {row['off worst']:.4f} | {row['forecast']:.4f} | {beyond}"
        lines.append(f"| {name} | {row['time']:.2f} | {blocks} | {numbers} | {off} |")
    return "\n".join(lines)


def plot(told: dict[str, Any], path: Path) -> None:
    """A panel for each setting: FLIP over time. Blue is the dial, red the exact way with fewer steps."""
    wide, high, left, top = 400, 330, 58, 70
    names = list(told["settings"])
    sheet = Image.new("RGB", (len(names) * wide + 10, high + 20), "white")
    draw, font, small = ImageDraw.Draw(sheet), ImageFont.load_default(15), ImageFont.load_default(13)
    title = "FLIP from the exact picture over processor time as a share of its.  Blue: --quality;  red: fewer steps"
    draw.text((left - 40, 10), title, "#000", font)
    most = max(row["flip"] for rows in told["settings"].values() for row in rows.values()) * 1.15
    for index, name in enumerate(names):
        panel = Panel(index * wide + left, top, wide - left - 12, high - top - 24, most)
        panel.frame(draw, small, name)
        for kind, ink in INK.items():
            panel.series(draw, small, told["settings"][name], kind, ink)
    sheet.save(path)


@dataclass(frozen=True)
class Panel:
    """One setting's square on the sheet: time from 0.25 to 1.08 to the right, FLIP up to `most`."""

    x: int
    y: int
    width: int
    height: int
    most: float

    def at(self, time: float, flip: float) -> tuple[float, float]:
        return self.x + (time - 0.25) / 0.83 * self.width, self.y + self.height * (1 - flip / self.most)

    def frame(self, draw: Any, font: Any, name: str) -> None:
        bottom = self.y + self.height
        draw.text((self.x, self.y - 22), name, "#000", ImageFont.load_default(14))
        for tick in (0.4, 0.6, 0.8, 1.0):
            x = self.at(tick, 0)[0]
            draw.line([(x, self.y), (x, bottom)], fill="#eee")
            draw.text((x, bottom + 6), f"{tick:.1f}", "#333", font, anchor="ma")
        for step in range(0, int(self.most * 100) + 1):
            y = self.at(0.25, step / 100)[1]
            draw.line([(self.x, y), (self.x + self.width, y)], fill="#eee")
            draw.text((self.x - 6, y), f"{step / 100:.2f}", "#333", font, anchor="rm")
        draw.rectangle((self.x, self.y, self.x + self.width, bottom), outline="#999")

    def series(self, draw: Any, font: Any, rows: dict[str, dict[str, Any]], kind: str, ink: str) -> None:
        own = [name for name in rows if name == "exact" or name.startswith("fewer") == (kind == "fewer")]
        points = sorted((self.at(rows[name]["time"], rows[name]["flip"]), name) for name in own)
        draw.line([point for point, _ in points], fill=ink, width=2)
        for (x, y), name in points:
            draw.ellipse((x - 4, y - 4, x + 4, y + 4), fill=ink)
            if name == "exact":
                draw.text((x - 8, y - 3), name if kind == "level" else "", INK["level"], font, anchor="rb")
            elif kind == "level" and y > self.y + self.height - 16:
                draw.text((x, y - 20), name, ink, font, anchor="mb")
            elif kind == "level":
                draw.text((x - 8, y + 2), name, ink, font, anchor="ra")
            else:
                draw.text((x + 8, y - 3), f"{name.removeprefix('fewer ')} of the steps", ink, font, anchor="lb")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-n", type=int, default=40, help="pictures for each level")
    parser.add_argument("--settings", nargs="*", type=int, default=[0, 1, 2], help="which of the three")
    parser.add_argument("--first", type=int, default=budget.FIRST, help="steps that are always computed")
    parser.add_argument("--out", type=Path, default=RESULTS / "quality.json")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--from", dest="from_", type=Path, help="take the numbers from this file")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    library.use_threads(1)
    if asked.from_ is None:
        told: dict[str, Any] = {"model": "nano", "n": asked.n, "kernels": library.instruction_set(), "settings": {}}
        told["levels"] = {name: {"step": q.step, "mean": q.mean, "age": q.age} for name, q in LEVELS.items()}
        bench = Bench()
        budget.FIRST = asked.first
        for setting in (SETTINGS[index] for index in asked.settings):
            told["settings"][setting.name] = measure(bench, setting, asked.n)
            asked.out.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    else:
        told = json.loads(asked.from_.read_text(encoding="utf-8"))
    for name, rows in told["settings"].items():
        print(f"\n{name}\n\n{table_of(rows)}")
    if asked.plot:
        plot(told, asked.plot)


if __name__ == "__main__":
    main()
