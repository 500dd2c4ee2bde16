"""The README's picture: a contact sheet that nano drew, unselected (one seed for all prompts, first try).

python benchmarks/nano_sheet.py [--seed 7] [-o docs/images/nano-signs.png]
"""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image

from lanting import Engine, Request

WIDE = (
    'A blue sign that says "HELLO"',
    'a red sign with white text "Fresh Bread" and a frame',
    'yellow sign, black letters, "TAXI"',
    'a green board that reads "Garden Club" in serif yellow letters',
    'a black poster with orange letters saying "Jazz" "Tonight" with a frame',
    'a white sign that says "Library" in handwritten purple letters',
    'an orange sign "OPEN 24 h"',
    'a pink board with black text "Party" and a border',
    'a picture of a purple sign that reads "Qwen" "Image" in white letters',
)
SQUARE = (
    'a green sign that says "Tea"',
    'a yellow poster with black serif letters saying "SALE" "50%"',
    'a blue sign with a frame that says "Room" "101"',
    'a white board, red handwritten letters, "Lanting"',
)
GAP = 6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--model", default="nano")
    parser.add_argument("-o", "--output", type=Path, default=Path("docs/images/nano-signs.png"))
    given = parser.parse_args()
    engine = Engine.open(given.model, device="cpu")
    wide = [engine.run(Request(prompt=p, seed=given.seed, size=(224, 96))).images[0] for p in WIDE]
    square = [engine.run(Request(prompt=p, seed=given.seed, size=(192, 192))).images[0] for p in SQUARE]
    width = 4 * 192 + 3 * GAP
    scaled = width - 2 * GAP
    small = [i.resize((scaled // 3, scaled // 3 * 96 // 224), Image.Resampling.LANCZOS) for i in wide]
    page = Image.new("RGB", (width, 3 * (small[0].height + GAP) + 192), "white")
    for i, image in enumerate(small):
        page.paste(image, (i % 3 * (image.width + GAP), i // 3 * (image.height + GAP)))
    for i, image in enumerate(square):
        page.paste(image, (i * (192 + GAP), 3 * (small[0].height + GAP)))
    given.output.parent.mkdir(parents=True, exist_ok=True)
    page.save(given.output, optimize=True)
    print(given.output)


if __name__ == "__main__":
    main()
