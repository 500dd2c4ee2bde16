"""Which attention: the best of those on this machine that compute what attention is.

Each candidate is asked for one small result and compared with float32; one that raises or errs is left out, and the
choice is remembered for the device, dtype, width of heads and whether there is a mask. LANTING_ATTENTION names one that
shall be taken where it can: fa3, fa2, cudnn, flash, efficient, math, or int8, which errs more than 16 bits do and is
never taken by itself; auto is the order below.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lanting.kernels.gpu import eight_bit
from lanting.kernels.gpu.here import capability
from lanting.kernels.gpu.names import PACKAGES, VARIABLE, usual

Way = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
HALVES = (torch.float16, torch.bfloat16)
FARTHEST = {torch.float32: 2e-3, torch.float16: 5e-3, torch.bfloat16: 2e-2}  # relative, for the right answer rounded
ROUGH = 0.03  # the same for scores in 8 bits
TOKENS, TEXT = 80, 21  # of the trial; no multiple of a tile


def by_torch(backend: str, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """One of the backends of torch's `scaled_dot_product_attention`. (B, S, H, E) -> (B, S, H, E)."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, H, S, E)
    if mask is not None:
        mask = F.pad(mask, (0, k.shape[2] - mask.shape[1]), value=True)[:, None, None]  # (B, 1, 1, S)
        mask = mask.expand(-1, 1, q.shape[2], -1)
    with sdpa_kernel(getattr(SDPBackend, backend)):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


def by_package(module: str, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """FlashAttention's own packages; they know no mask."""
    if mask is not None or q.dtype not in HALVES:
        raise ValueError("it takes 16 bits and no mask")
    found: Any = import_module(module).flash_attn_func(q, k, v)
    return found[0] if isinstance(found, tuple) else found


WAYS: dict[str, Way] = {
    "fa3": partial(by_package, PACKAGES["fa3"]),
    "cudnn": partial(by_torch, "CUDNN_ATTENTION"),
    "fa2": partial(by_package, PACKAGES["fa2"]),
    "flash": partial(by_torch, "FLASH_ATTENTION"),
    "efficient": partial(by_torch, "EFFICIENT_ATTENTION"),
    "math": partial(by_torch, "MATH"),
    "int8": eight_bit.attend,
}


@dataclass
class Choices:
    """What was chosen, and from what."""

    ways: Mapping[str, Way] = field(default_factory=lambda: WAYS)
    names: dict[tuple[torch.device, torch.dtype, int, bool], str] = field(default_factory=dict)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Attention of (B, S, H, E) over all keys; mask (B, T) bool over the first T. Raises ValueError for a name
        in LANTING_ATTENTION that is none."""
        key = (q.device, q.dtype, q.shape[-1], mask is not None)
        if key not in self.names:
            self.names[key] = self.choose(*key)
        return self.ways[self.names[key]](q, k, v, mask)

    def choose(self, device: torch.device, dtype: torch.dtype, width: int, masked: bool) -> str:
        for name in order(device):
            if name in self.ways and self.right(name, device, dtype, width, masked):
                return name
        return "math"

    def right(self, name: str, device: torch.device, dtype: torch.dtype, width: int, masked: bool) -> bool:
        """Whether it computes attention, to what the dtype can hold."""
        draw = torch.Generator().manual_seed(0)
        q, k, v = (torch.randn(2, TOKENS, 2, width, generator=draw).to(device, dtype) for _ in range(3))
        mask = (torch.rand(2, TEXT, generator=draw) > 0.3).to(device) if masked else None
        try:
            found = self.ways[name](q, k, v, mask)
        except torch.OutOfMemoryError:
            raise
        except Exception:
            return False
        wanted = exact(q.float(), k.float(), v.float(), mask)
        if found.shape != wanted.shape or found.dtype != dtype:
            return False
        return bool((found.float() - wanted).norm() <= (ROUGH if name == "int8" else FARTHEST[dtype]) * wanted.norm())


def exact(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """By the formula, in the dtype that is given."""
    scores = torch.einsum("bihe,bjhe->bhij", q, k) * q.shape[-1] ** -0.5
    if mask is not None:
        seen = F.pad(mask, (0, k.shape[1] - mask.shape[1]), value=True)
        scores = scores.masked_fill(~seen[:, None, None], -torch.inf)
    return torch.einsum("bhij,bjhe->bihe", scores.softmax(-1), v)


def order(device: torch.device) -> tuple[str, ...]:
    """What is tried first. Raises ValueError for a name in LANTING_ATTENTION that is none."""
    asked = os.environ.get(VARIABLE, "auto").strip().lower() or "auto"
    if asked != "auto" and asked not in WAYS:
        raise ValueError(asked)
    every = usual(capability(device))
    return every if asked == "auto" else (asked, *every)


@cache
def choices() -> Choices:
    """The ones of this process."""
    return Choices()


def chosen() -> dict[str, str]:
    """What was chosen so far, for people: {"cuda:0 bfloat16 128 masked": "cudnn"}."""
    return {
        f"{device} {str(dtype).removeprefix('torch.')} {width}{' masked' if masked else ''}": name
        for (device, dtype, width, masked), name in choices().names.items()
    }
