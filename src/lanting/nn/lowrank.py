"""Linears whose weight is a coarse one and a thin product that makes up for it: SVDQuant's.

What the few bits can't say goes into two thin matrices, which stay in 16 bits; before it was rounded, the rest was
multiplied input by input, so that inputs which are large were rounded finely, and inputs are divided by that again:
    y = R (x / smooth) + up (down x) + bias
R is a packed Linear of its own, so kernels that multiply its kind serve here, too. Rejected: dividing R's own scales,
which would do where each had one input. Source: SVDQuant (Li et al., 2024).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lanting.nn.linears import PackedLinear
from lanting.nn.rotate import rotate_blocks
from lanting.nn.rounding import expanded


class LowRankLinear(PackedLinear):
    """Around a packed Linear without bias, `residual`. `smooth` (in,), `down` (rank, in) and `up` (out, rank) hold any
    float type; `smooth` is None where inputs are not divided."""

    smooth: Tensor | None
    down: Tensor
    up: Tensor

    def __init__(self, residual: PackedLinear, rank: int, bias: bool = True, smooth: bool = True, rotate: int = 0):
        super().__init__(residual.in_features, residual.out_features, bias, rotate)
        if residual.bias is not None or residual.rotate:
            raise ValueError("what a low rank is added to has no bias and is not rotated")
        if rank < 1:
            raise ValueError(f"a rank of {rank} is none")
        self.kind, self.residual = f"{residual.kind}, low-rank {rank}", residual
        for name, *sides in (("down", rank, self.in_features), ("up", self.out_features, rank)):
            self.register_buffer(name, torch.empty(sides, dtype=torch.bfloat16))
        self.register_buffer("smooth", torch.empty(self.in_features, dtype=torch.bfloat16) if smooth else None)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The residual's, as it is stored."""
        return self.residual.weight

    def values(self, dtype: torch.dtype, rows: Tensor | None = None) -> Tensor:
        down, smooth = self.down.float(), None if self.smooth is None else self.smooth.float()

        def find(some: Tensor) -> Tensor:
            coarse = self.residual.values(torch.float32, some)
            return (coarse if smooth is None else coarse.div_(smooth)).addmm_(self.up[some].float(), down)

        return expanded(self, dtype, rows, find)

    def plain(self, x: Tensor) -> Tensor:
        x = rotate_blocks(x, self.rotate) if self.rotate else x
        thin = F.linear(x, self.down.to(x.dtype))  # (..., rank)
        added = F.linear(thin, self.up.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))
        return added + self.coarse(x)

    def coarse(self, x: Tensor) -> Tensor:
        """The residual's part of the result, of inputs that are rotated if they have to be."""
        return self.residual(x if self.smooth is None else x / self.smooth.to(x.dtype))
