"""Which named colours a picture's ground and letters have, by measurement.

The ground is what stands free of text and pictograms; its colour is fitted as a line over the rows, so that a gradient
shows both its ends. Letters are the darkest or lightest tenth of a line's box, whichever lies farther from the ground:
the cores of the strokes, without their soft edges.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Box = tuple[int, int, int, int]  # x, y, width, height in pixels
LUMA = np.array([0.299, 0.587, 0.114])
CORE = 0.10  # share of a line's box that is surely inside its strokes
FEWEST = 4  # free pixels that make a row's colour


@dataclass(frozen=True)
class Ground:
    """The ground's colour at the upper and the lower edge: (3,) each, 0..255; between them a straight line."""

    top: np.ndarray
    bottom: np.ndarray
    height: int

    def rows(self, first: int, last: int) -> np.ndarray:
        """Colours of the rows first..last - 1: (rows, 1, 3)."""
        share = np.arange(first, last)[:, None, None] / max(self.height - 1, 1)
        return self.top + share * (self.bottom - self.top)

    @property
    def middle(self) -> np.ndarray:
        return (self.top + self.bottom) / 2


def nearest_color(color: np.ndarray) -> str:
    """The name of the nearest of the named colours; `color` (3,) 0..255."""
    from lanting.train.design import COLORS

    return min(COLORS, key=lambda name: float(np.square(np.asarray(COLORS[name]) - color).sum()))


def free_pixels(size: tuple[int, int], boxes: Sequence[Box], ring: int) -> np.ndarray:
    """True where neither a box nor the outer ring of `ring` pixels lies: (H, W); all but the boxes where that is
    nothing."""
    width, height = size
    free = np.ones((height, width), dtype=bool)
    for x, y, w, h in boxes:
        free[max(y, 0) : y + h, max(x, 0) : x + w] = False
    inner = free.copy()
    inner[:ring], inner[height - ring :], inner[:, :ring], inner[:, width - ring :] = False, False, False, False
    return inner if inner.sum() > 0.02 * inner.size else free


def ground_of(pixels: np.ndarray, free: np.ndarray, graded: bool) -> Ground:
    """The ground's colours; one colour for all rows unless `graded`.

    pixels  (H, W, 3), 0..255
    free    (H, W), true where the ground shows
    """
    height = pixels.shape[0]
    if not graded:
        color = np.median(pixels[free] if free.any() else pixels.reshape(-1, 3), axis=0)
        return Ground(color, color, height)
    rows = np.flatnonzero(free.sum(1) >= FEWEST)
    if len(rows) < 2:
        return ground_of(pixels, free, graded=False)
    colors = np.stack([np.median(pixels[row][free[row]], axis=0) for row in rows])  # (rows, 3)
    one, other = np.triu_indices(len(rows), k=1)  # Theil and Sen: a misplaced line of text does not tilt the ground
    slope = np.median((colors[other] - colors[one]) / (rows[other] - rows[one])[:, None], axis=0)
    start = np.median(colors - rows[:, None] * slope, axis=0)
    return Ground(start, start + slope * (height - 1), height)


def ink_of(pixels: np.ndarray, boxes: Sequence[Box], ground: Ground) -> np.ndarray | None:
    """The colour of letters in the given line boxes, (3,); None without a box inside the picture."""
    cores = []
    for x, y, width, height in boxes:
        part = pixels[max(y, 0) : y + height, max(x, 0) : x + width]
        if part.size == 0:
            continue
        under = ground.rows(max(y, 0), max(y, 0) + len(part))  # (rows, 1, 3): of a gradient each row has its own
        apart = ((part - under) @ LUMA).ravel()
        low, high = np.quantile(apart, (CORE, 1 - CORE))
        cores.append(part.reshape(-1, 3)[apart <= low if -apart.min() > apart.max() else apart >= high])
    return np.median(np.concatenate(cores), axis=0) if cores else None
