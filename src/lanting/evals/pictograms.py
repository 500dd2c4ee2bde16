"""Which pictogram is drawn where: the patch against all pictograms, each laid over the ground that was measured.

The nearest by mean squared error wins, and so may nothing at all; a thousand candidates make this a judge that a
smudge does not pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from lanting.core.errors import RequestError
from lanting.evals.colors import Box, Ground

if TYPE_CHECKING:
    from lanting.train.design import Design

NOTHING = -1
EMPTY = 60.0  # mean squared error against the bare ground below which nothing was drawn: about 8 grey levels


@dataclass(frozen=True)
class Found:
    """What a patch shows: a row of the pictograms or NOTHING, and how well that explains it, 0..1."""

    concept: int
    fit: float


class Stamps:
    """Pictograms, and the sums that compare a patch with all of them in two products of matrices.

    The error of pictogram p with coverage a over ground u against a patch is |D - a (p - u)|², D = patch - u. Written
    out, all but D's own parts are sums over the pictogram (here by row, since u may differ from row to row).
    """

    def __init__(self, pictures: Tensor):
        """pictures: (m, 64, 64, 4), colours and coverage 0..255."""
        self.pictures = pictures.float()
        alpha = self.pictures[..., 3:] / 255
        colors = self.pictures[..., :3]
        self.laid = (alpha * colors).flatten(1)  # (m, 64 64 3): a p
        self.cover = alpha.flatten(1)  # (m, 64 64)
        self.cover2 = alpha.square().sum((2, 3))  # (m, 64): a² by row
        self.mixed = (alpha.square() * colors).sum(2)  # (m, 64, 3): a² p by row
        self.own = (alpha * colors).square().sum((1, 2, 3))  # (m): a² p²

    def errors(self, patch: Tensor, under: Tensor) -> Tensor:
        """Mean squared error of a patch (64, 64, 3) against each pictogram over the ground (64, 1, 3): (m)."""
        apart = patch - under
        shade = (apart * under).sum(2).flatten()  # (64 64)
        row = under[:, 0]  # (64, 3)
        over = self.own - 2 * (self.mixed * row).sum((1, 2)) + (self.cover2 * row.square().sum(1)).sum(1)
        total = apart.square().sum() - 2 * (self.laid @ apart.flatten() - self.cover @ shade) + over
        return total / patch.numel()


@cache
def stamps() -> Stamps:
    """All pictograms of the package."""
    from lanting.train.assets import pictograms

    return Stamps(torch.tensor(np.asarray(pictograms())))


def identify(pixels: np.ndarray, box: Box, ground: Ground, known: Stamps | None = None) -> Found:
    """The pictogram in a box of the pictograms' own size. `pixels` (H, W, 3) 0..255; `known` replaces `stamps`."""
    x, y, width, height = box
    patch = torch.tensor(pixels[y : y + height, x : x + width]).float()
    under = torch.from_numpy(ground.rows(y, y + height)).float()  # (64, 1, 3)
    bare = float((patch - under).square().mean())
    if bare < EMPTY:
        return Found(NOTHING, 1.0)
    errors = (known or stamps()).errors(patch, under)
    best = int(errors.argmin())
    if float(errors[best]) >= bare:
        return Found(NOTHING, 0.0)
    return Found(best, 1 - float(errors[best]) / bare)


def count_of(pixels: np.ndarray, ground: Ground, rows: dict[int, tuple[Box, ...]], concept: int) -> int:
    """How many pictograms stand in a row; `rows` gives the boxes of every possible count.

    The row of each count is laid over the measured ground, of the asked `concept` or of what its boxes show, since a
    wrong one is a fault of identity; the nearest to the picture wins, 0 for the bare ground.
    """
    boxes = [box for row in rows.values() for box in row]
    left, top = min(b[0] for b in boxes), min(b[1] for b in boxes)
    right, bottom = max(b[0] + b[2] for b in boxes), max(b[1] + b[3] for b in boxes)
    band = torch.from_numpy(np.ascontiguousarray(pixels[top:bottom, left:right])).float()
    bare = torch.from_numpy(ground.rows(top, bottom)).float().expand_as(band)
    errors = {0: float((band - bare).square().mean())}
    for count, row in rows.items():
        inside = [(x - left, y - top, width, height) for x, y, width, height in row]
        known = {concept, *(identify(pixels, box, ground).concept for box in row)} - {NOTHING}
        laid = [_laid(bare, inside, stamps().pictures[one]) for one in known]
        errors[count] = min(float((band - one).square().mean()) for one in laid)
    return min(errors, key=errors.__getitem__)


def _laid(bare: Tensor, row: Sequence[Box], stamp: Tensor) -> Tensor:
    """The ground (H, W, 3) with a pictogram (64, 64, 4) in each box."""
    laid = bare.clone()
    for x, y, width, height in row:
        part = laid[y : y + height, x : x + width]
        part.copy_(torch.lerp(part.clone(), stamp[..., :3], stamp[..., 3:] / 255))
    return laid


def side_of(pixels: np.ndarray, ground: Ground, places: dict[str, tuple[Box, ...]]) -> str | None:
    """On which side a pictogram stands; `places` gives its boxes on every possible side. None: on no side.

    Any pictogram counts: a wrong one in the right place is a fault of identity, not of place.
    """
    fits = {}
    for side, boxes in places.items():
        found = [identify(pixels, box, ground) for box in boxes]
        fits[side] = min((one.fit if one.concept != NOTHING else 0.0) for one in found)
    best = max(fits, key=fits.__getitem__, default=None)
    return best if best is not None and fits[best] > 0.5 else None


def boxes_of(design: Design) -> tuple[tuple[Box, ...], tuple[Box, ...]]:
    """(boxes of the lines, boxes of the pictograms) of a design by its layout rule, in pixels."""
    from lanting.train.design import PICTOGRAM, UNIT, place

    plan = place(design)
    lines = tuple((x * UNIT, y * UNIT, w * UNIT, h * UNIT) for x, y, w, h in plan.boxes)
    edge = PICTOGRAM * UNIT
    return lines, tuple((x * UNIT, y * UNIT, edge, edge) for x, y in plan.pictograms)


def alternatives(design: Design, name: str, values: Sequence[object]) -> dict[object, tuple[Box, ...]]:
    """The pictograms' boxes for every value of one attribute (`side`, `count`) that fits the canvas."""
    found: dict[object, tuple[Box, ...]] = {}
    for value in values:
        try:
            found[value] = boxes_of(replace(design, **{name: value}))[1]
        except RequestError:
            continue
    return found
