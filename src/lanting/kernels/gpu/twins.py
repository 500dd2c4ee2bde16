"""What every kernel means, in plain torch: the fallback, and what tests compare kernels with.

Everything is float32 inside and rounded once. A dozen passes over memory where a kernel takes one.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

FP8 = torch.float8_e4m3fn
Form = torch.dtype | tuple[torch.dtype | None, int] | None
"""How rows are kept: int8 or e4m3 `Codes`, or None: as they are; (that, n): rotated in runs of n numbers first."""
MOST = {torch.int8: 127.0, FP8: 448.0}
LIMIT = 65504.0  # of float16
LEAST = 1e-30  # a row whose largest number is below becomes zeros


@dataclass(frozen=True, slots=True)
class Codes:
    """Rows in 8 bits, each with its scale."""

    data: Tensor  # (rows, columns) int8 or e4m3
    scale: Tensor  # (rows, 1) float32
    shape: tuple[int, ...]  # of the rows: (B, n), or (rows,)

    def values(self) -> Tensor:
        """(*shape, columns) float32."""
        return (self.data.float() * self.scale).unflatten(0, self.shape)


@dataclass(frozen=True, slots=True)
class Sums:
    """A product of integers before its scales and bias."""

    data: Tensor  # (rows, columns) int32
    row: Tensor  # (rows, 1) float32
    column: Tensor  # (columns,) float32
    bias: Tensor | None  # (columns,)
    shape: tuple[int, ...]

    def values(self) -> Tensor:
        """(*shape, columns) float32."""
        made = self.data.float() * self.row * self.column
        return (made if self.bias is None else made + self.bias.float()).unflatten(0, self.shape)


def per_token(vectors: Tensor, tokens: int, split: int) -> Tensor:
    """(B or 1, 1 or 2, W) float32 for every token: with two rows the second holds from token `split` on."""
    if vectors.shape[1] == 1:
        return vectors.float()
    return torch.where(torch.arange(tokens, device=vectors.device)[:, None] < split, *vectors.float().split(1, 1))


def coded(v: Tensor, form: torch.dtype) -> Codes:
    """Round float32 rows (..., W)."""
    rows, most = v.flatten(0, -2), MOST[form]
    peak = rows.abs().nan_to_num(0.0, torch.inf).amax(-1, keepdim=True)
    code = (rows * torch.where(peak > LEAST, most / peak, 0.0)).clamp(-most, most)
    scale = torch.where(peak > LEAST, peak / most, 1.0) + (rows * 0.0).sum(-1, keepdim=True)
    data = code.round().nan_to_num(0.0).to(form) if form == torch.int8 else code.to(form)
    return Codes(data, scale, tuple(v.shape[:-1]))


def parted(form: Form) -> tuple[torch.dtype | None, int]:
    """(int8, e4m3 or None, run that is rotated or 0)"""
    return form if isinstance(form, tuple) else (form, 0)


@cache
def hadamard(size: int, device: torch.device) -> Tensor:
    """The regular matrix of `nn.rotate`, (size, size) float32; `size` is a power of 4."""
    seed = 0.5 - torch.eye(4, device=device).flip(1)
    return seed if size == 4 else torch.kron(hadamard(size // 4, device), seed)


def rotated(v: Tensor, size: int) -> Tensor:
    """Runs of `size` numbers of float32 rows (..., W)."""
    return (v.unflatten(-1, (-1, size)) @ hadamard(size, v.device)).flatten(-2) if size else v


def kept(v: Tensor, form: Form, dtype: torch.dtype) -> Tensor | Codes:
    """float32 rows as they are kept; plain ones in `dtype`."""
    kind, turn = parted(form)
    v = rotated(v, turn)
    return v.to(dtype) if kind is None else coded(v, kind)


def clipped(v: Tensor, dtype: torch.dtype) -> Tensor:
    return v.clamp(-LIMIT, LIMIT) if dtype == torch.float16 else v


def joined(x: Tensor, y: Tensor, gate: Tensor, split: int) -> Tensor:
    """x + gate * y."""
    return clipped(x.float() + per_token(gate, x.shape[1], split) * y.float(), x.dtype).to(x.dtype)


def norm(x: Tensor, shift: Tensor | None, scale: Tensor, split: int, form: Form, eps: float) -> Tensor | Codes:
    v = F.layer_norm(x.float(), x.shape[-1:], eps=eps)
    v = v * (1 + per_token(scale, x.shape[1], split))
    return kept(v if shift is None else v + per_token(shift, x.shape[1], split), form, x.dtype)


def activate(v: Tensor, bias: Tensor | None, gelu: bool) -> Tensor:
    """float32 in and out."""
    v = v if bias is None else v + bias.float()
    return F.gelu(v, approximate="tanh") if gelu else v


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """float32 in and out."""
    return F.silu(gate) * up


def head_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    v = x.float()
    return (v * torch.rsqrt(v.square().mean(-1, keepdim=True) + eps)).to(weight.dtype) * weight


def turn(x: Tensor, first: Tensor, other: Tensor, rope: tuple[Tensor, Tensor], text: int, eps: float) -> None:
    """x (B, S, H, E) in place."""
    cos, sin = (table[:, None] for table in rope)
    v = torch.cat([head_norm(x[:, :text], first, eps), head_norm(x[:, text:], other, eps)], 1)
    a, b = v.float().unflatten(-1, (-1, 2)).unbind(-1)
    x.copy_(torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2))


def product(codes: Codes, weight: Tensor, scale: Tensor) -> Tensor:
    """(rows, N) float32 of codes with weight (N, K) of their type and scales (N,); sums of integers are exact."""
    if codes.data.dtype == torch.int8:
        if weight.device.type == "cpu":
            sums = torch._int_mm(codes.data, weight.T).float()
        else:
            sums = (codes.data.double() @ weight.double().T).float()
    else:
        sums = codes.data.float() @ weight.float().T
    return sums * codes.scale * scale


def expand(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """A weight (N, K / 2) of 4 bits with scales (N, K / G) as (N, K); see `nn.linears.Int4Linear`."""
    groups = weight.unflatten(1, (scale.shape[1], 1, -1))  # (N, groups, 1, G / 2)
    numbers = torch.cat([groups & 15, groups >> 4], 2).float() - 8
    return (numbers * scale.float()[:, :, None, None]).flatten(1).to(dtype)
