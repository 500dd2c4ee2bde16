"""How weights are rounded to few bits and expanded: which inputs share a scale, which scale a group gets, how many rows
at a time.

The kinds that use it are in `nn.linears`. Rejected: rounding a whole weight at once, whose float32 copies would be the
most memory that loading takes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lanting.nn.rotate import rotate_blocks

RUN = 1 << 19  # weights rounded at a time: few enough to stay in a core's cache
MANY = 1 << 23  # weights that a GPU expands at a time: few calls, and some 100 MB beside the result
GROUPS = (128, 64, 32, 16)  # inputs that share a scale of Int4Linear
SHRINK = (8.0, 7.5, 7.0, 8.5, 9.0)
"""What the largest value of a group is divided by to get its scale: at 8 it is met exactly by the code -8; below,
the other sign has room up to 7 too; above, it is clipped and the rest is finer."""


def best_scale(grouped: Tensor, stored: torch.dtype) -> Tensor:
    """The scale per group (out, groups), float32 but rounded as `stored`, with the least squared error."""
    peak = grouped.gather(-1, grouped.abs().argmax(-1, keepdim=True)).squeeze(-1)  # with its sign
    best, least = torch.ones_like(peak), torch.full_like(peak, torch.inf)
    for divisor in SHRINK:
        scale = (peak / -divisor).to(stored).float()
        scale = torch.where(scale == 0, 1.0, scale)
        error = (to_codes(grouped, scale).sub_(8).mul_(scale[:, :, None]) - grouped).square_().sum(-1)
        best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
    return best


def to_codes(grouped: Tensor, scale: Tensor) -> Tensor:
    """0 to 15, as floats."""
    return (grouped / scale[:, :, None]).round_().add_(8).clamp_(0, 15)


def runs(weight: Tensor) -> tuple[Tensor, ...]:
    """A weight (out, in) in a few rows at a time."""
    return weight.split(at_once(weight.shape[1]))


def at_once(columns: int) -> int:
    """How many rows of so many weights that are."""
    return max(1, RUN // columns)


def expanded(linear: Any, dtype: torch.dtype, rows: Tensor | None, find: Callable[[Tensor], Tensor]) -> Tensor:
    """Values (n, in) in `dtype` of some rows (n,) of a packed Linear, None: of all. `find`: some rows -> theirs, in
    float32, of which there are only a few at a time."""
    device, columns = linear.weight.device, linear.in_features
    rows = torch.arange(linear.out_features, device=device) if rows is None else rows
    found = torch.empty(len(rows), columns, dtype=dtype, device=device)
    step = at_once(columns) if device.type == "cpu" else max(MANY // columns, 1)
    for some, out in zip(rows.split(step), found.split(step), strict=True):
        out.copy_(find(some))
    return found


def rotated(weight: Tensor, rotate: int) -> Tensor:
    """The weight to be rounded, in float32."""
    exact = weight.detach().float()
    return rotate_blocks(exact, rotate) if rotate else exact


def positive(scale: Tensor) -> Tensor:
    """Rows of zeros get a scale of 1 instead of 0."""
    return torch.where(scale > 0, scale, 1.0)


def check_scale(scale: tuple[int, ...] | None, rows: int, columns: int) -> None:
    """Raises ValueError for a scale that covers no (rows, columns)."""
    if scale is None or scale in ((), (1,), (rows,)):
        return
    if len(scale) != 2 or 0 in scale or rows % scale[0] or columns % scale[1]:
        raise ValueError(f"scales of shape {tuple(scale)} cover no weight of ({rows}, {columns})")


def fitting_group(in_features: int, group: int) -> int:
    """The largest group size up to `group` that divides a row; 0 where none does."""
    return next((size for size in GROUPS if size <= group and in_features % size == 0), 0)
