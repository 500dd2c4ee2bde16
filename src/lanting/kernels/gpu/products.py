"""Matrix products in 8 and 4 bits: cuBLASLt's where they fit, Triton's where they don't, torch in floats elsewhere.

    product(codes, weight, bias, dtype)    8-bit rows with an 8-bit weight, one scale for each row of either
    four_bit(x, weight, bias)              plain rows with a 4-bit weight, expanded on its way
    four_by_eight(codes, weight, ...)      8-bit rows with a 4-bit weight: integers inside a group

Sums of int8 are whole numbers, so the ways to form them agree in every bit and the fastest is found by timing. Sums of
e4m3 are not: one rule decides, so that a picture does not depend on a clock.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lanting.kernels.gpu import twins
from lanting.kernels.gpu.here import available, capability, recording, tuner
from lanting.kernels.gpu.rows import activate
from lanting.kernels.gpu.twins import FP8, Codes, Sums

# rows, columns and depth of a tile, warps, stages; the last fit GPUs with little shared memory
EIGHT = ((128, 256, 128, 8, 3), (128, 128, 128, 8, 3), (64, 128, 128, 4, 3), (64, 64, 128, 4, 3), (32, 64, 64, 4, 2))
FOUR = ((128, 128, 32, 8, 3), (64, 128, 32, 4, 3), (32, 64, 32, 4, 2))  # depth in bytes
WIDE = 512  # rows from which a 4-bit weight is expanded once and cuBLAS multiplies


@dataclass(frozen=True, slots=True)
class Weight:
    """(N, K) of int8 or e4m3 with a scale (N,) float32 for each row; or (N, K / 2) of 4 bits with (N, K / G)."""

    data: Tensor
    scale: Tensor

    @property
    def group(self) -> int:
        return 2 * self.data.shape[1] // self.scale.shape[1]


def product(
    codes: Codes,
    weight: Weight,
    bias: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
    out: Tensor | None = None,
) -> Tensor | Sums:
    """codes W^T + bias as (*shape, N), in `out` (rows, N) if that is given; or as `Sums`, where that is faster."""
    if codes.data.dtype == torch.int8:
        found = integers(codes, weight, bias, dtype, out)
    else:
        found = floats(codes, weight, bias, dtype, out)
    return found if isinstance(found, Sums) or out is not None else found.unflatten(0, codes.shape)


def sixteens(weight: Weight) -> bool:
    """What cuBLASLt wants of a weight of 8-bit floats."""
    return weight.data.shape[0] % 16 == 0 and weight.data.shape[1] % 16 == 0


def finish(v: Tensor, bias: Tensor | None, dtype: torch.dtype, out: Tensor | None) -> Tensor:
    v = v if bias is None else v + bias.float()
    return v.to(dtype) if out is None else out.copy_(v)


def integers(
    codes: Codes, weight: Weight, bias: Tensor | None, dtype: torch.dtype, out: Tensor | None
) -> Tensor | Sums:
    device, (rows, depth), columns = codes.data.device, codes.data.shape, weight.data.shape[0]
    fits = device.type == "cuda" and rows > 16 and depth % 8 == 0 and columns % 8 == 0 and capability(device) >= (8, 0)
    if not available(device):
        if not fits:
            return finish(twins.product(codes, weight.data, weight.scale), bias, dtype, out)
        return sums_of(codes, weight, bias)
    ways: list[Callable[[], Any]] = list(eight_bit_ways(codes, weight, bias, dtype, out))
    if fits:  # with what follows it, for a fair comparison; the caller may then have more in that same pass
        ways.insert(0, lambda: activate(sums_of(codes, weight, bias), dtype=dtype))
    key = ("int8", rows_about(rows), columns, depth, dtype, device)
    if fits and tuner().picks.get(key) == 0:
        return sums_of(codes, weight, bias)
    found = tuner()(key, ways, device)
    if out is not None and found.data_ptr() != out.data_ptr():
        out.copy_(found.flatten(0, -2))
        return out
    return found.flatten(0, -2)


def sums_of(codes: Codes, weight: Weight, bias: Tensor | None) -> Sums:
    return Sums(torch._int_mm(codes.data, weight.data.T), codes.scale, weight.scale, bias, codes.shape)


def rows_about(rows: int) -> int:
    """Counts of rows that share a choice: up to the next power of two."""
    return 1 << (rows - 1).bit_length()


def eight_bit_ways(
    codes: Codes, weight: Weight, bias: Tensor | None, dtype: torch.dtype, out: Tensor | None
) -> list[Callable[[], Tensor]]:
    made = torch.empty(len(codes.data), len(weight.data), dtype=dtype, device=codes.data.device) if out is None else out
    few = [tiles for tiles in EIGHT if tiles[0] <= max(32, rows_about(len(codes.data)))]
    return [partial(eight_bit, codes, weight, bias, made, tiles) for tiles in few]


def eight_bit(codes: Codes, weight: Weight, bias: Tensor | None, out: Tensor, tiles: tuple[int, ...]) -> Tensor:
    from lanting.kernels.gpu.jit import products as jit

    (rows, depth), columns = codes.data.shape, len(weight.data)
    down, across, deep, warps, stages = tiles
    kernel: Any = jit.eight_bit_kernel
    kernel[(-(-rows // down) * -(-columns // across),)](
        *(codes.data, weight.data, codes.scale, weight.scale, out if bias is None else bias, out),
        *(rows, columns, depth, out.stride(0)),
        BIAS=bias is not None,
        INTEGER=codes.data.dtype == torch.int8,
        BM=down,
        BN=across,
        BK=deep,
        num_warps=warps,
        num_stages=stages,
    )
    return out


def floats(codes: Codes, weight: Weight, bias: Tensor | None, dtype: torch.dtype, out: Tensor | None) -> Tensor:
    """Products of e4m3: torch's with all that follows, torch's bare, torch's bare with exact sums, Triton's; the first
    that takes the shapes.

    On an H200 cuBLASLt refused shapes of the full model though it took those that were tried first, so each shape is
    asked about once, outside of recordings.
    """
    device, key = codes.data.device, (*codes.data.shape, len(weight.data), dtype, codes.data.device)
    for number, way in enumerate(BY_TORCH if sixteens(weight) and floats_by_torch(device, dtype) else ()):
        if (number, *key) in refused():
            continue
        try:
            return way(codes, weight, bias, dtype, out)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError):  # the second is how newer versions say it of shapes
            if recording():
                raise
            refused().add((number, *key))
    if available(device):
        return by_triton(codes, weight, bias, dtype, out)
    return finish(twins.product(codes, weight.data, weight.scale), bias, dtype, out)


@cache
def refused() -> set[tuple[Any, ...]]:
    """(number of the way, rows, depth, columns, dtype, device) that torch's products did not take; (tiles, dtype,
    device) that do not fit Triton's."""
    return set()


