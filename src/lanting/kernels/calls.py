"""The kernels on tensors. Activations are float32 or bfloat16 on the CPU, their last axis contiguous.

    codes = quantize(x)                        rows rounded to int8, each with its scale; or dense
    product(codes, weight, out)                out = x W^T + bias, read from the packed weight as its file has it
    product(codes, weight, out, gate=gate)     out += gate * (x W^T + bias)

`packed` and `dense` say which weights that works for. Nothing here checks what a caller can know; shapes that don't fit
are a programming error and raise ValueError.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lanting.kernels import library as lib

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
KINDS = {"int8": 0, "int4": 1, "Q4_0": 2, "Q8_0": 3, "Q4_K": 4, "Q6_K": 5, "bf16": 6, "fp32": 7}
PLAIN = {torch.bfloat16: "bf16", torch.float32: "fp32"}
BLOCKS = {"Q4_0": (32, 18), "Q8_0": (32, 34), "Q4_K": (256, 144), "Q6_K": (256, 210)}  # values, bytes
STORE, GELU, ADD = 0, 1, 2
WIDEST = 512  # heads
LONGEST = 1 << 16  # rows: 255 * 127 times as many still fit 32 bits
NEVER = 2**62  # rows of the only item
NO_BOUND = torch.empty(0)


def call(name: str, *given: object) -> None:
    found = lib.library()
    if found is None:
        raise RuntimeError("the kernels are not built")
    if getattr(found, name)(*given):
        raise MemoryError(f"{name} found no memory, or no threads")


@dataclass(frozen=True, slots=True)
class Packed:
    """A packed weight (rows, columns) with what a product needs besides: the bound of each row."""

    data: Tensor
    scale: Tensor | None
    bound: Tensor
    kind: str
    columns: int
    group: int

    @property
    def dense(self) -> bool:
        """Whether it is a plain weight."""
        return self.kind in PLAIN.values()

    def struct(self) -> lib.Weight:
        scale = self.scale
        return lib.Weight(
            self.data.data_ptr(),
            None if scale is None else scale.data_ptr(),
            self.bound.data_ptr(),
            self.data.shape[0],
            self.columns,
            self.data.shape[1] * self.data.element_size(),
            self.group,
            KINDS[self.kind],
            0 if scale is None else TYPES[scale.dtype],
        )


def packed(kind: str, data: Tensor, scale: Tensor | None, columns: int, bound: Tensor | None = None) -> Packed | None:
    """A weight's bytes (rows, bytes of a row) and scales (rows, groups) as kernels read them; None where they can't.

    `bound` saves finding it again.
    """
    if not fits(kind, data, scale, columns):
        return None
    group = 0 if scale is None else columns // scale.shape[1]
    made = Packed(data, scale, torch.empty(data.shape[0]) if bound is None else bound, kind, columns, group)
    if bound is None:
        call("lt_bounds", made.struct(), made.bound.data_ptr())
    return made


def fits(kind: str, data: Tensor, scale: Tensor | None, columns: int) -> bool:
    """Whether kernels read this weight."""
    if kind not in KINDS or kind in PLAIN.values() or columns > LONGEST:
        return False
    if data.device.type != "cpu" or data.ndim != 2 or not data.is_contiguous():
        return False
    if kind in BLOCKS:
        values, size = BLOCKS[kind]
        return scale is None and columns % values == 0 and data.shape[1] == columns // values * size
    if scale is None or scale.dtype not in TYPES or not scale.is_contiguous():
        return False
    if scale.ndim != 2 or len(scale) != len(data) or not scale.numel():  # one for all, or for blocks of rows
        return False
    groups = scale.shape[1]
    if columns % groups or data.shape[1] != (columns if kind == "int8" else columns // 2):
        return False
    group = columns // groups
    return group in (16, 32, 64, 128) if kind == "int4" else groups == 1 or group % 16 == 0


def dense(weight: Tensor, dtype: torch.dtype = torch.bfloat16) -> Packed | None:
    """A plain weight (rows, columns), for dense rows of what is in `dtype`; None where that is torch's work.

    Where the processor multiplies bfloat16, both are that. Elsewhere products are in float32, and either may be.
    """
    size = lib.dense_bytes()
    known = (torch.bfloat16,) if size == 2 else PLAIN
    if not size or weight.dtype not in known or dtype not in known or weight.device.type != "cpu":
        return None
    if weight.ndim != 2 or not weight.is_contiguous():
        return None
    return Packed(weight, None, NO_BOUND, PLAIN[weight.dtype], weight.shape[1], 0)


def expanded(weight: Packed) -> Tensor:
    """The int8 (rows, columns) that products see; times bound / 127 it is the weight."""
    out = torch.empty(weight.data.shape[0], weight.columns, dtype=torch.int8)
    call("lt_expand", weight.struct(), out.data_ptr())
    return out


def matrix(x: Tensor) -> lib.Matrix:
    """(..., rows, columns), where the rows of an item are evenly spaced and so are items."""
    if x.dtype not in (torch.float32, torch.bfloat16) or x.stride(-1) != 1 or x.device.type != "cpu":
        raise ValueError(f"kernels take rows of float32 or bfloat16 on the CPU, not {x.dtype} on {x.device}")
    if x.ndim == 2:
        return lib.Matrix(x.data_ptr(), x.shape[0], x.shape[1], x.stride(0), NEVER, 0, TYPES[x.dtype])
    if x.ndim != 3:
        raise ValueError(f"kernels take (rows, columns) or (items, rows, columns), not {tuple(x.shape)}")
    items, rows, columns = x.shape
    return lib.Matrix(x.data_ptr(), items * rows, columns, x.stride(1), rows, x.stride(0), TYPES[x.dtype])


def per_row(vectors: Tensor, x: Tensor, split: int) -> lib.PerRow:
    """Vectors (items or 1, 1 or 2, columns) float32 for the rows of x: with 2 the second holds from row `split` on."""
    if vectors.dtype != torch.float32 or vectors.stride(-1) != 1:
        raise ValueError("vectors for rows are float32")
    items, each, columns = vectors.shape
    count = x.shape[0] if x.ndim == 3 else 1
    if items not in (1, count) or each not in (1, 2) or columns != x.shape[-1]:
        raise ValueError(f"vectors {tuple(vectors.shape)} are not for rows {tuple(x.shape)}")
    if each == 2 and vectors.stride(0) != 2 * vectors.stride(1):
        raise ValueError("the two vectors of an item lie one after the other")
    if items == 1 and count > 1 and each > 1:
        raise ValueError("two vectors for several items: give every item its own")
    period = x.shape[-2] if items > 1 or each > 1 else NEVER
    stride = vectors.stride(1) if each > 1 else vectors.stride(0)
    return lib.PerRow(vectors.data_ptr(), stride, period, split, each)


@dataclass(frozen=True, slots=True)
class Rounded:
    """Rows laid out for this processor's micro-kernel: int8 with a scale each, or dense, in what those are here."""

    data: Tensor
    scale: Tensor
    sum: Tensor
    rows: int
    columns: int
    dense: bool

    def struct(self) -> lib.Codes:
        at = (self.data.data_ptr(), self.scale.data_ptr(), self.sum.data_ptr())
        return lib.Codes(*at, self.rows, self.columns, int(self.dense))


