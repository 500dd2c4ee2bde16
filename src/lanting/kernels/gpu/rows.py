"""Norms, modulation, rounding, GELU, gates and turns: one pass over memory each.

    norm(x, shift, scale, split, form)   layer norm, times 1 + scale, plus shift; as x, or as int8 or e4m3 `Codes`,
                                         rotated first where the form says so (`twins.Form`)
    quantize(x, form)                    rows to 8 bits
    activate(x, ...)                     what a product ends with: bias, GELU, x' + gate * x, 8 bits
    swiglu(gate, up, form)               silu(gate) * up
    turn(q, k, ...)                      queries and keys normed and turned in place

Vectors are (B or 1, 1 or 2, W): with two rows of them the second holds from token `split` on.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd
from typing import Any

import torch
from torch import Tensor

from lanting.kernels.gpu import twins
from lanting.kernels.gpu.here import available
from lanting.kernels.gpu.twins import FP8, Codes, Form, Sums, parted

FORMS: dict[torch.dtype | None, int] = {None: 0, torch.int8: 1, FP8: 2}
WIDEST = 1 << 15  # a row is held by one program


@dataclass(frozen=True, slots=True)
class Gated:
    """`base` + gate * what is activated."""

    base: Tensor  # (B, n, W)
    gate: Tensor  # (B or 1, 1 or 2, W)
    split: int = 0


def threads(block: int) -> int:
    """Warps for a row."""
    return 4 if block <= 2048 else 8 if block <= 8192 else 16


def block_of(width: int) -> int:
    return max(16, 1 << (width - 1).bit_length())


def known(x: Tensor) -> bool:
    return x.shape[-1] <= WIDEST and x.numel() > 0 and available(x.device)


def three(x: Tensor) -> Tensor:
    """(rows, W) as one item (1, rows, W), with neighbours in a row."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    return x[None] if x.ndim == 2 else x


def strides(vectors: Tensor) -> tuple[int, int]:
    """From item to item, and from the target's vector to the references'."""
    return (vectors.stride(0) if len(vectors) > 1 else 0, vectors.stride(1) if vectors.shape[1] > 1 else 0)


def alike(*vectors: Tensor) -> tuple[Tensor, ...]:
    """The same numbers, all laid out in one way."""
    if len({(v.shape, strides(v), v.stride(-1)) for v in vectors}) > 1 or vectors[0].stride(-1) != 1:
        most = max(vectors, key=lambda v: v.numel()).shape
        return tuple(v.expand(most).contiguous() for v in vectors)
    return vectors


