"""What a draft says of the picture that is finished from it: nano with its Lightning, beside the whole nano.

    python benchmarks/drafts.py --out drafts.json [-n 60] [--plot drafts.png]

Prompts leave colours, texture and place open. A draft has 4 steps without guidance, the whole model 6 with guidance (12
passes). FLIP between a draft and the whole model's picture of the same seed, beside that of another seed, which is how
far apart two strangers are; then of finishes that begin at the draft itself (`--strength`). Processor seconds are of
whole requests, prompt to picture, in turn, one thread.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from PIL import Image

from lanting import Engine, Request
from lanting.evals.flip import flip
from lanting.reading.reader import read_lines

WORDS = ("Fresh Bread", "Open", "Honey", "The River", "Grand Opening", "Tea House", "Sale", "Books", "Music", "Garden")
FRAMES = ('a shop sign that says "{}"', 'a poster, "{}"', 'a label with a border, "{}"', 'a book cover, "{}"')
STRENGTHS = (0.8, 0.6)


def seen(image: Image.Image) -> torch.Tensor:
    return torch.tensor(np.asarray(image.convert("RGB")), dtype=torch.float64) / 255  # (H, W, 3)


def apart(one: Image.Image, other: Image.Image) -> float:
    return float(flip(seen(one), seen(other)).mean())


def drawn(engine: Engine, request: Request, spent: list[float]) -> Image.Image:
    began = time.process_time()
    image = engine.run(request).images[0]
    spent.append(time.process_time() - began)
    return image


def measure(n: int) -> tuple[dict[str, Any], list[tuple[Image.Image, ...]]]:
    rows: dict[str, list[float]] = {"same seed": [], "other seed": []} | {f"strength {s}": [] for s in STRENGTHS}
    right: dict[str, list[bool]] = {"draft": [], "whole": []} | {f"strength {s}": [] for s in STRENGTHS}
    seconds: dict[str, list[float]] = {"draft": [], "whole": []}
    shown = []
    with Engine.open("nano", loras=("lightning",)) as quick, Engine.open("nano") as whole:
        for index in range(n):
            words = WORDS[index % len(WORDS)]
            prompt = FRAMES[index % len(FRAMES)].format(words)
            draft = drawn(quick, Request(prompt, seed=index), seconds["draft"])
            full = drawn(whole, Request(prompt, seed=index), seconds["whole"])
            other = whole.run(Request(prompt, seed=index + 10_000)).images[0]
            rows["same seed"].append(apart(draft, full))
            rows["other seed"].append(apart(draft, other))
            pictures = [draft, full, other]
            for strength in STRENGTHS:
                begun = Request(prompt, task="image_to_image", images=(draft,), strength=strength, seed=index)
                pictures.append(whole.run(begun).images[0])
                rows[f"strength {strength}"].append(apart(draft, pictures[-1]))
            for name, image in zip(right, (pictures[0], pictures[1], *pictures[3:]), strict=True):
                right[name].append("".join(read_lines(image)).casefold() == words.replace(" ", "").casefold())
            shown.append(tuple(pictures))
    told = {
        "n": n,
        "FLIP from the draft": {name: round(mean(values), 3) for name, values in rows.items()},
        "nearer than the other seed": round(
            mean(a < b for a, b in zip(rows["same seed"], rows["other seed"], strict=True)), 3
        ),
        "words right": {name: round(mean(values), 3) for name, values in right.items()},
        "whole / draft, processor seconds": round(sum(seconds["whole"]) / sum(seconds["draft"]), 2),
    }
    return told, shown


def sheet(shown: list[tuple[Image.Image, ...]], path: Path, rows: int = 10) -> None:
    """A row a prompt: draft, the same seed in full, another seed in full, begun at the draft."""
    wide, high = shown[0][0].size
    whole = Image.new("RGB", ((wide + 8) * len(shown[0]), (high + 8) * rows), "white")
    for row, pictures in enumerate(shown[:rows]):
        for column, image in enumerate(pictures):
            whole.paste(image, (column * (wide + 8), row * (high + 8)))
    whole.save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("-n", type=int, default=60)
    parser.add_argument("--plot", type=Path)
    own = parser.parse_args()
    torch.set_num_threads(1)
    told, shown = measure(own.n)
    print(json.dumps(told, indent=1))
    own.out.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    if own.plot:
        sheet(shown, own.plot)


if __name__ == "__main__":
    main()
