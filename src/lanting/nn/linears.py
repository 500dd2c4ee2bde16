"""Linears whose weights stay packed in memory and are expanded when they are used.

A quantized Linear costs the memory of its packed form and, for the moment of one product, of one dense weight. All
kinds share one seam, `dense`, so LoRA, merging and fused kernels need not know which kind they sit on. Buffers carry
the names files use (`weight`, `weight_scale`, `bias`), so loading is assignment. A file's kinds:
    Int8Linear  signed bytes, one scale per output channel, per group of inputs, or per block of both
    Int4Linear  two values a byte, one scale per output channel and group of inputs
    Fp8Linear   e4m3 or e5m2, bare or with scales
    GgufLinear  any block type of GGUF, in the file's own bytes
Rejected: int8 or fp8 matrix products here. They need scales of the activations too and pay only on some hardware, so
they are kernels that replace a class as a whole, not the definition of the format.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lanting.nn.rotate import rotate_blocks
from lanting.nn.rounding import at_once, best_scale, check_scale, positive, rotated, runs, to_codes

FP8 = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


class PackedLinear(nn.Module):
    """y = x W^T + b for a W that is stored in fewer bits.

    Subclasses hold buffers and say in `values` what they mean. `rotate` is the block of the Hadamard rotation that
    the stored weight went through (0: none); the inputs then go through it too.
    """

    kind = "packed"
    weight: Tensor
    bias: Tensor | None
    product: Callable[[Any, Tensor], Tensor] | None = None  # what computes x W^T + b instead, where something is faster

    def __init__(self, in_features: int, out_features: int, bias: bool = True, rotate: int = 0):
        super().__init__()
        self.in_features, self.out_features, self.rotate = in_features, out_features, rotate
        self.register_buffer("bias", torch.empty(out_features) if bias else None)

    def values(self, dtype: torch.dtype, rows: Tensor | None = None) -> Tensor:
        """The stored weight in `dtype`, as rotated as it is: (out, in), or (n, in) of the given rows (n,)."""
        raise NotImplementedError

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The weight (out, in) that a plain Linear would have."""
        stored = self.values(dtype)
        return rotate_blocks(stored, self.rotate) if self.rotate else stored

    def lookup(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """Some rows of the weight: indices (...) -> (..., in)."""
        found = self.values(dtype, rows.flatten())
        found = rotate_blocks(found, self.rotate) if self.rotate else found
        return found.view(*rows.shape, self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        if self.product is not None:
            return self.product(self, x)
        return self.plain(x)

    def plain(self, x: Tensor) -> Tensor:
        """`forward` by the definition."""
        x = rotate_blocks(x, self.rotate) if self.rotate else x
        return F.linear(x, self.values(x.dtype), None if self.bias is None else self.bias.to(x.dtype))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves to other devices, and keeps what is stored: a cast of packed weights or scales would spoil them."""

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(move, recurse)

    def extra_repr(self) -> str:
        rotated = f", rotated by {self.rotate}" if self.rotate else ""
        return f"{self.in_features}, {self.out_features}, {self.kind}, bias={self.bias is not None}{rotated}"


LINEARS: tuple[type[nn.Module], ...] = (nn.Linear, PackedLinear)
"""What counts as a Linear for LoRA and whoever else swaps them."""


class ScaledLinear(PackedLinear):
    """One stored number per weight, times a scale that covers a tensor, a row, a group or a block of them.

    `weight_scale` is () or (1,), (out,) or (out, 1), or (out / a, in / b) for blocks of a x b; None: no scale.
    """

    stored: torch.dtype
    weight_scale: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        rotate: int = 0,
        scale: tuple[int, ...] | None = (),
    ):
        super().__init__(in_features, out_features, bias, rotate)
        check_scale(scale, out_features, in_features)
        self.register_buffer("weight", torch.empty(out_features, in_features, dtype=self.stored))
        self.register_buffer("weight_scale", None if scale is None else torch.empty(scale))

    def numbers(self, dtype: torch.dtype, rows: Tensor | None) -> Tensor:
        """The stored numbers as they are, in a tensor of their own."""
        return (self.weight if rows is None else self.weight[rows]).to(dtype)

    def values(self, dtype: torch.dtype, rows: Tensor | None = None) -> Tensor:
        numbers, scale = self.numbers(dtype, rows), self.weight_scale
        if scale is None:
            return numbers
        if scale.numel() == 1:  # two axes: a scalar would be rounded to `dtype` before the product
            scale = scale.reshape(1, 1).expand(self.out_features, 1)
        scale = scale[:, None] if scale.ndim == 1 else scale  # (out / a, in / b)
        if rows is not None or scale.shape[0] != self.out_features:
            every = self.out_features // scale.shape[0]
            rows = torch.arange(self.out_features, device=scale.device) if rows is None else rows
            scale = scale[rows // every]
        # a CPU makes float32 copies of 16-bit numbers to multiply them: of a few rows at a time
        few = at_once(self.in_features) if numbers.device.type == "cpu" else len(numbers)
        grouped = numbers.unflatten(1, (scale.shape[1], -1))  # (out, in / b, b)
        for some, by in zip(grouped.split(few), scale.float().split(few), strict=True):
            some.mul_(by[:, :, None])
        return numbers


class Int8Linear(ScaledLinear):
    """Signed bytes from -127 to 127."""

    kind, stored = "int8", torch.int8

    @classmethod
    def from_dense(cls, weight: Tensor, bias: Tensor | None = None, *, group: int = 0, rotate: int = 0) -> Self:
        """Round a weight (out, in) to the nearest, with a scale per row, or per `group` inputs of a row."""
        made = empty(cls, weight, bias, rotate, scale=(weight.shape[0], weight.shape[1] // group if group else 1))
        packed, scales = [], []
        for rows in runs(weight):
            grouped = rotated(rows, rotate).unflatten(1, (-1, group or weight.shape[1]))  # (rows, groups, g)
            scale = positive(grouped.abs().amax(-1) / 127)
            packed.append((grouped / scale[:, :, None]).round_().clamp_(-127, 127).to(torch.int8).flatten(1))
            scales.append(scale)
        made.weight, made.weight_scale = torch.cat(packed), torch.cat(scales)
        return made


class Fp8Linear(ScaledLinear):
    """8-bit floats. Where a device has none (Apple's GPUs) `weight` may hold their bytes and a table their values."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        kind: str = "e4m3",
        scale: tuple[int, ...] | None = None,
        rotate: int = 0,
    ):
        self.kind, self.stored = f"fp8 {kind}", FP8[kind]
        super().__init__(in_features, out_features, bias, rotate, scale)

    def numbers(self, dtype: torch.dtype, rows: Tensor | None) -> Tensor:
        if self.weight.dtype != torch.uint8:
            if rows is None:
                return self.weight.to(dtype)
            return self.weight.view(torch.uint8)[rows].view(self.stored).to(dtype)  # bytes: 8-bit floats can't gather
        table = torch.arange(256, dtype=torch.uint8).view(self.stored).to(dtype).to(self.weight.device)
        return table[(self.weight if rows is None else self.weight[rows]).int()]

    @classmethod
    def from_dense(
        cls,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        kind: str = "e4m3",
        scale: str | None = "channel",
        rotate: int = 0,
    ) -> Self:
        """Round a weight (out, in); `scale` is "channel", "tensor", or None for a plain down-cast."""
        shape = {"channel": (weight.shape[0], 1), "tensor": (), None: None}[scale]
        made = empty(cls, weight, bias, rotate, kind=kind, scale=shape)
        most = torch.finfo(FP8[kind]).max
        if shape is not None:
            peaks = torch.cat([rotated(rows, rotate).abs().amax(1, keepdim=True) for rows in runs(weight)])
            made.weight_scale = positive((peaks if shape else peaks.amax()) / most)
        packed, done = [], 0
        for rows in runs(weight):
            exact = rotated(rows, rotate)
            if made.weight_scale is not None:
                exact = exact / (made.weight_scale[done : done + len(rows)] if shape else made.weight_scale)
            packed.append(exact.clamp(-most, most).to(FP8[kind]))
            done += len(rows)
        made.weight = torch.cat([part.view(torch.uint8) for part in packed]).view(FP8[kind])
        return made


class Int4Linear(PackedLinear):
    """Values from -8 to 7, stored with 8 added; a byte holds value i of a group's first half (low bits) and of its
    second half (high bits), so both halves unpack to runs of neighbours.

    weight (out, in / 2) uint8, weight_scale (out, in / group) bfloat16 or float16; scales may be negative.
    """

    kind = "int4"
    weight_scale: Tensor

    def __init__(self, in_features: int, out_features: int, bias: bool = True, group: int = 64, rotate: int = 0):
        super().__init__(in_features, out_features, bias, rotate)
        if group % 2 or in_features % group:
            raise ValueError(f"groups of {group} do not divide rows of {in_features} evenly")
        self.group = group
        self.register_buffer("weight", torch.empty(out_features, in_features // 2, dtype=torch.uint8))
        self.register_buffer("weight_scale", torch.empty(out_features, in_features // group, dtype=torch.bfloat16))

    def values(self, dtype: torch.dtype, rows: Tensor | None = None) -> Tensor:
        packed, scale = self.weight, self.weight_scale
        if rows is not None:
            packed, scale = packed[rows], scale[rows]
        packed = packed.unflatten(1, (-1, 1, self.group // 2))  # (out, groups, 1, g / 2)
        numbers = torch.cat([packed & 15, packed >> 4], 2).to(dtype).sub_(8)  # (out, groups, 2, g / 2)
        return numbers.mul_(scale.to(dtype)[:, :, None, None]).flatten(1)

    @classmethod
    def from_dense(
        cls,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        group: int = 64,
        rotate: int = 0,
        scales: torch.dtype = torch.bfloat16,
    ) -> Self:
        """Round a weight (out, in), each group with the scale of `SHRINK` that errs least."""
        made = empty(cls, weight, bias, rotate, group=group)
        packed, found = [], []
        for rows in runs(weight):
            grouped = rotated(rows, rotate).unflatten(1, (-1, group))  # (rows, groups, g)
            scale = best_scale(grouped, scales)
            low, high = to_codes(grouped, scale).to(torch.uint8).chunk(2, -1)
            packed.append((low | high << 4).flatten(1))
            found.append(scale.to(scales))
        made.weight, made.weight_scale = torch.cat(packed), torch.cat(found)
        return made


class GgufLinear(PackedLinear):
    """A weight in GGUF's bytes: `weight` is uint8 (out, bytes of one row) of the block type `kind` ("Q4_K")."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True, kind: str = "Q8_0", row_bytes: int = 0):
        super().__init__(in_features, out_features, bias)
        self.kind = kind
        self.register_buffer("weight", torch.empty(out_features, row_bytes, dtype=torch.uint8))

    def values(self, dtype: torch.dtype, rows: Tensor | None = None) -> Tensor:
        from lanting.nn.dequant import dequantize

        return dequantize(self.weight if rows is None else self.weight[rows], self.kind, dtype)

    @classmethod
    def from_packed(cls, packed: Tensor, kind: str, in_features: int, bias: Tensor | None = None) -> Self:
        """Around the bytes of a file (out, bytes of one row)."""
        with torch.device("meta"):
            made = cls(in_features, packed.shape[0], bias is not None, kind, packed.shape[1])
        made.weight, made.bias = packed, bias
        return made


class PackedEmbedding(nn.Module):
    """An embedding over a packed table: only the rows that are asked for are expanded."""

    def __init__(self, table: PackedLinear, dtype: torch.dtype):
        super().__init__()
        self.table, self.dtype = table, dtype
        self.num_embeddings, self.embedding_dim = table.out_features, table.in_features

    @property
    def weight(self) -> Tensor:
        """The whole table (vocabulary, width), for a head that shares it."""
        return self.table.dense(self.dtype)

    def forward(self, ids: Tensor) -> Tensor:
        return self.table.lookup(ids, self.dtype)


def empty(cls: type[Any], weight: Tensor, bias: Tensor | None, rotate: int, **options: Any) -> Any:
    """One of `cls` that fits a dense weight, still without contents but for the bias."""
    with torch.device("meta"):
        made = cls(weight.shape[1], weight.shape[0], bias is not None, rotate=rotate, **options)
    made.bias = bias
    return made