def room(rows: int, columns: int, dense: bool = False) -> Rounded:
    """Room for rounded rows, of int8 or dense."""
    found = lib.library()
    size = 0 if found is None else found.lt_codes_bytes(rows, columns, int(dense))
    sums = torch.empty(rows, dtype=torch.int32)
    return Rounded(torch.empty(size, dtype=torch.uint8), torch.empty(rows), sums, rows, columns, dense)


def quantize(x: Tensor, dense: bool = False) -> Rounded:
    """Round rows to int8, the largest of each becoming 127, or lay them out dense."""
    from_ = matrix(x)
    made = room(from_.rows, from_.columns, dense)
    call("lt_quantize", from_, made.struct())
    return made


def norm(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    split: int = 0,
    *,
    rounded: bool,
    dense: bool = False,
) -> Rounded | Tensor:
    """Layer norm of x (items, rows, columns), times 1 + scale, plus shift (see `per_row`), in float32 inside.

    `rounded`: laid out for products, as int8 or dense (see `quantize`).
    """
    from_ = matrix(x)
    made = room(from_.rows, from_.columns, dense) if rounded else torch.empty(x.shape, dtype=x.dtype)
    rows, codes = (None, made.struct()) if isinstance(made, Rounded) else (matrix(made), None)
    call("lt_norm", from_, per_row(shift, x, split), per_row(scale, x, split), rows, codes)
    return made


def result(out: Tensor, bias: Tensor | None, gate: Tensor | None, split: int, gelu: bool) -> lib.Result:
    """Where rows go and what becomes of them; `bias` (columns) and `gate` (see `per_row`) are float32."""
    gates = lib.PerRow() if gate is None else per_row(gate, out, split)
    mode = ADD if gate is not None else GELU if gelu else STORE
    return lib.Result(matrix(out), None if bias is None else bias.data_ptr(), gates, mode)


