"""Contact sheets: hits and misses as a person would want to see them, what was asked and read under each picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageFont import FreeTypeFont

COLUMN, GAP, CAPTION, POINTS = 232, 8, 34, 12  # pixels
MOST = 48  # pictures of each sort: a page, not a book
GREEN, RED, GREY, INK = (40, 150, 70), (205, 45, 45), (245, 245, 243), (45, 45, 45)


@dataclass(frozen=True)
class Tile:
    """One picture, whether it is a hit, and up to two lines of words under it."""

    image: Image
    hit: bool
    words: tuple[str, ...] = ()


def sheet(tiles: Sequence[Tile], columns: int = 5) -> Image:
    """One page: misses first, framed red, then hits, framed green; at most MOST of each, in their own order."""
    from PIL import Image as Pillow
    from PIL import ImageDraw

    shown = [t for t in tiles if not t.hit][:MOST] + [t for t in tiles if t.hit][:MOST]
    small = [_fit(tile.image) for tile in shown]
    rows = [range(at, min(at + columns, len(shown))) for at in range(0, len(shown), columns)]
    heights = [max(small[i].height for i in row) + CAPTION + GAP for row in rows]
    page = Pillow.new("RGB", (columns * (COLUMN + GAP) + GAP, sum(heights) + GAP), GREY)
    pen, top = ImageDraw.Draw(page), GAP
    for row, height in zip(rows, heights, strict=True):
        for column, i in enumerate(row):
            left, picture = GAP + column * (COLUMN + GAP), small[i]
            color = GREEN if shown[i].hit else RED
            pen.rectangle((left - 3, top - 3, left + picture.width + 2, top + picture.height + 2), fill=color)
            page.paste(picture, (left, top))
            for number, words in enumerate(shown[i].words[:2]):
                _write(page, (left, top + picture.height + 4 + number * (POINTS + 2)), words)
        top += height
    return page


def side_by_side(images: Sequence[Image]) -> Image:
    """Pictures in one row, as high as the last one: what was given, then what came out."""
    from PIL import Image as Pillow

    height = images[-1].height
    scaled = [one.convert("RGB").resize((max(1, one.width * height // one.height), height)) for one in images]
    row = Pillow.new("RGB", (sum(one.width for one in scaled) + GAP * (len(scaled) - 1), height), GREY)
    left = 0
    for one in scaled:
        row.paste(one, (left, 0))
        left += one.width + GAP
    return row


def _fit(image: Image) -> Image:
    """RGB, as wide as a column at most."""
    from PIL import Image as Pillow

    plain = image.convert("RGB")
    if plain.width <= COLUMN:
        return plain
    return plain.resize((COLUMN, max(1, round(plain.height * COLUMN / plain.width))), Pillow.Resampling.LANCZOS)


def _write(page: Image, at: tuple[int, int], words: str) -> None:
    """One line in two fonts, cut with dots where the column ends."""
    from PIL import ImageDraw

    pen, (x, y), end = ImageDraw.Draw(page), at, at[0] + COLUMN
    for character in words:
        font = _font("Heiti-Bold.otf" if ord(character) > 0x2000 else "DejaVuSansMono-Bold.ttf")
        width = font.getlength(character)
        if x + width > end - 10:
            pen.text((x, y + POINTS), "…", fill=INK, font=_font("DejaVuSansMono-Bold.ttf"), anchor="ls")
            return
        pen.text((x, y + POINTS), character, fill=INK, font=font, anchor="ls")
        x += round(width)


@cache
def _font(name: str) -> FreeTypeFont:
    from importlib import resources
    from io import BytesIO

    from PIL import ImageFont

    data = resources.files("lanting.train").joinpath("fonts", name).read_bytes()
    return ImageFont.truetype(BytesIO(data), POINTS)
