"""What the autoencoder trains on when a GPU does it: crops cut on the device from designs that others made up.

Does what `scraps.ScrapMaker` does, hundreds of times as fast: the designs come as plans, are painted in one go, and
their pieces are kept in a ring from which batches are drawn, so that the trainer never waits.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from lanting.train.atlas import Atlas
from lanting.train.design import SIZES, STRIP, place
from lanting.train.draw import Plan, paint, plan
from lanting.train.scraps import DESIGN_SHARE, GRID_SHARE, PIECES, ScrapMaker, lettering, shapes
from lanting.train.strips import send
from lanting.train.workers import Workers, kept_atlas

SHEET = 64  # designs of one size sent together
KEPT = 16384  # pieces on the device
TRIES = 4  # places looked at for a piece that shows something
INKED = 60  # grey levels between the darkest and the lightest of a piece that does


class Scraps(Protocol):
    """A stream of training pictures: uint8 (n, H, W, 3) from NumPy, or (n, 3, H, W) in [-1, 1] on the device."""

    rng: random.Random

    def crops(self, count: int, edge: int) -> Any: ...

    def canvases(self, count: int) -> Any: ...


@dataclass(frozen=True)
class ScrapOrder:
    """What workers make for the autoencoder."""

    atlas: str  # file
    seed: int
    edge: int
    sheet: int = SHEET

    def maker(self, number: int) -> SheetMaker:
        return SheetMaker(self, number)


class SheetMaker:
    """Sheets of designs as plans, and the shapes that go with them."""

    def __init__(self, order: ScrapOrder, number: int):
        self.order, self.atlas = order, kept_atlas(Path(order.atlas))
        self.rng = random.Random(order.seed * 100_003 + number)
        self.designs = lettering(self.rng.randrange(2**31))

    def make(self, hanzi: int) -> tuple[Plan, np.ndarray]:
        """(a plan, (m, edge, edge, 3) uint8 shapes)."""
        size = self.rng.choice(SIZES)
        drawn = [self.designs.sample(self.rng, size).design for _ in range(self.order.sheet)]
        count = round(self.order.sheet * PIECES * (1 - DESIGN_SHARE) / DESIGN_SHARE)
        others = [shapes(self.rng, self.order.edge) for _ in range(count)]
        return plan(drawn, [place(d) for d in drawn], self.atlas), np.stack(others)


class PaintedScraps:
    """Pieces and whole designs on a device."""

    def __init__(self, workers: Workers, atlas: Atlas, edge: int, rng: random.Random, kept: int = KEPT):
        self.workers, self.atlas, self.edge, self.rng = workers, atlas, edge, rng
        self.pieces = torch.zeros(kept, edge, edge, 3, dtype=torch.uint8, device=atlas.device)
        self.filled = self.next = 0
        self.sheets: dict[tuple[int, int], Tensor] = {}

    def crops(self, count: int, edge: int) -> Tensor:
        """(count, 3, edge, edge) in [-1, 1]; `edge` must be the one of the orders."""
        assert edge == self.edge
        least = min(len(self.pieces), 4 * count)
        while self.filled < least:
            self.put(*self.workers.wait())
        sheet = self.workers.take()
        if sheet is not None:
            self.put(*sheet)
        chosen = torch.randint(self.filled, (count,), device=self.atlas.device)
        return to_range(self.pieces[chosen])

    def canvases(self, count: int) -> Tensor:
        """The first designs of the last sheet that is not of strips: (count, 3, H, W) in [-1, 1]."""
        while not self.sheets:
            self.put(*self.workers.wait())
        return to_range(self.sheets[self.rng.choice(list(self.sheets))][:count])

    def put(self, drawn: Plan, others: np.ndarray) -> None:
        """Paint a sheet, cut it, keep its pieces in random order."""
        sheet = paint(drawn, self.atlas)
        if drawn.size != STRIP:
            self.sheets[drawn.size] = sheet
        pieces = torch.cat([cut(sheet, self.edge), send(others, self.atlas.device)])
        count = min(len(pieces), len(self.pieces))
        order = torch.randperm(len(pieces), device=pieces.device)[:count]
        slots = torch.arange(self.next, self.next + count, device=pieces.device) % len(self.pieces)
        self.pieces[slots] = pieces[order]
        self.filled = max(self.filled, min(len(self.pieces), self.next + count))
        self.next = (self.next + count) % len(self.pieces)


def cut(sheet: Tensor, edge: int) -> Tensor:
    """`PIECES` pieces of each picture (B, H, W, 3), most of them on the grid: (B PIECES, edge, edge, 3).

    Of several places tried, the first that shows something; most of a design is bare ground.
    """
    count, high, wide = sheet.shape[0] * PIECES, *sheet.shape[1:3]
    device = sheet.device
    grid = torch.where(torch.rand(count, 1, device=device) < GRID_SHARE, 8, 1)
    top, left = (
        (torch.rand(count, TRIES, device=device) * ((side - edge) // grid + 1)).long() * grid for side in (high, wide)
    )
    step = torch.arange(edge, device=device)
    picture = torch.arange(sheet.shape[0], device=device).repeat_interleave(PIECES)
    rows, columns = (top[..., None] + step)[..., :, None], (left[..., None] + step)[..., None, :]
    tried = sheet[picture[:, None, None, None], rows, columns]  # (n, tries, edge, edge, 3)
    spread = (tried.amax((2, 3)).int() - tried.amin((2, 3)).int()).amax(-1)  # (n, tries)
    shows = spread > INKED
    chosen = torch.where(shows.any(1), shows.int().argmax(1), TRIES - 1)
    return tried[torch.arange(count, device=device), chosen]


def to_range(pictures: Tensor) -> Tensor:
    """uint8 (n, H, W, 3) -> (n, 3, H, W) in [-1, 1], channels last."""
    return pictures.permute(0, 3, 1, 2).float() / 127.5 - 1


@contextmanager
def scraps_for(feeders: int, edge: int, seed: int, folder: Path, device: torch.device) -> Iterator[Scraps]:
    """The stream that suits a trainer: made by itself, or by `feeders` processes for its device."""
    rng = random.Random(seed)
    if not feeders:
        yield ScrapMaker(rng)
        return
    file = folder / "atlas.npz"
    atlas = kept_atlas(file).to(device)
    workers = Workers(ScrapOrder(str(file), seed, edge), feeders)
    try:
        yield PaintedScraps(workers, atlas, edge, rng)
    finally:
        workers.close()
