"""Where words, reference pictures and the target stand in the one sequence of Qwen-Image-2.1's transformer.

Positions, their rotary tables, who sees whom: everything that follows from sizes alone and is the same in all blocks.
Shapes: B batch, N target tokens, T text tokens, P prefix tokens (text and reference pictures), E head width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from lanting.nn.rope import Grid, phases, picture_phases

Turn = tuple[Tensor, Tensor]  # cosines and sines (n, E/2) or (B, n, E/2), float32


@dataclass(frozen=True)
class Layout:
    """Where the tokens of a sequence stand; the same in all rows of a batch.

    A segment is a run of text or one picture: start, stop and mask (1, 1, n, stop) over all up to its end. A text sees
    what is on its left, a picture (no mask) all of itself too.
    """

    order: Tensor  # (P,) place of each prefix token in [text, references]
    segments: list[tuple[int, int, Tensor | None]]
    prefix: Turn  # (P, E/2)
    target: Turn  # (N, E/2), behind as much text as there is; (B, N, E/2) where rows differ (`behind_words`)
    frames: Tensor  # (N,) positions of the target's tokens on the first axis


def layout(
    axes: tuple[int, int, int], grids: tuple[Grid, ...], places: tuple[int, ...], text: int, device: torch.device
) -> Layout:
    """Text advances one position on all axes. A picture has one frame position and lies centred on rows and columns;
    what follows it stands max(rows, columns) positions on."""
    order, angles, segments = [], [], []
    position, stop, behind = 0, 0, text
    references = [*grids[1:], None]
    for (first, last), grid in zip(pairwise((0, *places, text)), references, strict=True):
        if last > first:
            at = torch.arange(position, position + last - first)
            order.append(torch.arange(first, last))
            angles.append(torch.cat([phases(at, dim) for dim in axes], -1))
            start, stop, position = stop, stop + len(at), position + len(at)
            mask = torch.arange(stop) <= torch.arange(start, stop)[:, None]  # (n, stop)
            segments.append((start, stop, mask[None, None].to(device)))
        if grid is not None:
            order.append(torch.arange(behind, behind + math.prod(grid)))
            angles.append(picture_phases(grid, position, axes))
            start, stop, position = stop, stop + math.prod(grid), position + max(grid[1:])
            segments.append((start, stop, None))
            behind += math.prod(grid)
    prefix, target = torch.cat(angles), picture_phases(grids[0], position, axes)
    behind_all, ahead = ((a.cos().to(device), a.sin().to(device)) for a in (target, prefix))
    frames = position + torch.arange(math.prod(grids[0])) // math.prod(grids[0][1:])
    return Layout(torch.cat(order).to(device), segments, ahead, behind_all, frames.to(device))


def behind_words(place: Layout, prompt_mask: Tensor, dim: int) -> Layout:
    """The same with a target for each row, behind the words that the row really has.

    prompt_mask (B, T) bool; dim: the first axis' share of a head. In the reference padding counts as text, so a picture
    depends on the longest prompt that is drawn beside it; here it is the one that is drawn alone.
    """
    missing = prompt_mask.shape[1] - prompt_mask.sum(1)  # (B,)
    angles = phases((place.frames - missing[:, None]).flatten(), dim).unflatten(0, (len(missing), -1))  # (B, N, dim/2)
    turns = zip((angles.cos(), angles.sin()), place.target, strict=True)
    cos, sin = (torch.cat([new, old[:, dim // 2 :].expand(len(missing), -1, -1)], -1) for new, old in turns)
    return replace(place, target=(cos, sin))


def check(tokens: int, target_tokens: int, grids: tuple[Grid, ...], places: tuple[int, ...], text: int) -> None:
    """Raises ValueError where grids, places and numbers of tokens contradict each other."""
    counts = [math.prod(grid) for grid in grids]
    if not counts or target_tokens != counts[0] or tokens != sum(counts):
        raise ValueError(f"{tokens} tokens, {target_tokens} of them the target's, are not those of grids {grids}")
    if len(places) != len(grids) - 1 or list(places) != sorted(places) or not all(0 <= p <= text for p in places):
        raise ValueError(f"places {places} must rise from 0 to {text}, one for each of {len(grids) - 1} references")


def seen(prompt_mask: Tensor, place: Layout) -> Tensor:
    """(B, T) bool over the text -> (B, 1, 1, P + N) over all keys: only padding is hidden from the target."""
    pictures = len(place.order) - prompt_mask.shape[1]
    prefix = F.pad(prompt_mask, (0, pictures), value=True)[:, place.order]  # (B, P)
    return F.pad(prefix, (0, len(place.frames)), value=True)[:, None, None]