def product(
    x: Rounded,
    weight: Packed,
    out: Tensor,
    bias: Tensor | None = None,
    *,
    gate: Tensor | None = None,
    split: int = 0,
    gelu: bool = False,
) -> Tensor:
    """out = x W^T + bias, through a GELU, or added to what is there times a gate; out (..., rows, W's rows)."""
    shape = (x.rows, weight.data.shape[0])
    if x.dense != weight.dense:
        raise ValueError(f"rows of {x.data.dtype} do not meet a weight of {weight.kind}")
    if x.columns != weight.columns or (out.shape[:-1].numel(), out.shape[-1]) != shape:
        raise ValueError(
            f"{x.columns} columns meet {weight.columns}, and a result of {shape} goes to {tuple(out.shape)}"
        )
    call("lt_product", x.struct(), weight.struct(), result(out, bias, gate, split, gelu))
    return out


def activate(x: Tensor, out: Tensor, *, gate: Tensor | None = None, split: int = 0, gelu: bool = False) -> Tensor:
    """What a product ends with, for rows (items, rows, columns) that torch made."""
    if x.shape != out.shape:
        raise ValueError(f"rows {tuple(x.shape)} do not go to {tuple(out.shape)}")
    call("lt_activate", matrix(x), result(out, None, gate, split, gelu))
    return out


def turn(q: Tensor, k: Tensor, norms: tuple[Tensor, ...], rope: tuple[Tensor, Tensor], first: int, eps: float) -> None:
    """Norm and turn queries and keys (B, S, H, E) where they are; the first tokens have norms of their own.

    `norms` are the weights (E,) float32 for: first queries, first keys, other queries, other keys; `rope` (S, E / 2).
    """
    items, tokens, heads, width = q.shape
    if width % 2 or width > WIDEST or q.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"heads of {width} {q.dtype} are not for these kernels")
    if not all(x.is_contiguous() for x in (q, k, *rope, *norms)) or q.shape != k.shape or q.dtype != k.dtype:
        raise ValueError("queries and keys to be turned are contiguous and alike")
    at = [x.data_ptr() for x in (q, k, *rope, *norms)]
    call("lt_turn", lib.Turn(*at, items, tokens, heads, width, first, eps, TYPES[q.dtype]))


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention of q (B, S, H, E) over all keys and values (B, K, H, E); mask (B, T) bool over the first T keys ->
    (B, S, H, E)."""
    (items, tokens, heads, width), keys = q.shape, k.shape[1]
    if width % 32 or width > WIDEST or q.dtype != k.dtype or q.dtype != v.dtype:
        raise ValueError(f"heads of {width} {q.dtype} are not for these kernels")
    if k.shape != (items, keys, heads, width) or v.shape != k.shape:
        raise ValueError(f"keys {tuple(k.shape)} and values {tuple(v.shape)} are not for queries {tuple(q.shape)}")
    if mask is not None and (mask.shape[0] != items or mask.shape[1] > keys):
        raise ValueError(f"a mask {tuple(mask.shape)} is not for {items} times {keys} keys")
    q, k, v = (x.contiguous() for x in (q, k, v))
    out = torch.empty_like(q)
    seen = None if mask is None else mask.to(torch.uint8).contiguous()
    at = [x.data_ptr() for x in (q, k, v, out)]
    masked = 0 if seen is None else seen.shape[1]
    given = (*at, None if seen is None else seen.data_ptr(), items, tokens, keys)
    given = (*given, heads, width, masked, TYPES[q.dtype])
    call("lt_attend", lib.Attention(*given))
    return out


def block_bytes(block: lib.Block) -> int:
    """The room a whole block needs beside its streams."""
    found = lib.library()
    return 0 if found is None else found.lt_block_bytes(block)


def norm_silu(x: Tensor, gamma: Tensor, *, silu: bool = True) -> Tensor:
    """The autoencoder's norm of x (B, C, H, W), channels last, times gamma (C,) float32, then SiLU; same layout."""
    rows = x.permute(0, 2, 3, 1)
    if not rows.is_contiguous():
        raise ValueError("kernels take pictures with channels last")
    out = torch.empty_like(rows)
    call("lt_norm_silu", matrix(rows.flatten(0, 2)), gamma.data_ptr(), matrix(out.flatten(0, 2)), int(silu))
    return out.permute(0, 3, 1, 2)
