"""Several texts for one picture, each of which is read in a part of it only.

The texts stand one behind the other, the whole picture's last, and do not see each other. Tokens of the picture see
all of the picture, the whole picture's text, and the texts of the regions that they lie in; a region's text sees itself
and its part of the picture. Each text begins at the position where a text that is alone begins.
Queries that see the same keys are taken together, so there is no mask from query to key, which fast attention does not
take: every kind of `Attend` serves, unchanged. Source: EliGen ("Entity-Level Controlled Image Generation", 2025), for
which LoRAs exist; DiffSynth-Studio's mask for Qwen-Image says the same of every pair of tokens.
Shapes: B batch, T tokens of all texts, N of the picture, K regions, H heads, E head width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Attending = Callable[[Tensor, Tensor, Tensor, Any], Tensor]  # an `Attend`


@dataclass(frozen=True, eq=False)
class Regions:
    """What sees what. `lengths`: tokens of each region's text, then of the whole picture's; `groups`: places of queries
    and of the keys (in T + N) that they see, which are all queries once; `rows`: of `rope`."""

    lengths: tuple[int, ...]
    groups: tuple[tuple[Tensor, Tensor], ...]
    rows: Tensor

    def rope(self, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Tables for the longest text and the picture -> those of all texts and the picture, (T + N, E/2)."""
        return cos[self.rows], sin[self.rows]

    def attend(self, inner: Attending, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q, k, v (B, T + N, H, E), texts first -> (B, T + N, H, E)."""
        out = torch.empty_like(q)
        for asking, seen in self.groups:
            out[:, asking] = inner(q[:, asking], k[:, seen], v[:, seen], None)
        return out


def regions_of(lengths: Sequence[int], inside: Tensor) -> Regions:
    """From the tokens of each text, the whole picture's last, and the part of the picture that each region has: (K, N)
    bool, on the device where they are to be used."""
    device, tokens = inside.device, inside.shape[1]
    places = torch.arange(sum(lengths) + tokens, device=device)
    *own, whole, picture = places.split([*lengths, tokens])
    groups = [(text, torch.cat([text, picture[part]])) for text, part in zip(own, inside, strict=True)]
    groups.append((whole, torch.cat([whole, picture])))
    kinds, which = torch.unique(inside.T, dim=0, return_inverse=True)  # (kinds of tokens, K), (N,)
    for number, kind in enumerate(kinds.tolist()):
        texts = [text for text, there in zip(own, kind, strict=True) if there]
        groups.append((picture[which == number], torch.cat([*texts, whole, picture])))
    longest = max(lengths)
    rows = [torch.arange(length, device=device) for length in lengths]
    rows.append(torch.arange(longest, longest + tokens, device=device))
    return Regions(tuple(lengths), tuple(groups), torch.cat(rows))


def attended(attend: Attending, q: Tensor, k: Tensor, v: Tensor, ctx: Any) -> Tensor:
    """Joint attention under a `Context`: (B, T + N, H, E)."""
    return attend(q, k, v, ctx.mask) if ctx.regions is None else ctx.regions.attend(attend, q, k, v)
