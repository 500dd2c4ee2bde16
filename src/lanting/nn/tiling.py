"""Run a spatial network over overlapping tiles and fuse the results along linear ramps.

The geometry is that of `enable_tiling` in diffusers 0.42, so a tiled picture equals the reference's: tiles start
every `stride` pixels, reach `size` pixels, are blended first with the tile above, then with the tile to the
left (both already blended), and are cut to the stride. Only one row of tiles is held besides the finished ones.
Rejected: weighting all tiles by a window into one accumulator, as smooth but no longer the reference.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class TileGrid:
    """Tile edge and distance, in units of the network's input; `scale` = output units per input unit."""

    size: int
    stride: int
    scale: float

    def out(self, length: int) -> int:
        """Length in output units, rounded down: a stride-2 convolution drops the rest."""
        return int(length * self.scale)


def run_tiled(network: Callable[[Tensor], Tensor], x: Tensor, grid: TileGrid) -> Tensor:
    """Apply `network` (B, C, H, W) -> (B, C', H*scale, W*scale) tile by tile.

    Starts whose tile would be smaller than one output unit are left out (the reference fails on them).
    """
    height, width = x.shape[-2:]
    step, overlap = grid.out(grid.stride), grid.out(grid.size) - grid.out(grid.stride)
    above: list[Tensor] = []
    finished: list[Tensor] = []
    for top in _starts(height, grid):
        row: list[Tensor] = []
        for column, left in enumerate(_starts(width, grid)):
            tile = network(x[..., top : top + grid.size, left : left + grid.size])
            if above:
                tile = _blend(above[column], tile, overlap, dim=-2)
            if row:
                tile = _blend(row[-1], tile, overlap, dim=-1)
            row.append(tile)
        finished.append(torch.cat([tile[..., :step, :step] for tile in row], dim=-1))
        above = row
    return torch.cat(finished, dim=-2)[..., : grid.out(height), : grid.out(width)]


def _starts(length: int, grid: TileGrid) -> list[int]:
    return [start for start in range(0, length, grid.stride) if grid.out(length - start) > 0]


def _blend(before: Tensor, tile: Tensor, overlap: int, dim: int) -> Tensor:
    """Fade from the last `overlap` lines of `before` to the first lines of `tile` along `dim` (-2 or -1)."""
    count = min(before.shape[dim], tile.shape[dim], overlap)
    ramp = torch.arange(count, device=tile.device, dtype=torch.float32) / count
    ramp = ramp if dim == -1 else ramp[:, None]
    old = before.narrow(dim, before.shape[dim] - count, count).float()
    mixed = torch.lerp(old, tile.narrow(dim, 0, count).float(), ramp).to(tile.dtype)
    return torch.cat([mixed, tile.narrow(dim, count, tile.shape[dim] - count)], dim=dim)
