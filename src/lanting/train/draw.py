"""Draw batches of designs as tensors, on any device: ground and scene, then text, then pictograms.

`plan` does all that goes design by design in Python; `paint` is left with a few dozen tensor operations for a whole
batch, none of which waits for the device. One process may plan and another, with a GPU, paint: a plan is a hundredth
of its pictures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lanting.train.atlas import Atlas, default_atlas
from lanting.train.backdrop import TWENTIETHS, depth, overflows, overlay_row, overlays, pattern_row, patterns
from lanting.train.design import COLORS, TOKEN, UNIT, Design, Placement, place
from lanting.train.strips import STRIP, Placed, Sheet, placed, send

CPU = torch.device("cpu")
INK = TOKEN // 2  # squares of 2 x 2 pixels along a token


@dataclass(frozen=True)
class Layout:
    """What stands where on one sheet, pictograms left out."""

    graded: np.ndarray  # (g,) int32, the pictures whose ground has two colours
    frames: Placed  # what scenes draw in colours of their own
    marks: Placed  # borders and ornaments, in the colour of the letters
    glyphs: Placed


@dataclass(frozen=True)
class Plan:
    """A batch of designs of one size. Some grounds go beyond 0..255 below their text; these are drawn apart."""

    size: tuple[int, int]  # width, height
    colours: np.ndarray  # (B, 9) uint8: upper ground, lower ground, letters
    pattern: np.ndarray  # (B,) int32, row of the patterns
    depth: np.ndarray  # (B,) float32, grey levels
    layout: Layout  # of all others
    beyond: np.ndarray  # (b,) int32, which are drawn apart
    apart: Layout
    stamps: Placed  # the pictograms of all

    @property
    def count(self) -> int:
        return len(self.colours)


def render(
    designs: Sequence[Design], atlas: Atlas | None = None, placements: Sequence[Placement] | None = None
) -> Tensor:
    """Pictures of designs of one size: (B, H, W, 3) uint8 on the atlas's device.

    A picture depends neither on the others of its batch nor on the device. Raises `RequestError` for a design that
    does not fit its canvas and `KeyError` for a character that no font of ours has.
    """
    atlas = atlas or default_atlas()
    return paint(plan(designs, placements or [place(d) for d in designs], atlas), atlas)


def plan(designs: Sequence[Design], placements: Sequence[Placement], atlas: Atlas) -> Plan:
    """Everything `paint` must know of designs of one size."""
    width, height = designs[0].size
    each = height * width // UNIT
    beyond = [b for b, d in enumerate(designs) if d.texture != "plain" and overflows(d.ground, d.ground2, d.letters)]
    others = sorted(set(range(len(designs))).difference(beyond))
    stamps = [
        (design.concept or 0, b * each + y * width + x)
        for b, (design, placement) in enumerate(zip(designs, placements, strict=True))
        for x, y in placement.pictograms
    ]
    return Plan(
        (width, height),
        np.array([COLORS[d.ground] + COLORS[d.ground2 or d.ground] + COLORS[d.letters] for d in designs], np.uint8),
        np.array([pattern_row(d) for d in designs], np.int32),
        np.array([depth(d.ground, d.letters) for d in designs], np.float32),
        _layout([(b, designs[b], placements[b]) for b in others], atlas),
        np.array(beyond, np.int32),
        _layout([(number, designs[b], placements[b]) for number, b in enumerate(beyond)], atlas),
        placed(atlas.stamps, stamps),
    )


def _layout(drawn: Sequence[tuple[int, Design, Placement]], atlas: Atlas) -> Layout:
    """Designs, each with the number of its picture on the sheet."""
    graded, scenes, glyphs = [], [], []
    for number, design, placement in drawn:
        width, height = design.size
        begin = number * height * width // UNIT
        if design.ground2 is not None:
            graded.append(number)
        if row := overlay_row(design, placement):
            scenes.append((row, begin))
        entries = atlas.faces[design.face, placement.large]
        for glyph in placement.glyphs:
            if glyph.character != " ":
                glyphs.append((entries[glyph.character], begin + glyph.y * width + glyph.x))
    frames, marks = overlays(drawn[0][1].size, CPU) if drawn else (atlas.glyphs, atlas.glyphs)
    text = placed(atlas.glyphs, glyphs)
    return Layout(np.array(graded, np.int32), placed(frames, scenes), placed(marks, scenes), text)


@torch.no_grad()
def paint(plan: Plan, atlas: Atlas) -> Tensor:
    """Pictures (B, H, W, 3) uint8 on the atlas's device."""
    sheet = Sheet(plan.count, plan.size, atlas.device)
    _draw(sheet, plan, plan.layout, np.arange(plan.count), atlas)
    if len(plan.beyond):
        apart = Sheet(len(plan.beyond), plan.size, atlas.device, torch.int16)
        _draw(apart, plan, plan.apart, plan.beyond, atlas)
        done = apart.pictures().clamp_(0, 255).to(torch.uint8)
        sheet.pictures().index_copy_(0, send(plan.beyond, atlas.device).long(), done)
    sheet.lay(atlas.stamps, plan.stamps)
    return sheet.pictures()