def room(x: Tensor, form: torch.dtype | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Where rows like x's go, and their scales."""
    data = torch.empty(x.shape, dtype=form or dtype, device=x.device)
    scale = torch.empty(x.shape[:-1].numel() if form else 0, 1, dtype=torch.float32, device=x.device)
    return data, scale


def norm(
    x: Tensor,
    shift: Tensor | None,
    scale: Tensor,
    split: int = 0,
    form: Form = None,
    eps: float = 1e-6,
) -> Tensor | Codes:
    """Layer norm of x (B, n, W), times 1 + scale, plus shift if there is one."""
    if not known(x):
        return twins.norm(x, shift, scale, split, form, eps)
    return launch_norm(x, None, (shift, scale), split, form, eps)[1]


def join_norm(
    y: Tensor, gated: Gated, shift: Tensor | None, scale: Tensor, form: Form = None, eps: float = 1e-6
) -> tuple[Tensor, Tensor | Codes]:
    """(x, norm of x) for x = base + gate * y: the end of one half of a block and the beginning of the next."""
    x = gated.base
    if not known(x):
        x = twins.joined(x, y, gated.gate, gated.split)
        return x, twins.norm(x, shift, scale, gated.split, form, eps)
    return launch_norm(x, (y, gated.gate), (shift, scale), gated.split, form, eps)


def launch_norm(
    x: Tensor,
    add: tuple[Tensor, Tensor] | None,
    vectors: tuple[Tensor | None, Tensor],
    split: int,
    form: Form,
    eps: float,
) -> tuple[Tensor, Tensor | Codes]:
    from lanting.kernels.gpu.jit import rows as jit

    x = three(x)
    (items, n, width), block = x.shape, block_of(x.shape[-1])
    shift, scale = vectors[0] if vectors[0] is not None else vectors[1], vectors[1]
    y, gate = (x, scale) if add is None else (three(add[0]), add[1])
    gate, shift, scale = alike(gate, shift, scale)
    moved = x if add is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    kind, turn = parted(form)
    data, scales = room(x, kind, x.dtype)
    spaces = (x.stride(0), x.stride(1), y.stride(0), y.stride(1), *strides(shift))
    kernel: Any = jit.norm_kernel
    kernel[(items * n,)](
        *(x, y, gate, shift, scale, moved, data, scales),
        *(n, width, split, *spaces, eps),
        ADD=add is not None,
        SHIFT=vectors[0] is not None,
        CLIP=x.dtype == torch.float16,
        FORM=FORMS[kind],
        ROTATE=turn,
        BLOCK=block,
        num_warps=threads(block),
    )
    return moved, data if kind is None else Codes(data.flatten(0, 1), scales, (items, n))


def quantize(x: Tensor, form: Form) -> Codes:
    """Round rows (..., W) to int8 or e4m3, the largest of each becoming 127 or 448."""
    made = activate(x if x.ndim <= 3 else x.flatten(0, -2), form=form)
    assert isinstance(made, Codes)
    return made


def activate(
    x: Tensor | Sums,
    *,
    bias: Tensor | None = None,
    gelu: bool = False,
    gated: Gated | None = None,
    form: Form = None,
    out: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Any:
    """bias, then GELU, then base + gate * that, then the form: `Codes` in 8 bits, else a tensor.

    x      (B, n, W) or (rows, W), or sums of integers, which bring their own bias
    out    where it goes, strided as may be; may be x or the base
    dtype  of the result; None: that of `out`, the base, or x
    """
    data = x.data.unflatten(0, x.shape) if isinstance(x, Sums) else x
    like = out if out is not None else gated.base if gated is not None else data
    dtype = dtype or (torch.float32 if like.dtype == torch.int32 else like.dtype)
    if known(data):
        return launch_activate(x, data, bias, gelu, gated, (*parted(form), dtype), out)
    v = twins.activate(x.values() if isinstance(x, Sums) else data.float(), bias, gelu)
    if gated is not None:
        v = gated.base.float() + twins.per_token(gated.gate, v.shape[1], gated.split) * v
        v = twins.clipped(v, dtype)
    made = twins.kept(v, form, dtype if out is None else torch.float32)
    return made if out is None or isinstance(made, Codes) else out.copy_(made)


def launch_activate(
    x: Tensor | Sums,
    data: Tensor,
    bias: Tensor | None,
    gelu: bool,
    gated: Gated | None,
    kept: tuple[torch.dtype | None, int, torch.dtype],
    out: Tensor | None,
) -> Any:
    from lanting.kernels.gpu.jit import rows as jit

    source, block, (form, turn, dtype) = three(data), block_of(data.shape[-1]), kept
    items, n, width = source.shape
    row, column, bias = (x.row, x.column, x.bias) if isinstance(x, Sums) else (source, source, bias)
    base, gate = (source, source) if gated is None else (three(gated.base), *alike(gated.gate))
    made, scales = room(source, form, dtype) if out is None else (out[None] if out.ndim == 2 else out, source)
    gates = (0, 0) if gated is None else strides(gate)
    spaces = (source.stride(0), source.stride(1), base.stride(0), base.stride(1), *gates, made.stride(0))
    kernel: Any = jit.activate_kernel
    kernel[(items * n,)](
        *(source, row, column, source if bias is None else bias, gate, base, made, scales),
        *(n, width, 0 if gated is None else gated.split, *spaces, made.stride(1)),
        SCALED=isinstance(x, Sums),
        BIAS=bias is not None,
        GELU=gelu,
        GATE=gated is not None,
        CLIP=dtype == torch.float16,
        FORM=FORMS[form],
        ROTATE=turn,
        BLOCK=block,
        num_warps=threads(block),
    )
    if form is not None:
        return Codes(made.flatten(0, 1), scales, tuple(data.shape[:-1]))
    return made.view(data.shape) if out is None else out


def swiglu(
    gate: Tensor | Sums,
    up: Tensor | Sums,
    form: Form = None,
    out: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Any:
    """silu(gate) * up of two (B, n, W), then the form: `Codes` in 8 bits, else a tensor.

    out    contiguous (B, n, W), where plain results go; may be one of the two
    dtype  of the result; None: that of `out` or the gate, float32 for sums
    """
    scaled = isinstance(gate, Sums) and isinstance(up, Sums) and gate.bias is None and up.bias is None
    if not scaled:  # a kernel knows two of a kind
        gate, up = (activate(x, dtype=dtype) if isinstance(x, Sums) else x for x in (gate, up))
    shape = gate.shape if isinstance(gate, Sums) else gate.shape[:-1]
    flat = [x.data if isinstance(x, Sums) else x.flatten(0, -2) for x in (gate, up)]
    like = flat[0] if out is None else out
    dtype = dtype or (torch.float32 if like.dtype == torch.int32 else like.dtype)
    if not known(flat[0]):
        v = twins.swiglu(*(x.values() if isinstance(x, Sums) else x.float() for x in (gate, up)))
        made = twins.kept(v, form, dtype if out is None else torch.float32)
        return made if out is None or isinstance(made, Codes) else out.copy_(made)
    return launch_swiglu(gate, up, flat, (*parted(form), dtype), out, shape)


def launch_swiglu(
    gate: Tensor | Sums,
    up: Tensor | Sums,
    flat: list[Tensor],
    kept: tuple[torch.dtype | None, int, torch.dtype],
    out: Tensor | None,
    shape: tuple[int, ...],
) -> Any:
    from lanting.kernels.gpu.jit import rows as jit

    (g, u), (form, turn, dtype) = (x if x.stride(-1) == 1 else x.contiguous() for x in flat), kept
    scales = [of for x in (gate, up) for of in ((x.row, x.column) if isinstance(x, Sums) else (g, g))]
    (count, width), block = g.shape, block_of(g.shape[-1])
    made, peaks = room(g, form, dtype) if out is None or form is not None else (out.flatten(0, -2), g)
    kernel: Any = jit.swiglu_kernel
    kernel[(count,)](
        *(g, u, *scales, made, peaks, width, g.stride(0), u.stride(0)),
        SCALED=isinstance(gate, Sums),
        FORM=FORMS[form],
        ROTATE=turn,
        BLOCK=block,
        num_warps=threads(block),
    )
    if form is not None:
        return Codes(made, peaks, tuple(shape))
    return made.unflatten(0, shape) if out is None else out


def turn(q: Tensor, k: Tensor, norms: tuple[Tensor, ...], rope: tuple[Tensor, Tensor], first: int, eps: float) -> None:
    """Norm and turn queries and keys (B, S, H, E) where they are; the first tokens have norms of their own.

    `norms` are the weights (E,) for: first queries, first keys, other queries, other keys; `rope` (S, E / 2) float32.
    """
    items, tokens, heads, width = q.shape
    same = {x.dtype for x in (q, k, *norms)} == {q.dtype} and q.is_contiguous() and k.is_contiguous()
    if not (same and width % 2 == 0 and width <= 1024 and known(q)):
        for x, own, other in ((q, norms[0], norms[2]), (k, norms[1], norms[3])):
            twins.turn(x, own, other, rope, first, eps)
        return
    from lanting.kernels.gpu.jit import rows as jit

    half = block_of(width // 2)
    each = gcd(heads, max(1, 1024 // half))  # a power of two, and no program has too few
    cos, sin = (table.contiguous() for table in rope)
    kernel: Any = jit.turn_kernel
    kernel[(items * tokens, -(-heads // each))](
        *(q, k, *norms, cos, sin, tokens, heads, width // 2, first, eps),
        HEADS=each,
        HALF=half,
        num_warps=4,
    )
