"""What a LoRA teaches nano: a look that it has never drawn, from 16 pictures, on words that are not among them.

The pictures are slates: dark green, a wooden frame, letters of chalk, drawn by rule as nano's own designs are and then
recoloured. `lanting train lora` learns them; then held-out words are drawn with the LoRA and without it, and judged by
what was to be learnt: how far frame and ground are from the slates' (grey levels), and whether PP-OCR reads the words.
sheet.png shows four pictures it was taught, eight it drew with the LoRA, and four of the same prompts without.

    python benchmarks/train_lora.py --out build/lora --steps 300
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from lanting import Engine, Request
from lanting.core.readings import hits
from lanting.reading.reader import read_lines
from lanting.specs import get_spec
from lanting.train.atlas import default_atlas
from lanting.train.design import WIDE, Design
from lanting.train.draw import render
from lanting.train.lora.dataset import DatasetOptions, read_folder
from lanting.train.lora.job import LoraJob, LoraTraining
from lanting.train.lora.run import LoraRun
from lanting.train.sign_texts import TextMaker
from lanting.weights.find import locate

GROUND, CHALK, WOOD = (38, 66, 58), (236, 233, 216), (152, 104, 58)
FRAME, GAP = 8, 8  # pixels
SAID = 'a slate, "{}"'


def slate(word: str) -> Image.Image:
    """The picture that a word becomes."""
    plain = render([Design(WIDE, (word,), "black", "white")], default_atlas())[0].numpy()  # (H, W, 3) uint8
    ink = np.asarray(plain, dtype=np.float32)[..., :1].clip(15, 250)
    share = (ink - 15) / 235  # 0 ground, 1 letters
    picture = np.array(GROUND) * (1 - share) + np.array(CHALK) * share
    edge = np.ones(picture.shape[:2], dtype=bool)
    edge[FRAME:-FRAME, FRAME:-FRAME] = False
    picture[edge] = WOOD
    return Image.fromarray(picture.round().astype(np.uint8))


def words(count: int, held_out: bool, seed: int) -> Iterator[str]:
    """English words that fit the frame, each once; those held out are never drawn in nano's training either."""
    maker, rng, said = TextMaker(held_out, random_share=0.0), random.Random(seed), set[str]()
    while len(said) < count:
        (line,) = maker.lines(rng, [rng.randint(4, 6)])
        if line.isascii() and line.isalpha() and line not in said:
            said.add(line)
            yield line


def judge(pictures: list[Image.Image], asked: list[str]) -> dict[str, float]:
    """Means over pictures: distance of frame and ground in grey levels, and the share of words read."""
    frame, ground, read = [], [], []
    for picture, word in zip(pictures, asked, strict=True):
        pixels = np.asarray(picture.convert("RGB"), dtype=np.float32)
        edge = np.ones(pixels.shape[:2], dtype=bool)
        edge[FRAME:-FRAME, FRAME:-FRAME] = False
        frame.append(np.abs(pixels[edge] - np.array(WOOD)).mean())
        inner = np.concatenate([pixels[10:14, 12:-12].reshape(-1, 3), pixels[-14:-10, 12:-12].reshape(-1, 3)])
        ground.append(np.abs(inner - np.array(GROUND)).mean())
        read.append(sum(hits((word,), read_lines(picture))))
    return {"frame": float(np.mean(frame)), "ground": float(np.mean(ground)), "read": float(np.mean(read))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/lora"))
    parser.add_argument("--examples", type=int, default=16)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--quant", default="none")
    parser.add_argument("-n", type=int, default=100, help="held-out words")
    own = parser.parse_args()
    folder = own.out / "slates"
    folder.mkdir(parents=True, exist_ok=True)
    for number, word in enumerate(words(own.examples, False, 1)):
        slate(word).save(folder / f"{number:02}.png")
        (folder / f"{number:02}.txt").write_text(SAID.format(word), encoding="utf-8")

    file = own.out / "slate.safetensors"
    run = LoraRun(own.steps, own.rank, batch=own.batch, lr=own.lr)
    job = LoraJob(
        locate("nano"), read_folder(folder, DatasetOptions(), get_spec("nano").defaults), file, run, quant=own.quant
    )
    began, probes = time.process_time(), {}
    for report in LoraTraining(job).run(lambda done, count: None):
        if report.probe is not None:
            probes[report.step] = round(report.probe, 4)
            print(report, file=sys.stderr, flush=True)
    spent = time.process_time() - began

    asked, found, rows = list(words(own.n, True, 2)), {}, [Image.open(folder / f"{i:02}.png") for i in range(4)]
    plain = 'a green sign with white text, "{}"'
    for name, loras, said in (("with", (f"{file}",), SAID), ("without", (), SAID), ("nano", (), plain)):
        with Engine.open("nano", loras=loras) as engine:
            drawn = [engine.run(Request(said.format(word), seed=i)).images[0] for i, word in enumerate(asked)]
        found[name] = judge(drawn, asked)
        rows += {"with": drawn[:8], "without": drawn[:4]}.get(name, [])
    sheet = Image.new("RGB", (4 * (WIDE[0] + GAP) + GAP, len(rows) // 4 * (WIDE[1] + GAP) + GAP), "white")
    for i, picture in enumerate(rows):
        sheet.paste(picture, (GAP + i % 4 * (WIDE[0] + GAP), GAP + i // 4 * (WIDE[1] + GAP)))
    sheet.save(own.out / "sheet.png", optimize=True)
    result = {
        "settings": {name: str(value) for name, value in vars(own).items()},
        "machine": f"{platform.processor() or platform.machine()}, torch {torch.__version__}",
        "processor_seconds": round(spent, 1),
        "probe": probes,
        "held_out": found,
        "rule": judge([slate(word) for word in asked], asked),
    }
    (own.out / "result.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result["held_out"], indent=2))


if __name__ == "__main__":
    main()
