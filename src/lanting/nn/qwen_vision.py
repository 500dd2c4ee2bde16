"""The Qwen2.5-VL vision tower: patches of pictures in, one language-model embedding per 2 x 2 patches out.

Most blocks attend inside windows of 8 x 8 patches, a few over the whole picture. Patches are put into
window order once, and windows of one size lie side by side, so a picture needs at most four batched
attention calls per block instead of one per window. (Rejected: a block-diagonal mask, quadratic in the
picture.)

Source: Qwen2.5-VL technical report, section on the vision encoder; tensor names as on the hub below
`visual.`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lanting.nn.qwen_language import GatedMLP, RMSNorm, rotate

Grid = tuple[int, int]
"""Rows and columns of patches of one picture, both even."""

Runs = list[tuple[int, int]]
"""(count, length): `count` neighbouring groups of `length` patches, each attending within itself."""

EPS = 1e-6


class Tower(Protocol):
    """The numbers that every tower of the family has; see `VisionConfig`."""

    @property
    def hidden_size(self) -> int: ...
    @property
    def intermediate_size(self) -> int: ...
    @property
    def num_heads(self) -> int: ...
    @property
    def in_channels(self) -> int: ...
    @property
    def patch_size(self) -> int: ...
    @property
    def temporal_patch_size(self) -> int: ...
    @property
    def spatial_merge_size(self) -> int: ...
    @property
    def rope_theta(self) -> float: ...


@dataclass(frozen=True, slots=True)
class VisionConfig:
    """Numbers of the tower; sizes in pixels except `spatial_merge_size`, in patches."""

    depth: int = 32
    hidden_size: int = 1280
    intermediate_size: int = 3420
    num_heads: int = 16
    out_hidden_size: int = 3584
    in_channels: int = 3
    patch_size: int = 14
    temporal_patch_size: int = 2
    spatial_merge_size: int = 2
    window_size: int = 112
    fullatt_block_indexes: tuple[int, ...] = (7, 15, 23, 31)
    rope_theta: float = 10000.0

    @classmethod
    def from_dict(cls, json: Mapping[str, Any]) -> "VisionConfig":
        """Read `vision_config` of a config.json, old (`in_chans`) or new (`in_channels`,
        `rope_parameters`).
        """
        known = {name: json[name] for name in cls.__dataclass_fields__ if json.get(name) is not None}
        known.setdefault("in_channels", json.get("in_chans", 3))
        known["rope_theta"] = (json.get("rope_parameters") or {}).get("rope_theta", 10000.0)
        known["fullatt_block_indexes"] = tuple(known.get("fullatt_block_indexes", (7, 15, 23, 31)))
        return cls(**known)


def window_order(grid: Grid, merge: int, window: int) -> tuple[Tensor, Runs]:
    """Order the patches of one picture by window.

    Patches come in merged cells (`merge` x `merge` patches each, cells row by row); `window` is the side of
    a window in cells, and windows at the right and lower border may be smaller. Returns the order of the
    cells (cells,) and the runs of equal windows, in patches.
    """
    rows, columns = grid[0] // merge, grid[1] // merge
    cells = torch.arange(rows * columns).view(rows, columns)
    windows = [
        cells[top : top + window, left : left + window].flatten()
        for top in range(0, rows, window)
        for left in range(0, columns, window)
    ]
    windows.sort(key=len)
    runs = [(len(list(group)), length * merge**2) for length, group in groupby(windows, key=len)]
    return torch.cat(windows), runs


def by_cell(table: Tensor, merge: int) -> Tensor:
    """(rows, columns, ...) -> (patches, ...) in the order of the picture processor: cell by cell, and row by row
    inside a cell of `merge` x `merge` patches.
    """
    rows, columns = table.shape[:2]
    cells = table.reshape(rows // merge, merge, columns // merge, merge, *table.shape[2:])
    return cells.transpose(1, 2).flatten(0, 3)


def patch_angles(grid: Grid, config: Tower) -> Tensor:
    """Rotary angles (patches, head_dim / 2), fp32, in the order of `by_cell`: the first half turns with the row,
    the second with the column.
    """
    quarter = config.hidden_size // config.num_heads // 4
    frequencies = 1.0 / config.rope_theta ** (torch.arange(quarter, dtype=torch.float32) / quarter)
    places = torch.meshgrid(*(torch.arange(side) for side in grid), indexing="ij")
    places = [by_cell(place, config.spatial_merge_size) for place in places]
    return torch.cat([place[:, None].float() * frequencies for place in places], -1)


class VisionAttention(nn.Module):
    """Full attention within groups of neighbouring patches; rotation in fp32."""

    def __init__(self, config: Tower) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], runs: Runs) -> Tensor:
        q, k, v = self.qkv(x).view(x.shape[0], 3, self.num_heads, -1).unbind(1)  # each (P, heads, d)
        q, k = (rotate(part.float(), *rope).to(v.dtype) for part in (q, k))
        parts, start = [], 0
        for count, length in runs:
            piece = slice(start, start := start + count * length)
            qs, ks, vs = (part[piece].unflatten(0, (count, length)).transpose(1, 2) for part in (q, k, v))
            out = F.scaled_dot_product_attention(qs, ks, vs)  # (count, heads, length, d)
            parts.append(out.transpose(1, 2).reshape(count * length, -1))
        return self.proj(torch.cat(parts))


class VisionBlock(nn.Module):
    """Attention and an MLP, each behind a norm; the towers of the family differ in `norm(width, eps)` and
    `mlp(width, inner)`.
    """

    def __init__(
        self, config: Tower, norm: Callable[[int, float], nn.Module], mlp: Callable[[int, int], nn.Module]
    ) -> None:
        super().__init__()
        self.norm1 = norm(config.hidden_size, EPS)
        self.norm2 = norm(config.hidden_size, EPS)
        self.attn = VisionAttention(config)
        self.mlp = mlp(config.hidden_size, config.intermediate_size)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], runs: Runs) -> Tensor:
        x = x + self.attn(self.norm1(x), rope, runs)
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    """A linear map of whole patches; stored as the convolution it was trained as."""

    def __init__(self, config: Tower, bias: bool = False) -> None:
        super().__init__()
        kernel = (config.temporal_patch_size, config.patch_size, config.patch_size)
        self.proj = nn.Conv3d(config.in_channels, config.hidden_size, kernel, stride=kernel, bias=bias)

    def forward(self, patches: Tensor) -> Tensor:
        weight = self.proj.weight.flatten(1)
        return F.linear(patches.to(weight.dtype), weight, self.proj.bias)


class PatchMerger(nn.Module):
    """Norm per patch, then an MLP over each cell of merged patches."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.width = config.hidden_size * config.spatial_merge_size**2
        self.ln_q = RMSNorm(config.hidden_size, EPS)
        self.mlp = nn.Sequential(
            nn.Linear(self.width, self.width), nn.GELU(), nn.Linear(self.width, config.out_hidden_size)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(self.ln_q(x).view(-1, self.width))


class QwenVision(nn.Module):
    """The tower as a whole; pictures of any sizes go through together and never see one another."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(config)
        mlp = partial(GatedMLP, bias=True)
        self.blocks = nn.ModuleList(VisionBlock(config, RMSNorm, mlp) for _ in range(config.depth))
        self.merger = PatchMerger(config)

    def forward(self, patches: Tensor, grids: Sequence[Grid]) -> Tensor:
        """Embed `patches` (sum of rows * columns, channels * 2 * 14 * 14) of one picture per grid, in order.

        Returns (sum of rows * columns / 4, out_hidden_size), cells of each picture row by row.
        """
        order, angles, windows = self.layout(grids)
        order = order.to(patches.device)
        cell = self.config.spatial_merge_size**2
        x = self.patch_embed(patches)  # (P, D)
        x = x.view(-1, cell, x.shape[-1])[order].flatten(0, 1)
        angles = angles.view(order.numel(), cell, -1).to(patches.device)[order].flatten(0, 1)
        angles = torch.cat([angles, angles], -1).unsqueeze(1)  # (P, 1, head_dim)
        rope = angles.cos(), angles.sin()
        whole = [(1, rows * columns) for rows, columns in grids]
        for index, block in enumerate(self.blocks):
            x = block(x, rope, whole if index in self.config.fullatt_block_indexes else windows)
        return self.merger(x)[order.argsort()]

    def layout(self, grids: Sequence[Grid]) -> tuple[Tensor, Tensor, Runs]:
        """Order of the cells, rotary angles of the patches (before ordering) and window runs of all
        pictures.
        """
        config = self.config
        side = config.window_size // config.patch_size // config.spatial_merge_size
        orders, angles, runs, first = [], [], [], 0
        for grid in grids:
            order, windows = window_order(grid, config.spatial_merge_size, side)
            orders.append(order + first)
            angles.append(patch_angles(grid, config))
            runs += windows
            first += order.numel()
        return torch.cat(orders), torch.cat(angles), runs
