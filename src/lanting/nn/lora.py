"""LoRA at the Linear seam: y = W x + sum of scale * up(down(x)) over any number of LoRAs.

The wrapper goes around whatever Linear is there, so it works over other wrappers too, and taking it off gives the old
bits back. All LoRAs of one Linear are stacked along their ranks: any number of them costs two thin products.
Rejected: adding up @ down to the weight, which a bfloat16 weight rounds away and which can't be undone.
Source: "LoRA: Low-Rank Adaptation of Large Language Models" (Hu et al., 2021).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lanting.nn.swap import swap


@dataclass(frozen=True, slots=True)
class Factors:
    """What one LoRA adds to one Linear of `in` to `out` features."""

    down: Tensor  # (rank, in)
    up: Tensor  # (out, rank)
    scale: float = 1.0  # strength * alpha / rank


class LoraLinear(nn.Module):
    """A Linear and what LoRAs add to it. `down`, `up` have the dtype and device of what they were given as."""

    def __init__(self, base: nn.Module, parts: Sequence[Factors]):
        super().__init__()
        self.base = base
        self.down = nn.Parameter(torch.cat([part.down for part in parts]), requires_grad=False)  # (R, in)
        self.up = nn.Parameter(torch.cat([part.up for part in parts], 1), requires_grad=False)  # (out, R)
        scales = torch.cat([torch.full((len(part.down),), part.scale) for part in parts])  # (R,) float32 always:
        self.register_buffer("scales", scales.to(self.down.device), persistent=False)  # a strength is not rounded
        self.scales: Tensor

    def forward(self, x: Tensor) -> Tensor:
        thin = F.linear(x, self.down)  # (..., R)
        return self.base(x) + F.linear((thin * self.scales).to(thin.dtype), self.up)


def attach(root: nn.Module, parts: Mapping[str, Sequence[Factors]]) -> int:
    """Wrap the Linears at the given paths; an empty list leaves one as it is. Returns how many were wrapped.

    Raises ValueError when a path is no Linear of `root` (or is wrapped already: detach first).
    """
    wanted = {path: each for path, each in parts.items() if each}
    found = {path for path, module in root.named_modules() if isinstance(module, nn.Linear)}
    if strange := sorted(set(wanted) - found):
        raise ValueError(f"{strange[0]} is no Linear here")
    return swap(root, nn.Linear, lambda path, old: LoraLinear(old, wanted[path]) if path in wanted else None)


def detach(root: nn.Module) -> int:
    """Put the wrapped Linears back; the model is then bit for bit what it was. Returns how many there were."""
    return swap(root, LoraLinear, lambda path, old: old.get_submodule("base"))
