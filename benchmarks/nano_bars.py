"""How well nano writes: share of held-out lines read back exactly, and of asked colours that are right.

    python benchmarks/nano_bars.py [--model nano] [--signs 160] [--out DIR]

None of the texts was in training: held-out words on wide and on square signs, random strings on both, and
"anything": what training draws (words, numbers, prices, marks, lines with spaces, the shortest lines too). Each is
judged by PP-OCR with case and spaces ignored. The ceiling (the same judge on signs drawn by
rule, and on their reconstruction by the autoencoder) is printed beside. Writes results.json and contact sheets.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from lanting import Engine, Request
from lanting.evals.reading import hits, normalized_distance, read_lines, wilson
from lanting.train.sign_texts import is_held_out
from lanting.train.signs import COLORS, SQUARE, WIDE, Sign, SignMaker, render

SETS = {  # name: (canvas sizes, share of random strings, bar or None)
    "words, wide": ((WIDE,), 0.0, 0.93),
    "words, square": ((SQUARE,), 0.0, 0.80),
    "random strings": ((WIDE, SQUARE), 1.0, 0.75),
    "anything, wide": ((WIDE,), 0.0, None),
    "anything, square": ((SQUARE,), 0.0, None),
}
COLOR_BAR = 0.97


@dataclass
class Tally:
    lines: int = 0
    right: int = 0
    ceiling: int = 0
    vae: int = 0
    distance: list[float] = field(default_factory=list)
    colors: int = 0
    colors_right: int = 0


def choose(name: str, count: int) -> list[Sign]:
    """`count` signs of a set; the word sets keep only signs all of whose lines are held-out words."""
    sizes, share, _ = SETS[name]
    maker, rng = SignMaker(1, held_out=True, random_share=share), random.Random(f"bars {name}")
    signs: list[Sign] = []
    while len(signs) < count:
        sign = maker.sample(rng, size=sizes[len(signs) % len(sizes)])
        if not name.startswith("words") or all(line.isalpha() and is_held_out(line) for line in sign.lines):
            signs.append(sign)
    return signs


def draw(engine: Engine, signs: list[Sign], given: argparse.Namespace, seed: int, batch: int = 16) -> list[Image.Image]:
    """One picture per sign, signs of one size in one batch."""
    images: dict[int, Image.Image] = {}
    for size in {s.size for s in signs}:
        same = [i for i, s in enumerate(signs) if s.size == size]
        for at in range(0, len(same), batch):
            part = same[at : at + batch]
            prompts = tuple(signs[i].prompt for i in part)
            request = Request(prompts, size=size, steps=given.steps, guidance_scale=given.guidance, seed=seed + at)
            result = engine.run(request)
            images.update(zip(part, result.images, strict=True))
    return [images[i] for i in range(len(signs))]


def nearest(color: np.ndarray) -> str:
    return min(COLORS, key=lambda name: float(np.square(np.asarray(COLORS[name]) - color).sum()))


def colors_right(sign: Sign, image: Image.Image) -> list[bool]:
    """Ground: the median of the corners' tokens. Letters: the median of the pixels that rule says are fully letter."""
    pixels = np.asarray(image, dtype=np.float64)
    rule = np.asarray(render(sign), dtype=np.int64)
    letters = (np.abs(rule - np.asarray(COLORS[sign.letters])).sum(-1) == 0).nonzero()
    ground = (np.abs(rule - np.asarray(COLORS[sign.ground])).sum(-1) == 0).nonzero()
    asked = [nearest(np.median(pixels[ground], axis=0)) == sign.ground] if sign.ground in sign.prompt.lower() else []
    if sign.letters in sign.prompt.lower():
        asked.append(nearest(np.median(pixels[letters], axis=0)) == sign.letters)
    return asked


def reconstruct(engine: Engine, image: Image.Image) -> Image.Image:
    from lanting.tasks.pictures import pictures_from, pixels_of

    codec = engine.models.codec
    tokens = codec.encode(pixels_of(image, image.size, 3))
    return pictures_from(codec.decode(tokens.data, tokens.grid))[0]


def sheet(signs: list[Sign], images: list[Image.Image], path: Path, columns: int = 6) -> None:
    width, height = images[0].size
    rows = -(-len(images) // columns)
    page = Image.new("RGB", (columns * (width + 4), rows * (height + 4)), "white")
    for i, image in enumerate(images):
        page.paste(image, (i % columns * (width + 4), i // columns * (height + 4)))
    page.save(path)


def run(engine: Engine, name: str, given: argparse.Namespace) -> tuple[Tally, list]:
    sizes, out, ceiling = SETS[name][0], given.out, not given.no_ceiling
    signs = choose(name, given.signs)
    images = draw(engine, signs, given, seed=1000)
    tally, misses = Tally(), []
    for sign, image in zip(signs, images, strict=True):
        found = read_lines(image)
        right = hits(sign.lines, found)
        tally.lines += len(right)
        tally.right += sum(right)
        tally.distance.append(normalized_distance(sign.lines, found))
        asked = colors_right(sign, image)
        tally.colors += len(asked)
        tally.colors_right += sum(asked)
        if ceiling:
            rule = render(sign)
            tally.ceiling += sum(hits(sign.lines, read_lines(rule)))
            tally.vae += sum(hits(sign.lines, read_lines(reconstruct(engine, rule))))
        if not all(right):
            misses.append([sign.prompt, list(sign.lines), found])
    for size in sizes:
        some = [(s, i) for s, i in zip(signs, images, strict=True) if s.size == size][:36]
        sheet(
            [s for s, _ in some],
            [i for _, i in some],
            out / f"{name.replace(', ', '-').replace(' ', '-')}-{size[0]}.png",
        )
    return tally, misses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="nano")
    parser.add_argument("--signs", type=int, default=160)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--guidance", type=float)
    parser.add_argument("--only", help="sets whose name contains this")
    parser.add_argument("--no-ceiling", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("runs/bars"))
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    engine = Engine.open(given.model, device="cpu")
    table, colors = {}, [0, 0]
    for name, (_, _, bar) in SETS.items():
        if given.only and given.only not in name:
            continue
        tally, misses = run(engine, name, given)
        low, high = wilson(tally.right, tally.lines)
        colors = [colors[0] + tally.colors_right, colors[1] + tally.colors]
        table[name] = {
            "lines": tally.lines,
            "read": round(tally.right / tally.lines, 4),
            "interval": [round(low, 4), round(high, 4)],
            "bar": bar,
            "ceiling": round(tally.ceiling / tally.lines, 4) if tally.ceiling else None,
            "vae_ceiling": round(tally.vae / tally.lines, 4) if tally.vae else None,
            "distance": round(float(np.mean(tally.distance)), 4),
            "misses": misses[:20],
        }
        print(name, {k: v for k, v in table[name].items() if k != "misses"}, *misses[:8], sep="\n  ", flush=True)
    table["asked colours"] = {"n": colors[1], "right": round(colors[0] / max(1, colors[1]), 4), "bar": COLOR_BAR}
    print("asked colours", table["asked colours"])
    about = {
        "model": given.model,
        "steps": given.steps or engine.spec.defaults.steps,
        "guidance": given.guidance or engine.spec.defaults.guidance_scale,
        "torch": torch.__version__,
    }
    result = {**about, "python": platform.python_version(), "machine": platform.machine(), "sets": table}
    (given.out / "results.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
