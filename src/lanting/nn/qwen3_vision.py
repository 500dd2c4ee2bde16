"""The Qwen3-VL vision tower: patches of pictures in, one language-model embedding per 2 x 2 patches out.

The blocks are those of Qwen2.5-VL's tower (`qwen_vision`) with other norms and MLPs, and all attend over the whole
picture. A square table of learned positions is stretched to the picture's grid;
rotary positions come on top. Some blocks hand their states, merged by a merger of their own, to the first layers of
the language model as well (DeepStack), so that it also sees details which the last blocks no longer hold.

The table is stretched by two small dense matrices, one an axis. Rejected: gathering four neighbours a patch, which
takes five times the code and gives the same numbers.
Source: Qwen3-VL technical report; equal to transformers' Qwen3VLVisionModel, with its tensor names below `visual.`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isqrt
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lanting.nn.qwen_vision import EPS, Grid, PatchEmbed, VisionBlock, by_cell, patch_angles


@dataclass(frozen=True, slots=True)
class Qwen3VisionConfig:
    """Numbers of the tower, those of the 8B model; sizes in pixels except `spatial_merge_size`, in patches."""

    depth: int = 27
    hidden_size: int = 1152
    intermediate_size: int = 4304
    num_heads: int = 16
    out_hidden_size: int = 4096
    in_channels: int = 3
    patch_size: int = 16
    temporal_patch_size: int = 2
    spatial_merge_size: int = 2
    num_position_embeddings: int = 2304
    deepstack_visual_indexes: tuple[int, ...] = (8, 16, 24)
    rope_theta: float = 10000.0

    @classmethod
    def from_dict(cls, json: Mapping[str, Any]) -> "Qwen3VisionConfig":
        """Read `vision_config` of a config.json. Raises ValueError when the learned positions are no square."""
        known = {name: json[name] for name in cls.__dataclass_fields__ if json.get(name) is not None}
        known["rope_theta"] = (json.get("rope_parameters") or {}).get("rope_theta", 10000.0)
        known["deepstack_visual_indexes"] = tuple(known.get("deepstack_visual_indexes", (8, 16, 24)))
        config = cls(**known)
        if isqrt(config.num_position_embeddings) ** 2 != config.num_position_embeddings:
            raise ValueError(f"num_position_embeddings {config.num_position_embeddings} is no square number")
        return config


def stretch(size: int, side: int) -> Tensor:
    """Weights (size, side), fp32, that stretch a row of `side` values to `size`: the ends stay at the ends, and what
    is between two values is mixed of both. A row of one is the first value.
    """
    places = torch.arange(size, dtype=torch.float32) * (side - 1) / max(size - 1, 1)
    return (1 - (places[:, None] - torch.arange(side)).abs()).clamp(min=0)


class VisionMLP(nn.Module):
    """fc2(gelu(fc1(x))), with the tanh form of GELU."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.linear_fc1 = nn.Linear(width, inner)
        self.linear_fc2 = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_fc2(F.gelu(self.linear_fc1(x), approximate="tanh"))


class Merger(nn.Module):
    """An MLP with GELU over each cell of merged patches, behind a norm per patch, or per cell if `whole`."""

    def __init__(self, config: Qwen3VisionConfig, whole: bool) -> None:
        super().__init__()
        self.width = config.hidden_size * config.spatial_merge_size**2
        self.whole = whole
        self.norm = nn.LayerNorm(self.width if whole else config.hidden_size, EPS)
        self.linear_fc1 = nn.Linear(self.width, self.width)
        self.linear_fc2 = nn.Linear(self.width, config.out_hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x.view(-1, self.width)) if self.whole else self.norm(x).view(-1, self.width)
        return self.linear_fc2(F.gelu(self.linear_fc1(x)))


class Qwen3Vision(nn.Module):
    """The tower as a whole; pictures of any sizes go through together and never see one another."""

    def __init__(self, config: Qwen3VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(config, bias=True)
        self.pos_embed = nn.Embedding(config.num_position_embeddings, config.hidden_size)
        self.blocks = nn.ModuleList(VisionBlock(config, nn.LayerNorm, VisionMLP) for _ in range(config.depth))
        self.merger = Merger(config, whole=False)
        self.deepstack_merger_list = nn.ModuleList(Merger(config, whole=True) for _ in config.deepstack_visual_indexes)

    def forward(self, patches: Tensor, grids: Sequence[Grid]) -> tuple[Tensor, list[Tensor]]:
        """Embed `patches` (sum of rows * columns, channels * 2 * 16 * 16) of one picture per grid, in order.

        Returns embeddings (cells, out_hidden_size) with cells = sum of rows * columns / 4, those of each picture row
        by row, and as many features of the same shape as there are deep mergers, earlier blocks first.
        """
        x = self.patch_embed(patches)  # (P, D)
        x = x + torch.cat([self.places(grid) for grid in grids]).to(x.dtype)
        angles = torch.cat([patch_angles(grid, self.config) for grid in grids]).to(x.device)
        angles = torch.cat([angles, angles], -1).unsqueeze(1)  # (P, 1, head_dim)
        rope = angles.cos(), angles.sin()
        runs = [(1, rows * columns) for rows, columns in grids]
        mergers = dict(zip(self.config.deepstack_visual_indexes, self.deepstack_merger_list, strict=True))
        deep = []
        for index, block in enumerate(self.blocks):
            x = block(x, rope, runs)
            if index in mergers:
                deep.append(mergers[index](x))
        return self.merger(x), deep

    def places(self, grid: Grid) -> Tensor:
        """Learned positions (patches, D), fp32, of one picture, in the order of its patches."""
        table = self.pos_embed.weight.float()
        side = isqrt(len(table))
        down, across = (stretch(size, side).to(table.device) for size in grid)
        wide = across @ table.view(side, side, -1)  # (side, columns, D)
        return by_cell((down @ wide.flatten(1)).view(*grid, -1), self.config.spatial_merge_size)
