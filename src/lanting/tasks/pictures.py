"""PIL pictures to pixel tensors and back: resizing, alpha, masks, and the box around a mask.

Resampling and rounding are those of diffusers' 0.42 image processor, so equal pictures in give equal pictures
out. Colour modes are handled here once: it leaves RGBA and grey pictures as they are, and its VAE then fails
on them.
"""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image, ImageOps
from PIL.Image import Image as Picture
from PIL.Image import Resampling
from torch import Tensor

from lanting.core.pictures import on_white

Size = tuple[int, int]  # width, height
Box = tuple[int, int, int, int]  # left, top, right, bottom


def eight_bits(picture: Picture) -> Picture:
    """Pictures of 16 bits per pixel scaled to 8, where PIL's `convert` would clip; all others as they are."""
    if not picture.mode.startswith("I"):
        return picture
    levels = np.asarray(picture).astype(np.float64) / 257
    return Image.fromarray(levels.round().clip(0, 255).astype(np.uint8))


def to_mode(picture: Picture, channels: int = 3) -> Picture:
    """RGB for 3 channels, RGBA for 4. What is transparent in RGB shows white, as on paper."""
    picture = eight_bits(picture)
    if channels == 4:
        return picture.convert("RGBA")
    return on_white(picture) if picture.has_transparency_data else picture.convert("RGB")


def resize(picture: Picture, size: Size) -> Picture:
    """To exactly `size`, Lanczos."""
    return picture.resize(size, Resampling.LANCZOS)


def contain(picture: Picture, size: Size) -> Picture:
    """Fit into `size` with the ratio kept and centred; the bars repeat the picture's border lines. RGB."""
    scaled, (left, top) = _scaled(picture, size, larger=False)
    width, height = scaled.size
    sheet = Image.new("RGB", size)
    sheet.paste(scaled, (left, top))
    if width == size[0] and top > 0:  # bars above and below
        sheet.paste(scaled.resize((width, top), box=(0, 0, width, 0)), (0, 0))
        sheet.paste(scaled.resize((width, top), box=(0, height, width, height)), (0, top + height))
    elif height == size[1] and left > 0:  # bars on both sides
        sheet.paste(scaled.resize((left, height), box=(0, 0, 0, height)), (0, 0))
        sheet.paste(scaled.resize((left, height), box=(width, 0, width, height)), (left + width, 0))
    return sheet


def cover(picture: Picture, size: Size) -> Picture:
    """Fill `size` with the ratio kept and centred; what sticks out is cut. RGB."""
    scaled, place = _scaled(picture, size, larger=True)
    sheet = Image.new("RGB", size)
    sheet.paste(scaled, place)
    return sheet


def _scaled(picture: Picture, size: Size, *, larger: bool) -> tuple[Picture, tuple[int, int]]:
    """The picture as large as fits inside (or as small as goes around) `size`, and where to put its
    corner."""
    (width, height), (w, h) = size, picture.size
    ratio, own = width / height, w / h
    by_width = ratio > own if larger else ratio < own
    target = (width, h * width // w) if by_width else (w * height // h, height)
    return resize(picture, target), (width // 2 - target[0] // 2, height // 2 - target[1] // 2)


def pixels_of(picture: Picture, size: Size, channels: int = 3) -> Tensor:
    """Resized to `size` -> (1, channels, H, W) float32 in [-1, 1]."""
    values = np.asarray(resize(to_mode(picture, channels), size), dtype=np.float32) / 255.0  # (H, W, channels)
    return 2.0 * torch.from_numpy(values).permute(2, 0, 1)[None] - 1.0


def levels_of(mask: Picture, size: Size) -> Tensor:
    """Resized to `size` -> (1, 1, H, W) float32 from 0, black, to 1, white."""
    values = np.asarray(resize(eight_bits(mask), size).convert("L"), dtype=np.float32) / 255.0
    return torch.from_numpy(values)[None, None]


def mask_of(mask: Picture, size: Size) -> Tensor:
    """Resized to `size` -> (1, 1, H, W) float32: 1 where the picture is to be drawn anew (half-white and
    up)."""
    return (levels_of(mask, size) >= 0.5).float()


def pictures_from(pixels: Tensor) -> list[Picture]:
    """(B, 3 or 4, H, W) in [-1, 1] -> B pictures, RGB or RGBA."""
    levels = (pixels.float() * 0.5 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(one) for one in (levels * 255).round().astype("uint8")]


def box_around(mask: Picture, size: Size, padding: int) -> Box:
    """The part of the picture that is worth drawing large: the mask's bounding box, grown by `padding` pixels
    and then to the ratio of `size` as far as the picture reaches."""
    found = mask.convert("L").getbbox()
    left, top, right, bottom = found or (0, 0, *mask.size)
    left, top = max(left - padding, 0), max(top - padding, 0)
    right, bottom = min(right + padding, mask.width), min(bottom + padding, mask.height)
    ratio = size[0] / size[1]
    if (right - left) / (bottom - top) > ratio:
        top, bottom = _grow(top, bottom, int((right - left) / ratio - (bottom - top)), mask.height)
    else:
        left, right = _grow(left, right, int((bottom - top) * ratio - (right - left)), mask.width)
    return left, top, right, bottom


def _grow(low: int, high: int, by: int, limit: int) -> tuple[int, int]:
    """The span low..high longer by `by`, half on each side, shifted back into 0..limit and cut there."""
    low, high = low - by // 2, high + by - by // 2
    if high >= limit:
        low, high = low - (high - limit), limit
    if low < 0:
        low, high = 0, high - low
    return low, min(high, limit)


def paste_back(original: Picture, mask: Picture, box: Box, patch: Picture) -> Picture:
    """`original` with `patch` inside `box` where the mask is white, blended where it is grey. RGB."""
    left, top, right, bottom = box
    sheet = Image.new("RGBA", original.size)
    sheet.paste(cover(patch, (right - left, bottom - top)), (left, top))
    kept = Image.new("RGBa", original.size)  # premultiplied, so that half-kept pixels blend in proportion
    kept.paste(original.convert("RGBA").convert("RGBa"), mask=ImageOps.invert(mask.convert("L")))
    result = sheet.convert("RGB").convert("RGBA")
    result.alpha_composite(kept.convert("RGBA"))
    return result.convert("RGB")
