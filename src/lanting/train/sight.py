"""Pictures for the vision tower in batches of one shape, which is what training on a GPU has.

`QwenVision` takes pictures of any shapes and goes through them one by one; hundreds of equal ones are then thousands
of small kernels. Here they share one layout and every step is one kernel for all. Both give the same numbers.
Pictures are brought to the tower's size on the GPU as well, with the very weights that Pillow uses.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from lanting.nn.qwen_language import rotate
from lanting.nn.qwen_vision import Grid, QwenVision, Runs
from lanting.text.pictures import PictureConfig

Rope = tuple[Tensor, Tensor]


class TogetherVision:
    """Stands in for `QwenVision.forward` where all pictures have the same grid."""

    def __init__(self, visual: QwenVision):
        self.visual = visual
        self._kept: dict[tuple[Grid, torch.device], tuple[Tensor, Tensor, Rope, Runs]] = {}

    def layout(self, grid: Grid, device: torch.device) -> tuple[Tensor, Tensor, Rope, Runs]:
        """(order of the cells, the way back, rotary tables (P, 1, d), windows) of one picture."""
        key = (grid, device)
        if key not in self._kept:
            order, angles, runs = self.visual.layout([grid])
            cell = self.visual.config.spatial_merge_size**2
            angles = angles.view(len(order), cell, -1)[order].flatten(0, 1)  # (P, d / 2)
            angles = torch.cat([angles, angles], -1).unsqueeze(1)
            rope = angles.cos().to(device), angles.sin().to(device)
            self._kept[key] = (order.to(device), order.argsort().to(device), rope, runs)
        return self._kept[key]

    def __call__(self, patches: Tensor, grids: Sequence[Grid]) -> Tensor:
        """As `QwenVision.forward`. Raises ValueError for pictures of several shapes."""
        if len(set(grids)) != 1:
            raise ValueError("pictures that are seen together must have one shape")
        visual, count = self.visual, len(grids)
        cell = visual.config.spatial_merge_size**2
        order, back, rope, windows = self.layout(grids[0], patches.device)
        x = visual.patch_embed(patches)
        x = x.view(count, len(order), cell, -1)[:, order].flatten(1, 2)  # (n, P, D)
        whole = [(1, x.shape[1])]
        for index, block in enumerate(visual.blocks):
            x = x + attend(
                block.get_submodule("attn"),
                block.get_submodule("norm1")(x),
                rope,
                whole if index in visual.config.fullatt_block_indexes else windows,
            )
            x = x + block.get_submodule("mlp")(block.get_submodule("norm2")(x))
        merged = visual.merger(x.flatten(0, 1))
        return merged.view(count, len(order), -1)[:, back].flatten(0, 1)


def attend(attention: nn.Module, x: Tensor, rope: Rope, runs: Runs) -> Tensor:
    """`VisionAttention` on equal pictures: x (n, P, D), tables (P, 1, d) -> (n, P, D)."""
    qkv, projection, heads = attention.get_submodule("qkv"), attention.get_submodule("proj"), attention.num_heads
    assert isinstance(heads, int)
    q, k, v = qkv(x).unflatten(-1, (3, heads, -1)).unbind(2)  # each (n, P, heads, d)
    q, k = (rotate(part.float(), *rope).to(v.dtype) for part in (q, k))
    parts, start = [], 0
    for count, length in runs:
        piece = slice(start, start := start + count * length)
        qs, ks, vs = (p[:, piece].unflatten(1, (count, length)).flatten(0, 1).transpose(1, 2) for p in (q, k, v))
        out = F.scaled_dot_product_attention(qs, ks, vs)  # (n count, heads, length, d)
        parts.append(out.transpose(1, 2).reshape(x.shape[0], count * length, -1))
    return projection(torch.cat(parts, 1))


@cache
def resize_weights(before: int, after: int, method: Image.Resampling, device: torch.device) -> Tensor:
    """What Pillow's resizing does to one axis, as a matrix (after, before)."""
    unit = Image.fromarray(np.eye(before, dtype=np.float32), "F")
    return torch.from_numpy(np.array(unit.resize((before, after), method))).to(device)


def resize(pictures: Tensor, size: tuple[int, int], method: Image.Resampling) -> Tensor:
    """Pictures (n, H, W, 3) in whole grey levels to (width, height), rounded after each axis as Pillow does."""
    high, wide = pictures.shape[1:3]
    if wide != size[0]:
        weights = resize_weights(wide, size[0], method, pictures.device)
        pictures = torch.einsum("xw,nhwc->nhxc", weights, pictures).round().clamp(0, 255)
    if high != size[1]:
        weights = resize_weights(high, size[1], method, pictures.device)
        pictures = torch.einsum("yh,nhwc->nywc", weights, pictures).round().clamp(0, 255)
    return pictures


@torch.no_grad()
def patches_together(pixels: Tensor, first: tuple[int, int], grid: Grid) -> Tensor:
    """What the tower sees of pictures (n, H, W, 3) uint8: (n, P, 588) float16, one of the two equal frames.

    `first` is the (width, height) an edit brings its references to, `grid` the tower's rows and columns.
    """
    config = PictureConfig()
    rows, columns = grid
    patch, merge = config.patch_size, config.merge_size
    small = resize(pixels.float(), first, Image.Resampling.LANCZOS)
    small = resize(small, (columns * patch, rows * patch), Image.Resampling.BICUBIC) / 255
    mean, std = (torch.tensor(v, device=pixels.device) for v in (config.image_mean, config.image_std))
    cut = ((small - mean) / std).view(-1, rows // merge, merge, patch, columns // merge, merge, patch, 3)
    cut = cut.permute(0, 1, 4, 2, 5, 7, 3, 6)  # (n, R, Q, merge, merge, 3, patch, patch)
    return cut.reshape(pixels.shape[0], rows * columns, -1).half()
