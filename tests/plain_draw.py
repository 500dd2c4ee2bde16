"""Designs drawn one by one and pixel by pixel, in floating point: slow, and plain enough to be believed."""

from __future__ import annotations

import numpy as np
import torch

from lanting.train.assets import pictograms
from lanting.train.atlas import hanzi_cell, latin_cell
from lanting.train.backdrop import ORNAMENTS, depth, overlay, pattern
from lanting.train.design import COLORS, PICTOGRAM, UNIT, Design, is_hanzi, place


def lerp(low: np.ndarray, high: np.ndarray, share: np.ndarray) -> np.ndarray:
    return low + (high - low) * share


def draw_plainly(design: Design) -> np.ndarray:
    """(H, W, 3) uint8."""
    placement, (width, height) = place(design), design.size
    ink = np.array(COLORS[design.letters], float)
    first, last = (np.array(COLORS[name], float) for name in (design.ground, design.ground2 or design.ground))
    image = lerp(first, last, np.linspace(0, 1, height)[:, None, None]) * np.ones((height, width, 1))
    if design.texture != "plain":
        field = pattern(design.texture, design.ornament % 64, design.size).numpy()
        image += field[..., None] * depth(design.ground, design.letters)
    border, ornament = (design.border, design.ornament % ORNAMENTS) if placement.ring else (False, 0)
    cover, shade = (part.numpy()[..., None] for part in overlay(design.scene, border, ornament, design.size))
    image = lerp(image, np.where(shade == 1, ink, shade * 122.5), cover)
    for glyph in placement.glyphs:
        if glyph.character != " ":
            hanzi = is_hanzi(glyph.character)
            scale = 2 if placement.large else 1
            cell = (
                hanzi_cell(design.face, glyph.character) if hanzi else latin_cell(design.face, glyph.character, scale)
            )
            part = image[glyph.y * UNIT :, glyph.x * UNIT :][: cell.shape[0], : cell.shape[1]]
            part[:] = lerp(part, ink, cell[..., None] / 255)
    image = image.round().clip(0, 255)
    for x, y in placement.pictograms:
        stamp = pictograms()[design.concept or 0].astype(float)
        part = image[y * UNIT : (y + PICTOGRAM) * UNIT, x * UNIT : (x + PICTOGRAM) * UNIT]
        part[:] = lerp(part, stamp[..., :3], stamp[..., 3:] / 255)
    return image.round().clip(0, 255).astype(np.uint8)


def worst_difference(pictures: torch.Tensor, designs: list[Design]) -> int:
    """Largest difference in grey levels between pictures and the same designs drawn plainly."""
    pairs = zip(pictures.numpy(), designs, strict=True)
    return max(int(np.abs(picture.astype(int) - draw_plainly(design)).max()) for picture, design in pairs)
