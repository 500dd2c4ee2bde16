"""Linears whose weights are whole numbers of a few bits, with a scale and an offset for each group of inputs.

What AWQ, GPTQ, MLX and others store, once it is put in order (`weights.schemes.layouts`): value = code x scale +
offset. A zero point z is the offset -z x scale, which float32 holds exactly. Found in float32 and rounded once.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lanting.nn.linears import PackedLinear
from lanting.nn.rounding import expanded

RUN = 8  # codes that fill whole bytes, whatever their bits


class AffineLinear(PackedLinear):
    """`weight` (out, in * bits / 8) uint8: a row's codes one behind the other, each from its lowest bit on, in bytes
    from their lowest bit on; `weight_scale` and `weight_offset` (out, groups), any float type each."""

    weight_scale: Tensor
    weight_offset: Tensor

    def __init__(self, in_features: int, out_features: int, bias: bool = True, bits: int = 4, group: int = 128):
        super().__init__(in_features, out_features, bias)
        if not 1 <= bits <= 8 or in_features % RUN:
            raise ValueError(f"rows of {in_features} codes of {bits} bits are no whole bytes")
        if group < 1 or in_features % group:
            raise ValueError(f"groups of {group} do not divide rows of {in_features} evenly")
        self.kind, self.bits, self.group = f"uint{bits}", bits, group
        self.register_buffer("weight", torch.empty(out_features, in_features * bits // 8, dtype=torch.uint8))
        self.register_buffer("weight_scale", torch.empty(out_features, in_features // group))
        self.register_buffer("weight_offset", torch.empty(out_features, in_features // group))

    def values(self, dtype: torch.dtype, rows: Tensor | None = None) -> Tensor:
        def find(some: Tensor) -> Tensor:
            codes = unpack_codes(self.weight[some], self.bits).float().unflatten(1, (-1, self.group))  # (n, groups, g)
            by, from_ = (each[some].float()[:, :, None] for each in (self.weight_scale, self.weight_offset))
            torch.addcmul(from_, codes, by, out=codes)  # on CPUs the product is not rounded before the sum
            return codes.flatten(1)

        return expanded(self, dtype, rows, find)


class OrderedLinear(AffineLinear):
    """One whose groups are of inputs that do not stand together: GPTQ's, where inputs were rounded in the order of what
    they do. `order` (in,) int32: which input each stored column is of."""

    order: Tensor

    def __init__(self, in_features: int, out_features: int, bias: bool = True, bits: int = 4, group: int = 128):
        super().__init__(in_features, out_features, bias, bits, group)
        self.register_buffer("order", torch.empty(in_features, dtype=torch.int32))

    def dense(self, dtype: torch.dtype) -> Tensor:
        return self.values(dtype).index_select(1, self.order.argsort())

    def lookup(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        found = self.values(dtype, rows.flatten()).index_select(1, self.order.argsort())
        return found.view(*rows.shape, self.in_features)

    def plain(self, x: Tensor) -> Tensor:
        x = x.index_select(-1, self.order)
        return F.linear(x, self.values(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


def unpack_codes(packed: Tensor, bits: int) -> Tensor:
    """Bytes (rows, n * bits / 8) -> codes (rows, n) uint8; see `AffineLinear.weight`."""
    if bits == 8:
        return packed
    if 8 % bits == 0:
        shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
        return (packed[:, :, None] >> shifts & (1 << bits) - 1).flatten(1)
    parts = packed.unflatten(1, (-1, bits))  # (rows, runs, bytes of a run of 8 codes); in bytes what leaves is lost
    codes: list[Tensor] = []
    for first in range(0, RUN * bits, bits):
        byte, shift = divmod(first, 8)
        code = parts[:, :, byte] >> shift
        if shift + bits > 8:
            code = code | parts[:, :, byte + 1] << 8 - shift
        codes.append(code & (1 << bits) - 1)
    return torch.stack(codes, 2).flatten(1)


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """The inverse of `unpack_codes`: integers (rows, n) below 2^bits -> bytes (rows, n * bits / 8)."""
    if bits == 8:
        return codes.to(torch.uint8)
    if 8 % bits == 0:
        places = codes.to(torch.uint8).unflatten(1, (-1, 8 // bits))  # (rows, bytes, codes of a byte)
        found = places[:, :, 0].clone()
        for place in range(1, 8 // bits):
            found |= places[:, :, place] << bits * place
        return found
    runs = codes.to(torch.int64).unflatten(1, (-1, RUN))  # (rows, runs, 8): together fewer than 64 bits
    whole = (runs << torch.arange(0, RUN * bits, bits, device=codes.device)).sum(2)
    at = torch.arange(0, RUN * bits, 8, device=codes.device)
    return (whole[:, :, None] >> at & 255).to(torch.uint8).flatten(1)
