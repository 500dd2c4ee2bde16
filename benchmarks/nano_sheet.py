"""The README's picture: a contact sheet that nano drew, unselected (one seed for all prompts, first try).

    python benchmarks/nano_sheet.py [--seed 7] [-o docs/images/nano-signs.png]

Four rows of three wide signs, English and Chinese; one of four square ones; one of edits, each beside the sign that
nano drew first and was then told to change.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image

from lanting import Engine, Request

WIDE = (
    'A blue sign that says "HELLO"',
    'a red sign with white text "Fresh Bread" and a border',
    "一块红色招牌，白色的字“欢迎光临”",
    "蓝底白字的牌子，写着“北京大学”",
    'a green board that reads "Garden Club" in serif yellow letters',
    'a yellow sign, black letters, "TAXI"',
    'a white sign that says "Library" in handwritten purple letters',
    "黑色海报，用楷体写着黄色的“春风得意”",
    'an orange sign "OPEN 24 h"',
    "白色的牌子，宋体，写着“图书馆”，字是黑色的",
    'a black poster with orange letters saying "Jazz" "Tonight"',
    "绿色招牌“茶馆”，白色的字",
)
SQUARE = (
    'a yellow poster with black serif letters saying "SALE" "50%"',
    "红色海报，黄色的字“恭喜发财”“新年快乐”",
    'a blue sign with a border that says "Room" "101"',
    'a white board, red letters, "Lanting" "兰亭"',
)
EDITS = (  # what is drawn, and what is then asked of it
    ('A blue sign that says "OPEN"', "make the background red"),
    ('a yellow sign that says "SHOP" in black', 'change the text to "SOLD"'),
    ("白色的牌子，写着“今天”，字是黑色的", "把文字改成“明天”"),
)
GAP, ACROSS = 6, 786  # pixels between pictures, and of the whole


def shrunk(image: Image.Image, columns: int) -> Image.Image:
    """The picture at the width of one of `columns` columns."""
    width = (ACROSS - (columns - 1) * GAP) // columns
    return image.resize((width, round(width * image.height / image.width)), Image.Resampling.LANCZOS)


def in_rows(images: list[Image.Image], columns: int) -> list[Image.Image]:
    """Rows of equally large pictures."""
    small = [shrunk(image, columns) for image in images]
    rows = []
    for at in range(0, len(small), columns):
        row = Image.new("RGB", (ACROSS, small[0].height + GAP), "white")
        for i, image in enumerate(small[at : at + columns]):
            row.paste(image, (i * (image.width + GAP), 0))
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--model", default="nano")
    parser.add_argument("-o", "--output", type=Path, default=Path("docs/images/nano-signs.png"))
    given = parser.parse_args()
    engine = Engine.open(given.model, device="cpu")

    def drawn(prompt: str, *references: Image.Image, size: tuple[int, int] | None = None) -> Image.Image:
        return engine.run(Request(prompt, images=references, seed=given.seed, size=size)).images[0]

    wide = [drawn(prompt, size=(224, 96)) for prompt in WIDE]
    square = [drawn(prompt, size=(192, 192)) for prompt in SQUARE]
    pairs = []
    for prompt, instruction in EDITS:
        before = drawn(prompt, size=(224, 96))
        pairs += [before, drawn(instruction, before)]
    rows = [*in_rows(wide, 3), *in_rows(square, 4), *in_rows(pairs, 6)]
    page = Image.new("RGB", (ACROSS, sum(row.height for row in rows) - GAP), "white")
    top = 0
    for row in rows:
        page.paste(row, (0, top))
        top += row.height
    given.output.parent.mkdir(parents=True, exist_ok=True)
    page.save(given.output, optimize=True)
    print(given.output)


if __name__ == "__main__":
    main()
