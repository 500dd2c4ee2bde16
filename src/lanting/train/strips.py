"""Pictures as strips of 8 pixels, and how drawings are laid over them.

Everything in a design stands on a grid of 8 px, so 8 pixels of a row (24 bytes of RGB) are the largest piece that
any drawing covers as a whole. A drawing keeps only those of its strips that hold something, and one gather, one
blend and one scatter lay thousands of them over a batch of pictures. All sums are of whole numbers: a picture is
the same on any device and in any batch.
Rejected: one cover for the whole canvas. Most of a picture is bare ground, which is then blended too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from lanting.train.design import UNIT

STRIP = 3 * UNIT  # values of a strip
WHOLE = 255  # the cover that hides what is below
PART = 2048  # strips blended at once on a CPU: what fits its cache


@dataclass(frozen=True)
class Strips:
    """Drawings, one behind the other, as those of their strips that cover anything."""

    cover: Tensor  # (n, 24) uint8, for each value of a strip
    row: Tensor  # (n) int64, pixels below the drawing's top
    column: Tensor  # (n) int64, strips right of its left end
    first: Tensor  # (drawings) int64
    count: Tensor  # (drawings) int64
    counts: np.ndarray  # the same, where a GPU need not be asked for it
    ink: Tensor | None = None  # (n, 24) uint8, of drawings that have colours of their own
    kept: dict[int, Tensor] = field(default_factory=dict)  # see `steps`

    def to(self, device: torch.device | str) -> Strips:
        moved = {name: part.to(device) for name, part in vars(self).items() if isinstance(part, Tensor)}
        return replace(self, **moved, kept={})

    def steps(self, columns: int) -> Tensor:
        """(n) int64: how many strips of a sheet, so many to a row, lie between a drawing's first and each of them."""
        if columns not in self.kept:
            self.kept[columns] = self.row * columns + self.column
        return self.kept[columns]


def strips_of(cells: Sequence[np.ndarray], inks: Sequence[np.ndarray] | None = None) -> Strips:
    """Drawings from cells of cover (h, 8 w) uint8 and, where they have their own, of colours (h, 8 w, 3) uint8."""
    covers, places, colours = [], [], []
    for number, cell in enumerate(cells):
        split = cell.reshape(cell.shape[0], -1, UNIT)
        place = np.nonzero(split.any(-1))
        covers.append(split[place])
        places.append(np.stack(place))
        if inks is not None:
            colours.append(inks[number].reshape(cell.shape[0], -1, STRIP)[place])
    drawn = narrow_strips(np.concatenate(covers), np.concatenate(places, axis=1), np.asarray([len(c) for c in covers]))
    return drawn if inks is None else replace(drawn, ink=torch.from_numpy(np.concatenate(colours)))


def stamps_of(pictures: np.ndarray) -> Strips:
    """Drawings of one size from pictures with cover (m, h, 8 w, 4) uint8."""
    count, height, _, _ = pictures.shape
    split = pictures[..., 3].reshape(count, height, -1, UNIT)
    place = np.nonzero(split.any(-1))
    drawn = narrow_strips(split[place], np.stack(place[1:]), np.bincount(place[0], minlength=count))
    return replace(drawn, ink=torch.from_numpy(pictures[..., :3].reshape(count, height, -1, STRIP)[place]))


def narrow_strips(narrow: np.ndarray, places: np.ndarray, count: np.ndarray) -> Strips:
    """Strips from the cover of their pixels (n, 8) uint8, their rows and columns (2, n), and how many each has."""
    whole = (part.astype(np.int64) for part in (*places, np.cumsum(count) - count, count))
    return Strips(torch.from_numpy(np.repeat(narrow, 3, axis=1)), *map(torch.from_numpy, whole), counts=count)


@dataclass(frozen=True)
class Placed:
    """Which drawings go where on a sheet, and how many strips they have together."""

    where: np.ndarray  # (n, 2) int32: drawing, and the strip of the sheet where its upper left end goes
    strips: int


def placed(drawings: Strips, where: Sequence[tuple[int, int]]) -> Placed:
    pairs = np.array(where, np.int32).reshape(-1, 2)
    return Placed(pairs, int(drawings.counts[pairs[:, 0]].sum()))


class Sheet:
    """A batch of pictures of one size while they are drawn; `dtype` int16 keeps values beyond 0..255."""

    def __init__(self, count: int, size: tuple[int, int], device: torch.device, dtype: torch.dtype = torch.uint8):
        self.count, (self.width, self.height) = count, size
        self.columns = self.width // UNIT
        self.each = self.height * self.columns  # strips of a picture
        self.strips = torch.empty(count * self.each, STRIP, dtype=dtype, device=device)

    def pictures(self) -> Tensor:
        """(B, H, W, 3), the same memory."""
        return self.strips.view(self.count, self.height, self.width, 3)

    def lay(self, drawings: Strips, placed: Placed, inks: Tensor | None = None, whole: int = WHOLE) -> None:
        """Lay drawings over the pictures where they do not overlap; `inks` (B, 3) uint8 are the colours, picture by
        picture, of drawings that have none of their own."""
        if not placed.strips:
            return
        device = self.strips.device
        which, begin = send(placed.where, device).long().unbind(1)
        count = drawings.count.index_select(0, which)
        owner = torch.repeat_interleave(count, output_size=placed.strips)
        shift = drawings.first.index_select(0, which) - count.cumsum(0) + count
        source = shift.index_select(0, owner).add_(torch.arange(placed.strips, device=device))
        target = drawings.steps(self.columns).index_select(0, source).add_(begin.index_select(0, owner))
        if drawings.ink is not None:
            table, entry = drawings.ink, source
        else:
            assert inks is not None
            table, entry = inks.repeat(1, UNIT), (begin // self.each).index_select(0, owner)
        part = PART if device.type == "cpu" else placed.strips
        words = self.strips.view(torch.int64)  # moved as few large pieces
        for to, of, own in zip(target.split(part), source.split(part), entry.split(part), strict=True):
            cover, ink = drawings.cover.index_select(0, of), table.index_select(0, own)
            mixed = mix(self.strips.index_select(0, to), ink, cover, whole)
            words.index_copy_(0, to, mixed.view(torch.int64))


def send(array: np.ndarray, device: torch.device) -> Tensor:
    """An array as a tensor on a device, without waiting for the copy where that is possible."""
    tensor = torch.from_numpy(array)
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def mix(under: Tensor, ink: Tensor, cover: Tensor, whole: int) -> Tensor:
    """under + (ink - under) cover / whole, rounded, of the type of `under`; all of one shape."""
    return (_mix_numpy if under.device.type == "cpu" else _mix_torch)(under, ink, cover, whole)


def _mix_torch(under: Tensor, ink: Tensor, cover: Tensor, whole: int) -> Tensor:
    low, high, share = (part.int() for part in (under, ink, cover))
    return ((low * whole + (high - low) * share + whole // 2) // whole).to(under.dtype)


def _mix_numpy(under: Tensor, ink: Tensor, cover: Tensor, whole: int) -> Tensor:
    """Three times as fast on a CPU, for numpy has sums of 16 bits: the difference may wrap around, the whole fits."""
    kind = np.uint16 if under.dtype == torch.uint8 else np.int32
    low, high, share = (part.numpy().astype(kind) for part in (under, ink, cover))
    high -= low
    high *= share
    low *= whole
    low += high
    low += whole // 2
    low //= whole
    return torch.from_numpy(low.astype(under.numpy().dtype))
