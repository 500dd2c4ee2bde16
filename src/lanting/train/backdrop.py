"""What lies below the text of a design: its ground with gradient and texture, and what its scene draws at the edges."""

from __future__ import annotations

from functools import cache, lru_cache

import numpy as np
import torch
from torch import Tensor

from lanting.train.design import COLORS, SCENES, TEXTURES, TOKEN, Design, Placement, luminance
from lanting.train.strips import WHOLE, Strips, strips_of

TEXTURE_DEPTH = 20.0  # grey levels: visible, and never near the gap between ground and letters
INSET, LINE = 5, 3  # pixels of a border
ORNAMENTS = 6
MOTIFS = 64  # seeds of a texture
TWENTIETHS = 20  # scenes cover in steps of one of them
Size = tuple[int, int]


@cache
def depth(ground: str, letters: str) -> float:
    """Grey levels of a texture: away from the letters, unless nobody would see it on so light or dark a ground."""
    below, above = luminance(ground), luminance(letters)
    inward = below > 225 or below < 25
    strength = TEXTURE_DEPTH * min(1.0, abs(below - above) / 150)
    return strength if (below > above) != inward else -strength


@cache
def overflows(ground: str, ground2: str | None, letters: str) -> bool:
    """Whether a texture takes a ground beyond black or white. What is drawn over it then shows less of it."""
    colours = [value + depth(ground, letters) for name in (ground, ground2) if name for value in COLORS[name]]
    return min(colours) < 0 or max(colours) > 255


def pattern_row(design: Design) -> int:
    """Row of `patterns` that a design's ground shows; 0 is plain."""
    return TEXTURES.index(design.texture) * MOTIFS + design.ornament % MOTIFS if design.texture != "plain" else 0


@cache
def patterns(device: torch.device) -> Tensor:
    """All textures with all seeds, one token of each, in 0..1: (textures x 64, 16, 16)."""
    plain = torch.zeros(MOTIFS, TOKEN, TOKEN)
    drawn = [pattern(texture, seed, (TOKEN, TOKEN)) for texture in TEXTURES[1:] for seed in range(MOTIFS)]
    return torch.cat([plain, torch.stack(drawn)]).to(device)


def pattern(texture: str, seed: int, size: Size) -> Tensor:
    """One texture in 0..1: (H, W). It repeats with the tokens; the seed shifts, leans or replaces the motif."""
    width, height = size
    y, x = torch.meshgrid(torch.arange(height).float(), torch.arange(width).float(), indexing="ij")
    x, y = x + 8 * (seed % 2), y + 8 * (seed // 2 % 2)
    u, v = x % 16 - 7.5, y % 16 - 7.5
    if texture == "dots":
        return (u * u + v * v < (18, 30)[seed // 4 % 2]).float()
    if texture == "stripes":
        lean = (x, y, x + y, x - y)[seed // 4 % 4]
        return ((lean % 16) < 8).float()
    if texture == "grid":
        return ((u.abs() < 1) | (v.abs() < 1)).float()
    if texture == "waves":
        return (((y + 3 * torch.sin(x * 6.2832 / 16)) % 16) < 8).float()
    tile = torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(seed % 4))
    tile = torch.nn.functional.interpolate(tile, size=(16, 16), mode="nearest")[0, 0]
    return tile.repeat(height // 16, width // 16)


def overlay_row(design: Design, placement: Placement) -> int:
    """Drawing of `overlays` that belongs to a design; 0 is none."""
    mark = 0 if not placement.ring else ORNAMENTS if design.border else design.ornament % ORNAMENTS
    return SCENES.index(design.scene) * (ORNAMENTS + 1) + mark


@lru_cache(maxsize=16)
def overlays(size: Size, device: torch.device) -> tuple[Strips, Strips]:
    """All scenes, each with each ornament and last with a border: parts of a colour of their own, which cover in
    twentieths, and parts in the colour of the letters, which cover in 255ths."""
    kinds = [(scene, mark == ORNAMENTS, mark) for scene in SCENES for mark in range(ORNAMENTS + 1)]
    covers, shades, marks = [], [], []
    for cover, shade in (overlay(*kind, size) for kind in kinds):
        marked = (shade == 1).numpy()
        covers.append(np.where(marked, 0, (cover * TWENTIETHS).round().numpy()).astype(np.uint8))
        shades.append(np.repeat((shade * 122.5).numpy().astype(np.uint8)[..., None], 3, axis=2))
        marks.append(np.where(marked, (cover * WHOLE).round().numpy(), 0).astype(np.uint8))
    return strips_of(covers, shades).to(device), strips_of(marks).to(device)


def overlay(scene: str, border: bool, ornament: int, size: Size) -> tuple[Tensor, Tensor]:
    """What a scene draws in the outer ring: (coverage (H, W), shade 0 dark, 1 letters, 2 light (H, W))."""
    width, height = size
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    u, v = torch.minimum(x, width - 1 - x), torch.minimum(y, height - 1 - y)
    cover, shade = torch.zeros(height, width), torch.zeros(height, width)
    if scene == "book":
        cover[:, :10] = 0.35
        cover[:, 10:12] = 0.6
    elif scene == "slide":
        cover[-9:] = 0.3
    elif scene == "shop":
        stripe = (x // 16) % 2 == 0
        cover[:10], shade[:10] = 0.85, torch.where(stripe, 2.0, 0.0)[:10]
    elif scene == "poster":
        cover[:6], cover[-6:] = 0.35, 0.35
    elif scene in ("button", "label"):
        corner = _outside_round(x, y, size, *((4, 20) if scene == "button" else (0, 12)))
        cover[corner], shade[corner] = 1.0, 2.0
    if border:
        edge = torch.minimum(u, v)
        ring = (edge >= INSET) & (edge < INSET + LINE)
        cover[ring], shade[ring] = 1.0, 1.0
    elif ornament and scene not in ("button", "label"):
        mark = _corner_marks(u, v, ornament)
        cover[mark], shade[mark] = 0.6, 1.0
    return cover, shade


def _outside_round(x: Tensor, y: Tensor, size: Size, inset: int, radius: int) -> Tensor:
    """Pixels outside a rounded rectangle: (H, W) bool."""
    width, height = size
    dx = (torch.maximum(inset + radius - x, x - (width - 1 - inset - radius))).clamp(min=0)
    dy = (torch.maximum(inset + radius - y, y - (height - 1 - inset - radius))).clamp(min=0)
    return dx * dx + dy * dy > radius * radius


def _corner_marks(u: Tensor, v: Tensor, kind: int) -> Tensor:
    """A small ornament in every corner, inside the outer ring of tokens; `u`, `v`: pixels from the nearest edges."""
    if kind == 1:
        return (u - 8) ** 2 + (v - 8) ** 2 < 20
    if kind == 2:
        return u + v < 14
    if kind == 3:
        return (u < 14) & (v < 14) & ((u < 5) | (v < 5)) & (u > 1) & (v > 1)
    if kind == 4:
        return (u - 8).abs() + (v - 8).abs() < 6
    return (u * u + v * v < 170) & (u * u + v * v > 90)
