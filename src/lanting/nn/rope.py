"""Rotary positions of the transformer as real cosine and sine tables.

The reference keeps complex64 tables; complex tensors do not exist on MPS and do not survive `.to(bfloat16)`, so
ours are two real float32 tables, built once per (grids, text length, device) and kept in a small cache. Positions
follow the reference: pictures are centred on the origin, text continues on the diagonal behind the largest one.
The reference's tables end at position 4096; ours are computed for the positions asked, so they have no end.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor

Grid = tuple[int, int, int]  # frames, rows, columns, in tokens
THETA = 10000.0


def phases(positions: Tensor, dim: int) -> Tensor:
    """Angles (n, dim/2) of one axis: position times 10000^(-2j/dim), in float32 as the reference does."""
    exponent = torch.arange(0, dim, 2, dtype=torch.float32, device=positions.device) / dim
    return torch.outer(positions.float(), 1.0 / THETA**exponent)  # (n, dim/2)


def picture_phases(grid: Grid, frame: int, axes: tuple[int, int, int]) -> Tensor:
    """Angles (f*h*w, E/2) of one picture; an odd side leans to the negative: 83 rows are -42..40."""
    frames, rows, columns = grid
    t = phases(torch.arange(frames) + frame, axes[0])  # (f, a)
    y = phases(torch.arange(rows) - (rows - rows // 2), axes[1])  # (h, b)
    x = phases(torch.arange(columns) - (columns - columns // 2), axes[2])  # (w, c)
    parts = (t[:, None, None], y[None, :, None], x[None, None, :])
    return torch.cat([p.expand(frames, rows, columns, -1) for p in parts], -1).flatten(0, 2)


def tables(grids: tuple[Grid, ...], text: int, axes: tuple[int, int, int], layered: bool) -> tuple[Tensor, Tensor]:
    """Angles of (text (T, E/2), pictures (N, E/2)). Layered releases put the last picture at frame -1."""
    last = len(grids) - 1
    pictures = [picture_phases(g, -1 if layered and i == last else i, axes) for i, g in enumerate(grids)]
    start = max(max(rows // 2, columns // 2) for _, rows, columns in grids)
    start = max(start, last) if layered else start
    positions = torch.arange(start, start + text)
    return torch.cat([phases(positions, dim) for dim in axes], -1), torch.cat(pictures)


class RopeCache:
    """(cos, sin) tables by what they depend on; at most `size` kept, so that ragged prompts can't fill memory."""

    def __init__(self, axes: tuple[int, int, int], layered: bool, size: int = 16):
        self.axes, self.layered, self.size = axes, layered, size
        self.kept: OrderedDict[object, tuple[Tensor, Tensor]] = OrderedDict()

    def __call__(self, grids: tuple[Grid, ...], text: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """((T + N, E/2) cosines, the same of sines), text first, on `device`, float32."""
        key = (grids, text, str(device))
        if key not in self.kept:
            angles = torch.cat(tables(grids, text, self.axes, self.layered))  # (T + N, E/2)
            self.kept[key] = (angles.cos().to(device), angles.sin().to(device))
            if len(self.kept) > self.size:
                self.kept.popitem(last=False)
        self.kept.move_to_end(key)
        return self.kept[key]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn neighbouring pairs (2j, 2j+1) of x (B, n, H, E) by the angles (n, E/2) or (B, n, E/2); float32 inside, x's
    dtype out."""
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)  # (B, n, H, E/2)
    cos, sin = cos[..., None, :], sin[..., None, :]
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2).type_as(x)