def by_triton(codes: Codes, weight: Weight, bias: Tensor | None, dtype: torch.dtype, out: Tensor | None) -> Tensor:
    """The first tile that fits: what is out of a GPU's shared memory is so every time, so no clock decides."""
    *ways, last = eight_bit_ways(codes, weight, bias, dtype, out)
    for way in ways:
        key = (way.args[-1], codes.data.dtype, codes.data.device)
        if key in refused():
            continue
        try:
            return way()
        except Exception as error:
            if type(error).__name__ != "OutOfResources" or recording():
                raise
            refused().add(key)
    return last()


def scaled(codes: Codes, weight: Weight, dtype: torch.dtype, **more: Any) -> Tensor:
    """`torch._scaled_mm` as it wants things: rows (M, K) with scales (M, 1), a weight (K, N) whose columns are
    contiguous with scales (1, N), all scales in float32."""
    rows = codes.data if codes.data.is_contiguous() else codes.data.contiguous()
    scales = codes.scale.reshape(-1, 1).contiguous(), weight.scale.reshape(1, -1).contiguous()
    data = weight.data if weight.data.is_contiguous() else weight.data.contiguous()
    return torch._scaled_mm(rows, data.T, scale_a=scales[0], scale_b=scales[1], out_dtype=dtype, **more)


def by_torch(codes: Codes, weight: Weight, bias: Tensor | None, dtype: torch.dtype, out: Tensor | None) -> Tensor:
    """Products of e4m3 by cuBLASLt or CUTLASS, whichever torch takes, with bias and in place."""
    given: dict[str, Any] = {"bias": None if bias is None else bias.to(dtype), "use_fast_accum": True}
    whole = out is not None and out.is_contiguous() and out.data_ptr() % 16 == 0
    made = scaled(codes, weight, dtype, **given, **({"out": out} if whole else {}))
    return made if out is None or whole else out.copy_(made)


def alone(
    codes: Codes, weight: Weight, bias: Tensor | None, dtype: torch.dtype, out: Tensor | None, fast: bool = True
) -> Tensor:
    """The bare product, then bias and place in one pass."""
    made = scaled(codes, weight, dtype, use_fast_accum=fast)
    return made if bias is None and out is None else activate(made, bias=bias, out=made if out is None else out)


BY_TORCH = (by_torch, alone, partial(alone, fast=False))


