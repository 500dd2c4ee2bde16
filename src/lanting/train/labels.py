"""What the helper heads are asked during training: what stands on each token, where each quoted character goes, and
what its character looks like."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from lanting.train.atlas import LATIN, alphabet, character_label, hanzi_cell, latin_cell
from lanting.train.design import PICTOGRAM, UNIT, Design, Placement

BASE = 76  # labels are two digits of this base: 1 + characters + pictograms stay below its square
WHAT = (BASE, BASE)
WHERE = (64, 32, 8)  # columns in units and rows in tokens, both from the middle of the canvas; width of the cell
SHAPE = 16 * 16  # squares of 2 x 2 pixels that a character's cell has
SCENE = 16 * 16 * 3  # colours of the squares of 4 x 4 pixels that a pictogram has
PICTURED = WHERE[2] - 1  # the width class of a pictogram's name


def glyph_shapes(tokenizer: Tokenizer, size: int) -> Tensor:
    """How much ink each square of a token's character has in the plain face: (size, 256) uint8, zeros for others."""
    shapes = torch.zeros(size, SHAPE, dtype=torch.uint8)
    for character in alphabet():
        ids = tokenizer.encode(character, add_special_tokens=False).ids
        if len(ids) == 1 and character != " ":
            cell = np.zeros((32, 32), np.float32)
            drawn = latin_cell("mono", character, 1) if character in LATIN else hanzi_cell("mono", character)
            cell[: drawn.shape[0], : drawn.shape[1]] = drawn
            shapes[ids[0]] = F.avg_pool2d(torch.from_numpy(cell)[None], 2).flatten().round().to(torch.uint8)
    return shapes


def concept_pictures() -> torch.Tensor:
    """Every pictogram on grey in 16 x 16 squares, of mean 0 and variance 1 over all of them: (m, 768) float32."""
    from lanting.train.assets import pictograms

    drawn = torch.from_numpy(pictograms().copy()).float() / 255  # (m, 64, 64, 4)
    laid = torch.lerp(torch.full_like(drawn[..., :3], 0.5), drawn[..., :3], drawn[..., 3:])
    small = F.avg_pool2d(laid.permute(0, 3, 1, 2), 4).flatten(1)
    return (small - small.mean()) / small.std()


def concepts_of(what: Tensor) -> Tensor:
    """The pictogram that each grid of labels (B, N, 2) shows: (B,), -1 for none."""
    labels = what[..., 0] * BASE + what[..., 1] - 1 - len(alphabet())
    return labels.amax(1).clamp(min=-1)


def label_grid(design: Design, placement: Placement) -> np.ndarray:
    """The label on each token in two digits, zeros where nothing stands: (rows, columns, 2) uint8."""
    wide, high = design.size[0] // UNIT, design.size[1] // UNIT
    grid = np.zeros((high, wide), dtype=np.int64)  # by units first: two narrow letters share a token
    for glyph in placement.glyphs:
        grid[glyph.y : glyph.y + glyph.height, glyph.x : glyph.x + glyph.width] = character_label(glyph.character)
    if placement.pictograms:
        label = 1 + len(alphabet()) + (design.concept or 0)
        for x, y in placement.pictograms:
            grid[y : y + PICTOGRAM, x : x + PICTOGRAM] = label
    tokens = grid[::2, ::2]
    tokens = np.where(tokens > 0, tokens, grid[::2, 1::2])
    return np.stack([tokens // BASE, tokens % BASE], -1).astype(np.uint8)


def label_places(
    design: Design, placement: Placement, prompt: str, starts: Sequence[int]
) -> list[tuple[int, int, int, int]]:
    """For each token that spells a character or ends the pictogram's name: (token, column, row, width class).

    `starts` holds the index in `prompt` of each token's first character. A name is asked about at its last token: the
    reader looks back only, so it is the first that can know all of it.
    """
    found = _letters(design, placement, prompt, starts)
    if design.concept is not None and placement.pictograms:
        x, y = placement.pictograms[0]
        named = _name_ends(prompt, design.concept, starts)
        found += [(token, *_spot(design, x, y, PICTURED)) for token in named]
    return sorted(found)


def label_edit(
    designs: tuple[Design, Design], placements: tuple[Placement, Placement], prompt: str, starts: Sequence[int]
) -> list[tuple[int, int, int, int]]:
    """The same for an edit, of its (source, target): words that it quotes and that are to go stand where they are in
    the source.

    To say so the network must find them there, and so which line is meant, how it is aligned, how wide its face runs.
    """
    found = label_places(designs[1], placements[1], prompt, starts)
    taken = {token for token, *_ in found}
    old = _letters(designs[0], placements[0], prompt, starts)
    return sorted([*found, *(spot for spot in old if spot[0] not in taken)])


def label_example(
    designs: Sequence[Design], placements: Sequence[Placement], prompt: str, starts: Sequence[int]
) -> list[tuple[int, int, int, int]]:
    """`label_places` of a design alone, `label_edit` of a target that the pictures it is made from follow."""
    if len(designs) == 1:
        return label_places(designs[0], placements[0], prompt, starts)
    return label_edit((designs[1], designs[0]), (placements[1], placements[0]), prompt, starts)


def _letters(
    design: Design, placement: Placement, prompt: str, starts: Sequence[int]
) -> list[tuple[int, int, int, int]]:
    """Where the characters that the prompt quotes stand, by token."""
    from lanting.train.wording import locate

    spots: dict[int, tuple[int, int, int]] = {}  # index in the prompt -> what is asked
    try:
        lines = locate(prompt, design.lines)
    except ValueError:
        lines = []
    for glyph in placement.glyphs:
        if lines and lines[glyph.line]:
            spots[lines[glyph.line][glyph.index]] = (glyph.x, glyph.y, min(glyph.width, WHERE[2] - 1))
    found = []
    for token, start in enumerate(starts):
        key = start if start in spots else start + 1 if prompt[start : start + 1] == " " else -1
        if start >= 0 and key in spots:
            found.append((token, *_spot(design, *spots[key])))
    return found


def _spot(design: Design, x: int, y: int, width: int) -> tuple[int, int, int]:
    """Column, row and width class of what stands at (x, y) in units."""
    middle_x, middle_y = design.size[0] // UNIT // 2, design.size[1] // UNIT // 2
    column = min(max(x - middle_x + WHERE[0] // 2, 0), WHERE[0] - 1)
    row = min(max((y - middle_y) // 2 + WHERE[1] // 2, 0), WHERE[1] - 1)
    return column, row, width


def _name_ends(prompt: str, number: int, starts: Sequence[int]) -> list[int]:
    """The last token of a pictogram's name in each language that the prompt names it in."""
    from lanting.train.assets import concepts
    from lanting.train.wording import locate_concept

    names = concepts()[number].name_en, concepts()[number].name_zh
    ends = [spots[-1] for name in names if (spots := locate_concept(prompt, name))]
    inside = [[token for token, start in enumerate(starts) if 0 <= start <= end] for end in ends]
    return sorted({tokens[-1] for tokens in inside if tokens})