def stencil(plan: Plan) -> Plan:
    """The same plan in white on a black, even ground: the shapes without their colours."""
    colours = np.zeros_like(plan.colours)
    colours[:, 6:] = 255
    return replace(plan, colours=colours, depth=np.zeros_like(plan.depth))


@torch.no_grad()
def paint_ink(plan: Plan, atlas: Atlas) -> Tensor:
    """How much of each 2 x 2 pixels is ink, by tokens: (B, N, 64) uint8, rows of 8 squares after one another."""
    grey = paint(stencil(plan), atlas).float().mean(-1)[:, None]  # (B, 1, H, W)
    squares = F.avg_pool2d(grey, 2).squeeze(1)
    count, height, width = squares.shape
    cells = squares.view(count, height // INK, INK, width // INK, INK).transpose(2, 3)
    return cells.reshape(count, -1, INK * INK).round().to(torch.uint8)


def _draw(sheet: Sheet, plan: Plan, layout: Layout, chosen: np.ndarray, atlas: Atlas) -> None:
    """The chosen pictures of a plan without their pictograms."""
    device = atlas.device
    colours = send(plan.colours[chosen], device).unflatten(1, (3, 3))  # (b, 3, 3)
    field = patterns(device)[send(plan.pattern[chosen], device).long()]  # (b, 16, 16)
    _draw_grounds(sheet, colours, field * send(plan.depth[chosen], device)[:, None, None], layout.graded)
    frames, marks = overlays(plan.size, device)
    sheet.lay(frames, layout.frames, whole=TWENTIETHS)
    sheet.lay(marks, layout.marks, colours[:, 2])
    sheet.lay(atlas.glyphs, layout.glyphs, colours[:, 2])


def _draw_grounds(sheet: Sheet, colours: Tensor, field: Tensor, graded: np.ndarray) -> None:
    """Colours (b, 3, 3), of which the first two are the ground's, and textures (b, 16, 16) in grey levels."""
    across, down = sheet.width // TOKEN, sheet.height // TOKEN
    canvas = sheet.strips.view(sheet.count, down, TOKEN, across, 2 * STRIP).view(torch.int64)
    first, last = (colours[:, i, None, None, None].float() for i in (0, 1))  # (b, 1, 1, 1, 3)
    field = field[:, None, :, :, None]  # (b, 1, 16, 16, 1)
    canvas.copy_(_packed(first + field, sheet))
    if len(graded):
        which = send(graded, canvas.device).long()
        share = torch.linspace(0, 1, sheet.height, device=canvas.device).view(1, down, TOKEN, 1, 1)
        piece = _packed(torch.lerp(first[which], last[which], share) + field[which], sheet)
        canvas[which] = piece.expand(-1, -1, -1, across, -1)


def _packed(piece: Tensor, sheet: Sheet) -> Tensor:
    """One token's width of grounds (b, n, 16, 16, 3) as the sheet keeps it: (b, n, 16, 1, words) int64."""
    if sheet.strips.dtype == torch.uint8:
        piece = piece.clamp(0, 255)
    return piece.round().to(sheet.strips.dtype).flatten(3)[:, :, :, None].view(torch.int64)


__all__ = ["INK", "Plan", "paint", "paint_ink", "plan", "render", "stencil"]