@cache
def floats_by_torch(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch multiplies e4m3 with a scale for each row of both, and rightly: tried once."""
    if capability(device) < (8, 9):
        return False
    torch_rows = torch.linspace(-1, 1, 96 * 64, device=device).view(96, 64).sin()
    codes, other = twins.coded(torch_rows, FP8), twins.coded(torch_rows.flip(1)[:64] * 3, FP8)
    weight = Weight(other.data, other.scale.flatten())
    bias = torch.linspace(-2, 2, 64, device=device).to(dtype)
    try:
        found = by_torch(codes, weight, bias, dtype, torch.empty(96, 64, dtype=dtype, device=device)).float()
    except Exception:
        return False
    wanted = twins.product(codes, weight.data, weight.scale) + bias.float()
    return bool((found - wanted).norm() < 0.01 * wanted.norm())


def with_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """gelu(x (..., K) W^T + bias) in one kernel of cuBLASLt; ask `gelu_by_torch` first."""
    rows = x.reshape(-1, x.shape[-1])
    return torch._addmm_activation(bias, rows, weight.T, use_gelu=True).unflatten(0, x.shape[:-1])


@cache
def gelu_by_torch(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether products in 16 bits end with a tanh-GELU in the same kernel, and rightly: tried once."""
    if device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16):
        return False
    x = torch.linspace(-3, 3, 96 * 64, device=device).view(96, 64).mul(7).sin().to(dtype)
    weight, bias = x[:32].flip(1).contiguous(), x[0, :32].contiguous()
    try:
        found = with_gelu(x, weight, bias).float()
    except Exception:
        return False
    wanted = twins.activate(x.float() @ weight.float().T, bias, True)
    return bool((found - wanted).norm() < 0.005 * wanted.norm())


def four_bit(x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
    """x (..., K) W^T + bias, in x's dtype."""
    rows = x.flatten(0, -2).contiguous()
    if not available(x.device):
        return F.linear(x, twins.expand(weight.data, weight.scale, x.dtype), bias if bias is None else bias.to(x.dtype))
    if len(rows) >= WIDE:
        return F.linear(x, expanded(weight, x.dtype), None if bias is None else bias.to(x.dtype))
    from lanting.kernels.gpu.jit import products as jit

    (count, depth), columns = rows.shape, len(weight.data)
    out = torch.empty(count, columns, dtype=x.dtype, device=x.device)
    down, across, deep, warps, stages = four_bit_tiles(count, x.dtype)
    kernel: Any = jit.four_bit_kernel
    kernel[(-(-count // down) * -(-columns // across),)](
        *(rows, weight.data, weight.scale, out if bias is None else bias, out, count, columns, depth, columns),
        BIAS=bias is not None,
        GROUP=weight.group,
        BM=down,
        BN=across,
        BYTES=deep,
        num_warps=warps,
        num_stages=stages,
    )
    return out.unflatten(0, x.shape[:-1])


def four_bit_tiles(rows: int, dtype: torch.dtype) -> tuple[int, int, int, int, int]:
    """In float32 the largest shares 120 KB, and most GPUs that are no data centre's have 99."""
    fit = [tiles for tiles in FOUR if tiles[0] <= max(32, rows_about(rows))]
    return fit[1 if dtype == torch.float32 and len(fit) == len(FOUR) > 1 else 0]


def expanded(weight: Weight, dtype: torch.dtype) -> Tensor:
    """(N, K) in `dtype`, by one pass."""
    from lanting.kernels.gpu.jit import products as jit

    columns, packed = weight.data.shape
    out = torch.empty(columns, 2 * packed, dtype=dtype, device=weight.data.device)
    kernel: Any = jit.expand_kernel
    kernel[(columns, -(-packed // 1024))](
        weight.data, weight.scale, out, 2 * packed, GROUP=weight.group, BYTES=1024, num_warps=4
    )
    return out


def four_by_eight(codes: Codes, weight: Weight, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """int8 rows with a 4-bit weight, whose groups are 64 or 128."""
    (rows, depth), columns, device = codes.data.shape, len(weight.data), codes.data.device
    if not available(device):
        v = codes.data.float() @ twins.expand(weight.data, weight.scale, torch.float32).T * codes.scale
        return finish(v, bias, dtype, None).unflatten(0, codes.shape)
    from lanting.kernels.gpu.jit import products as jit

    out = torch.empty(rows, columns, dtype=dtype, device=device)
    down = 128 if rows > 64 else 32
    kernel: Any = jit.four_by_eight_kernel
    kernel[(-(-rows // down) * -(-columns // 128),)](
        *(codes.data, weight.data, codes.scale, weight.scale, out if bias is None else bias, out),
        *(rows, columns, depth, columns),
        BIAS=bias is not None,
        GROUP=weight.group,
        BM=down,
        BN=128,
        num_warps=8 if rows > 64 else 4,
        num_stages=3,
    )
    return out.unflatten(0, codes.shape)
