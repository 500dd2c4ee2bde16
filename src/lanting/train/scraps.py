"""Small pictures for the autoencoder: pieces of designs, and shapes, ramps and stray letters in every colour.

Designs put everything on a grid of 8 px, so most pieces are cut on it; the others are cut anywhere and a share shows
no design at all, which keeps the latents usable for pictures people bring along.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from PIL import Image, ImageDraw

from lanting.train.atlas import LATIN, LATIN_FONTS, default_atlas
from lanting.train.atlas import _font as font
from lanting.train.design import COLORS, LARGE, SQUARE, STRIP, WIDE
from lanting.train.designs import DesignMaker, Mix
from lanting.train.draw import render

DESIGN_SHARE, GRID_SHARE = 0.85, 0.6
SHEETS = 24  # designs drawn at once
PIECES = 5  # per design: drawing one costs more than cutting it
CANVASES = (STRIP, WIDE, SQUARE, LARGE)
LETTERING = Mix(kinds=(0.35, 0.45, 0.05, 0.15), concepts=0, dense=0.5, pictogram=0.2)


def lettering(seed: int, held_out: bool = False) -> DesignMaker:
    """Designs as the autoencoder meets them: every pictogram there is, many dense lines."""
    return DesignMaker(seed, held_out, replace(LETTERING, concepts=len(default_atlas().pictograms)))


class ScrapMaker:
    """A stream of training pictures; everything random comes from `rng`."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.designs = lettering(rng.randrange(2**31))
        self._pieces: list[np.ndarray] = []

    def crops(self, count: int, edge: int) -> np.ndarray:
        """(count, edge, edge, 3) uint8, most of them with a piece of lettering or of a pictogram."""
        return np.stack([self._crop(edge) for _ in range(count)])

    def canvases(self, count: int) -> np.ndarray:
        """Whole designs of one canvas size: (count, H, W, 3) uint8."""
        size = self.rng.choice(CANVASES[1:])
        return render([self.designs.sample(self.rng, size).design for _ in range(count)]).numpy()

    def _crop(self, edge: int) -> np.ndarray:
        if self.rng.random() > DESIGN_SHARE:
            return shapes(self.rng, edge)
        if not self._pieces:
            self._pieces = self._cut(edge)
        return self._pieces.pop()

    def _cut(self, edge: int) -> list[np.ndarray]:
        """Pieces of a fresh sheet of designs, in random order."""
        size = self.rng.choice(CANVASES)
        sheet = [self.designs.sample(self.rng, size).design for _ in range(SHEETS)]
        pieces = [self._piece(picture, edge) for picture in render(sheet).numpy() for _ in range(PIECES)]
        self.rng.shuffle(pieces)
        return pieces

    def _piece(self, picture: np.ndarray, edge: int) -> np.ndarray:
        """A crop; most of a design is bare ground, so where something is written is preferred."""
        grid = 8 if self.rng.random() < GRID_SHARE else 1
        height, width = picture.shape[:2]
        for _ in range(4):
            top = self.rng.randint(0, (height - edge) // grid) * grid
            left = self.rng.randint(0, (width - edge) // grid) * grid
            piece = picture[top : top + edge, left : left + edge]
            if np.ptp(piece, axis=(0, 1)).max() > 60:
                break
        return piece


def held_out_pictures(
    count: int, seed: int = 77, sizes: Sequence[tuple[int, int]] = (WIDE, SQUARE)
) -> list[torch.Tensor]:
    """Pictures (1, H, W, 3) uint8 of designs that training never draws."""
    maker, rng = lettering(seed, held_out=True), random.Random(seed)
    return [render([maker.sample(rng, sizes[i % len(sizes)]).design]) for i in range(count)]


def any_color(rng: random.Random) -> tuple[int, int, int]:
    """Half of the time one of the designs' colours, else any."""
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
        text = "".join(rng.choice(LATIN) for _ in range(rng.randint(1, 6)))
        place = (rng.randint(-10, edge // 2), rng.randint(-6, edge - 12))
        face = font(rng.choice(list(LATIN_FONTS.values())), rng.randint(12, 40))
        draw.text(place, text, font=face, fill=any_color(rng))
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


__all__ = ["ScrapMaker", "any_color", "held_out_pictures", "lettering", "shapes"]
