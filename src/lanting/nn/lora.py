"""LoRA at the Linear seam: y = W x + sum of strength * dW x over any number of LoRAs.

The wrapper goes around whatever Linear is there, plain or packed, so it works over every format, and taking it off
gives the old bits back. All plain LoRAs of one Linear are stacked along their ranks: any number of them costs two thin
products. Other forms follow one by one (`nn.deltas`). Strengths are numbers in a buffer and may change between two
pictures. Rejected: adding up @ down to the weight always, which a bfloat16 weight rounds away, a packed one can't take,
and nobody can undo; `merge` does it for those who want it.
Source: "LoRA: Low-Rank Adaptation of Large Language Models" (Hu et al., 2021).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lanting.nn.deltas import Decomposed, Delta, dense_weight
from lanting.nn.linears import LINEARS
from lanting.nn.swap import outermost, swap


@dataclass(frozen=True, slots=True)
class Factors:
    """What one plain LoRA adds to one Linear of `in` to `out` features."""

    down: Tensor  # (rank, in)
    up: Tensor  # (out, rank)
    scale: float = 1.0  # alpha / rank
    lora: int = 0  # which of the LoRAs, for its strength


@dataclass(frozen=True, slots=True)
class Change:
    """Any other form of change."""

    delta: Delta
    lora: int = 0


Parts = Sequence[Factors | Change]


class LoraLinear(nn.Module):
    """A Linear and what LoRAs add to it. `down`, `up` have the dtype and device of what they were given as."""

    def __init__(self, base: nn.Module, parts: Parts, strengths: Sequence[float] = ()):
        super().__init__()
        self.base = base
        plain = [part for part in parts if isinstance(part, Factors)]
        other = [part for part in parts if isinstance(part, Change)]
        down = torch.cat([part.down for part in plain]) if plain else torch.empty(0, base.in_features)  # type: ignore[call-overload]
        up = torch.cat([part.up for part in plain], 1) if plain else torch.empty(base.out_features, 0)  # type: ignore[call-overload]
        self.down = nn.Parameter(down, requires_grad=False)  # (R, in)
        self.up = nn.Parameter(up, requires_grad=False)  # (out, R)
        self.changes = nn.ModuleList(part.delta for part in other)
        self.ranks = [(part.lora, len(part.down), part.scale) for part in plain]
        self.owners = [part.lora for part in other]
        where = next(iter(other[0].delta.buffers())).device if other and not plain else self.down.device
        for name, length in (("scales", len(self.down)), ("strengths", len(other))):  # float32 always: a strength
            self.register_buffer(name, torch.ones(length, device=where), persistent=False)  # is not rounded
        self.scales: Tensor
        self.strengths: Tensor
        self.set_strengths(strengths)

    def set_strengths(self, strengths: Sequence[float]) -> None:
        """One for each LoRA by its number; those beyond the last are 1. Tensors keep their places."""

        def of(lora: int) -> float:
            return strengths[lora] if lora < len(strengths) else 1.0

        scales = [scale * of(lora) for lora, rank, scale in self.ranks for _ in range(rank)]
        self.scales.copy_(torch.tensor(scales, dtype=torch.float32))
        self.strengths.copy_(torch.tensor([of(lora) for lora in self.owners], dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        plain = y = self.base(x)
        if len(self.down):
            thin = F.linear(x, self.down)  # (..., R)
            y = y + F.linear((thin * self.scales).to(thin.dtype), self.up)
        for i, change in enumerate(self.changes):
            y = y + self.strengths[i] * change(x, self.base, plain)
        return y

    @torch.no_grad()
    def dense(self, dtype: torch.dtype) -> Tensor:
        """The weight (out, in) with everything added, summed in float32."""
        total = torch.addmm(dense_weight(self.base, torch.float32), self.up.float() * self.scales, self.down.float())
        for i, change in enumerate(self.changes):
            if change.shift() is None:  # type: ignore[operator]
                added = change.change_of(self.base) if isinstance(change, Decomposed) else change.dense()  # type: ignore[operator]
                total += self.strengths[i] * added
        return total.to(dtype)

    @torch.no_grad()
    def bias(self, dtype: torch.dtype) -> Tensor | None:
        """The bias (out,) with everything added; None where there is none."""
        own = self.base.bias
        total = own.detach().float() if isinstance(own, Tensor) else None
        for i, change in enumerate(self.changes):
            shift = change.shift()  # type: ignore[operator]
            if shift is not None:
                added = self.strengths[i] * shift.float()
                total = added if total is None else total + added
        return None if total is None else total.to(dtype)


def attach(root: nn.Module, parts: Mapping[str, Parts], strengths: Sequence[float] = ()) -> int:
    """Wrap the Linears at the given paths; an empty list leaves one as it is. Returns how many were wrapped.

    Raises ValueError when a path is no Linear of `root` (or is wrapped already: detach first).
    """
    wanted = {path: each for path, each in parts.items() if each}
    inside = tuple(f"{path}." for path, module in root.named_modules() if isinstance(module, LoraLinear))
    found = {path for path, _ in outermost(root, LINEARS)}
    if strange := sorted(path for path in wanted if path not in found or path.startswith(inside)):
        raise ValueError(f"{strange[0]} is no Linear here")
    return swap(root, LINEARS, lambda path, old: LoraLinear(old, wanted[path], strengths) if path in wanted else None)


def set_strengths(root: nn.Module, strengths: Sequence[float]) -> int:
    """Change how strongly each LoRA counts, by the numbers its parts were attached with. Returns how many Linears
    have a LoRA. Whoever keeps results of these Linears (a modulation table) must drop them."""
    wrapped = [module for module in root.modules() if isinstance(module, LoraLinear)]
    for module in wrapped:
        module.set_strengths(strengths)
    return len(wrapped)


def detach(root: nn.Module) -> int:
    """Put the wrapped Linears back; the model is then bit for bit what it was. Returns how many there were."""
    return swap(root, LoraLinear, lambda path, old: old.get_submodule("base"))


def merge(root: nn.Module, dtype: torch.dtype | None = None) -> int:
    """Put plain Linears that contain their LoRAs where wrapped ones were. Returns how many there were.

    dtype  of the new weights; None: that of the old ones, which must then be plain
    Raises ValueError for a packed Linear when no dtype is given: expanding it is a wish that must be spoken.
    """

    def merged(path: str, old: nn.Module) -> nn.Module:
        assert isinstance(old, LoraLinear)
        if dtype is None and not isinstance(old.base, nn.Linear):
            raise ValueError(f"{path} is packed: merge into the dense weights, or name a dtype to expand it to")
        kind = dtype or old.base.weight.dtype
        assert isinstance(kind, torch.dtype)
        weight, bias = old.dense(kind), old.bias(kind)
        with torch.device("meta"):
            made = nn.Linear(weight.shape[1], weight.shape[0], bias is not None)
        made.weight = nn.Parameter(weight, requires_grad=False)
        if bias is not None:
            made.bias = nn.Parameter(bias, requires_grad=False)
        return made

    return swap(root, LoraLinear, merged)
