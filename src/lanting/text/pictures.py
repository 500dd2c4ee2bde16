"""Pictures as the vision tower wants them: sides in multiples of 28 pixels, normalised, cut into patches.

Equal to transformers' Qwen2VLImageProcessorPil with Pillow and NumPy alone (their processor class needs
torchvision). Transparent pictures are laid on white.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lanting.core.errors import RequestError
from lanting.core.pictures import on_white
from lanting.nn.qwen_vision import Grid


@dataclass(frozen=True, slots=True)
class PictureConfig:
    """Numbers of preprocessor_config.json; pixel counts are areas, the defaults those of Qwen-Image-Edit."""

    min_pixels: int = 3136
    max_pixels: int = 12845056
    patch_size: int = 14
    temporal_patch_size: int = 2
    merge_size: int = 2
    image_mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)

    @classmethod
    def from_dict(cls, json: Mapping[str, Any]) -> "PictureConfig":
        """Read preprocessor_config.json, or processor_config.json as transformers 5 writes it; areas stand in
        `min_pixels`, `max_pixels` or in the newer `size`.
        """
        json = json.get("image_processor") or json
        size = json.get("size") or {}
        known: dict[str, Any] = {
            "min_pixels": size.get("shortest_edge"),
            "max_pixels": size.get("longest_edge"),
        }
        for name in cls.__dataclass_fields__:
            known[name] = json.get(name) or known.get(name)
        for name in ("image_mean", "image_std"):
            known[name] = tuple(known[name]) if known[name] else None
        return cls(**{name: value for name, value in known.items() if value is not None})


def smart_resize(width: int, height: int, config: PictureConfig) -> tuple[int, int]:
    """The (width, height) the tower sees: both multiples of patch_size * merge_size, area within the limits.

    Sides are rounded half to even; only when the area then leaves the limits is the picture scaled. Raises
    RequestError when one side is more than 200 times the other.
    """
    if max(width, height) > 200 * min(width, height):
        raise RequestError(
            "a picture of {width} x {height} pixels is too narrow to read; crop it to at most 200 to 1",
            width=width,
            height=height,
        )
    unit = config.patch_size * config.merge_size
    sides = width, height
    fitted = [round(side / unit) * unit for side in sides]
    area = fitted[0] * fitted[1]
    if area > config.max_pixels:
        shrink = math.sqrt(width * height / config.max_pixels)
        fitted = [max(unit, math.floor(side / shrink / unit) * unit) for side in sides]
    elif area < config.min_pixels:
        grow = math.sqrt(config.min_pixels / (width * height))
        fitted = [math.ceil(side * grow / unit) * unit for side in sides]
    return fitted[0], fitted[1]


def sees_through(image: Image.Image) -> bool:
    return "A" in image.getbands() or image.info.get("transparency") is not None


def picture_patches(image: Image.Image, config: PictureConfig | None = None) -> tuple[Tensor, Grid]:
    """Cut a picture into patches (rows * columns, 3 * temporal * patch * patch), fp32, and tell the grid.

    Patches are ordered by merged cell, cells row by row, and row by row inside a cell; a patch is (channel,
    frame, y, x), the single frame repeated.
    """
    config = config or PictureConfig()
    size = smart_resize(image.width, image.height, config)
    seen = on_white(image) if sees_through(image) else image.convert("RGB")
    resized = seen.resize(size, Image.Resampling.BICUBIC)
    pixels = (np.asarray(resized).astype(np.float64) / 255).astype(np.float32)
    mean, std = np.array(config.image_mean, np.float32), np.array(config.image_std, np.float32)
    pixels = (pixels - mean) / std  # (H, W, 3)
    patch, merge = config.patch_size, config.merge_size
    rows, columns = size[1] // patch, size[0] // patch
    cut = torch.from_numpy(pixels).view(rows // merge, merge, patch, columns // merge, merge, patch, 3)
    cut = cut.permute(0, 3, 1, 4, 6, 2, 5).unsqueeze(5)  # (R, Q, merge, merge, 3, 1, patch, patch)
    cut = cut.expand(-1, -1, -1, -1, -1, config.temporal_patch_size, -1, -1)
    return cut.reshape(rows * columns, -1), (rows, columns)
