"""Small pictures for the VAE: pieces of signs, and shapes, ramps and stray letters in every colour.

Nano's signs put all letters on the 16 px token grid, so most pieces are cut on the latent grid; the others are
cut anywhere and a share shows no sign at all, which keeps the latents usable for pictures people bring along.
"""

from __future__ import annotations

import random
from functools import cache
from importlib import resources
from io import BytesIO

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from lanting.train.signs import ALPHABET, COLORS, FACES, SIZES, SignMaker, pixels

SIGN_SHARE, EMPTY_SHARE, GRID_SHARE = 0.8, 0.1, 0.6
PIECES_PER_SIGN = 3  # drawing a sign costs more than cutting it


class ScrapMaker:
    """A stream of training pictures; everything random comes from `rng`."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.signs = SignMaker(seed=rng.randrange(2**31))
        self._sheet: np.ndarray = np.zeros((0, 0, 3), dtype=np.uint8)
        self._left = 0

    def crops(self, count: int, edge: int) -> np.ndarray:
        """(count, edge, edge, 3) uint8, about 70 % with a piece of lettering of a real sign."""
        return np.stack([self._crop(edge) for _ in range(count)])

    def canvases(self, count: int) -> np.ndarray:
        """Whole signs of one canvas size: (count, H, W, 3) uint8."""
        size = self.rng.choice(SIZES)
        return np.stack([pixels(self.signs.sample(self.rng, size=size)) for _ in range(count)])

    def _crop(self, edge: int) -> np.ndarray:
        if self.rng.random() > SIGN_SHARE:
            return shapes(self.rng, edge)
        if not self._left:
            self._sheet, self._left = pixels(self.signs.sample(self.rng)), PIECES_PER_SIGN
        self._left -= 1
        piece = self._piece(edge)
        if self.rng.random() > EMPTY_SHARE:
            for _ in range(4):  # most of a sign is bare ground; prefer where something is written
                if np.ptp(piece, axis=(0, 1)).max() > 0:
                    break
                piece = self._piece(edge)
        return piece

    def _piece(self, edge: int) -> np.ndarray:
        grid = 8 if self.rng.random() < GRID_SHARE else 1
        height, width = self._sheet.shape[:2]
        top = self.rng.randint(0, (height - edge) // grid) * grid
        left = self.rng.randint(0, (width - edge) // grid) * grid
        return self._sheet[top : top + edge, left : left + edge]


def any_color(rng: random.Random) -> tuple[int, int, int]:
    """Half of the time one of the signs' colours, else any."""
    if rng.random() < 0.5:
        return rng.choice(list(COLORS.values()))
    return (rng.randrange(256), rng.randrange(256), rng.randrange(256))


def shapes(rng: random.Random, edge: int) -> np.ndarray:
    """Ellipses, boxes, triangles, lines and letters on a plain or ramped ground: (edge, edge, 3) uint8."""
    image = Image.fromarray(_ramp(rng, edge)) if rng.random() < 0.3 else Image.new("RGB", (edge, edge), any_color(rng))
    draw = ImageDraw.Draw(image)
    for _ in range(rng.randint(0, 4)):
        _shape(rng, draw, edge)
    if rng.random() < 0.6:
        text = "".join(rng.choice(ALPHABET) for _ in range(rng.randint(1, 6)))
        place = (rng.randint(-10, edge // 2), rng.randint(-6, edge - 12))
        draw.text(place, text, font=_font(rng.choice(list(FACES)), rng.randint(12, 40)), fill=any_color(rng))
    return np.asarray(image)


def _shape(rng: random.Random, draw: ImageDraw.ImageDraw, edge: int) -> None:
    color = any_color(rng)
    x, y = rng.randint(-10, edge), rng.randint(-10, edge)
    box = (x, y, x + rng.randint(6, edge), y + rng.randint(6, edge))
    kind = rng.randrange(4)
    if kind == 0:
        draw.ellipse(box, fill=color)
    elif kind == 1:
        draw.rectangle(box, fill=color)
    elif kind == 2:
        draw.polygon([(rng.randint(0, edge), rng.randint(0, edge)) for _ in range(3)], fill=color)
    else:
        draw.line(box, fill=color, width=rng.randint(1, 6))


def _ramp(rng: random.Random, edge: int) -> np.ndarray:
    """A linear ramp between two colours in any direction."""
    down, right = np.mgrid[0:edge, 0:edge] / (edge - 1)
    lean = rng.uniform(-1, 1)
    share = (right + lean * down - min(0.0, lean)) / (1 + abs(lean))
    first, last = np.asarray(any_color(rng)), np.asarray(any_color(rng))
    return np.rint(first + share[..., None] * (last - first)).astype(np.uint8)


@cache
def _font(face: str, points: int) -> ImageFont.FreeTypeFont:
    data = resources.files("lanting.train").joinpath("fonts", FACES[face]).read_bytes()
    return ImageFont.truetype(BytesIO(data), points)
