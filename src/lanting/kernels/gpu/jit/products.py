"""Matrix products out = x W^T + bias with a W of 8 or 4 bits. One program a tile of the result."""

import triton
import triton.language as tl


@triton.jit
def tile_of(M, N, BM: tl.constexpr, BN: tl.constexpr):
    """(row, column) of this program's tile: eight rows of tiles at a time, so that what they read stays near."""
    program = tl.program_id(0)
    down = tl.cdiv(M, BM)
    across = tl.cdiv(N, BN)
    group = program // (8 * across)
    height = tl.minimum(down - group * 8, 8)
    inside = program % (8 * across)
    return group * 8 + inside % height, inside // height


@triton.jit
def store_tile(acc, bias, out, m, n, M, N, out_row, BIAS: tl.constexpr):
    known = (m < M)[:, None] & (n < N)[None, :]
    if BIAS:
        acc += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    tl.store(out + m.to(tl.int64)[:, None] * out_row + n[None, :], acc.to(out.dtype.element_ty), mask=known)


@triton.jit
def eight_bit_kernel(
    x,
    weight,
    x_scale,
    w_scale,
    bias,
    out,
    M,
    N,
    K,
    out_row,
    BIAS: tl.constexpr,
    INTEGER: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """Codes (M, K) with a scale a row, weight (N, K) with a scale a row: int8 summed in int32, e4m3 in float32."""
    across, along = tile_of(M, N, BM, BN)
    m = across * BM + tl.arange(0, BM)
    n = along * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    x_at = x + m.to(tl.int64)[:, None] * K + k[None, :]
    w_at = weight + n.to(tl.int64)[None, :] * K + k[:, None]
    if INTEGER:
        acc = tl.zeros((BM, BN), dtype=tl.int32)
    else:
        acc = tl.zeros((BM, BN), dtype=tl.float32)
    for start in range(0, K, BK):
        left = K - start
        a = tl.load(x_at, mask=(m < M)[:, None] & (k < left)[None, :], other=0.0)
        b = tl.load(w_at, mask=(n < N)[None, :] & (k < left)[:, None], other=0.0)
        if INTEGER:
            acc = tl.dot(a, b, acc, out_dtype=tl.int32)
        else:
            acc = tl.dot(a, b, acc)
        x_at += BK
        w_at += BK
    rows = tl.load(x_scale + m, mask=m < M, other=0.0)
    columns = tl.load(w_scale + n, mask=n < N, other=0.0)
    store_tile(acc.to(tl.float32) * rows[:, None] * columns[None, :], bias, out, m, n, M, N, out_row, BIAS)


@triton.jit
def four_bit_kernel(
    x,
    weight,
    w_scale,
    bias,
    out,
    M,
    N,
    K,
    out_row,
    BIAS: tl.constexpr,
    GROUP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BYTES: tl.constexpr,
):
    """x (M, K) in 16 or 32 bits; the weight's bytes become values in x's dtype on their way to the product.

    Byte c of a row holds value c % (G / 2) of the first half of group c // (G / 2) in its low bits, and of the second
    half in its high bits: two products, of the columns of x that belong to either.
    """
    HALF: tl.constexpr = GROUP // 2
    across, along = tile_of(M, N, BM, BN)
    m = across * BM + tl.arange(0, BM)
    n = along * BN + tl.arange(0, BN)
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    x_at = x + m.to(tl.int64)[:, None] * K
    w_at = weight + n.to(tl.int64)[None, :] * (K // 2)
    s_at = w_scale + n.to(tl.int64)[None, :] * (K // GROUP)
    for start in range(0, K // 2, BYTES):
        c = start + tl.arange(0, BYTES)
        group = c // HALF
        low = group * GROUP + c % HALF  # columns of x
        known = c < K // 2
        packed = tl.load(w_at + c[:, None], mask=known[:, None] & (n < N)[None, :], other=0).to(tl.int32)
        scale = tl.load(s_at + group[:, None], mask=known[:, None] & (n < N)[None, :], other=0.0).to(tl.float32)
        seen = (m < M)[:, None] & known[None, :]
        a = tl.load(x_at + low[None, :], mask=seen, other=0.0)
        b = (((packed & 15) - 8).to(tl.float32) * scale).to(a.dtype)
        acc = tl.dot(a, b, acc, input_precision="ieee")
        a = tl.load(x_at + (low + HALF)[None, :], mask=seen, other=0.0)
        b = (((packed >> 4) - 8).to(tl.float32) * scale).to(a.dtype)
        acc = tl.dot(a, b, acc, input_precision="ieee")
    store_tile(acc, bias, out, m, n, M, N, out_row, BIAS)


@triton.jit
def four_by_eight_kernel(
    x,
    weight,
    x_scale,
    w_scale,
    bias,
    out,
    M,
    N,
    K,
    out_row,
    BIAS: tl.constexpr,
    GROUP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """int8 codes (M, K) with a scale a row: a group's products are whole numbers, its scale joins their sum."""
    HALF: tl.constexpr = GROUP // 2
    across, along = tile_of(M, N, BM, BN)
    m = across * BM + tl.arange(0, BM)
    n = along * BN + tl.arange(0, BN)
    c = tl.arange(0, HALF)
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    x_at = x + m.to(tl.int64)[:, None] * K + c[None, :]
    w_at = weight + n.to(tl.int64)[None, :] * (K // 2) + c[:, None]
    s_at = w_scale + n.to(tl.int64) * (K // GROUP)
    for group in range(0, K // GROUP):
        packed = tl.load(w_at, mask=(n < N)[None, :], other=0)
        low = ((packed & 15).to(tl.int8) - 8).to(tl.int8)
        high = ((packed >> 4).to(tl.int8) - 8).to(tl.int8)
        a = tl.load(x_at, mask=(m < M)[:, None], other=0)
        sums = tl.dot(a, low, out_dtype=tl.int32)
        a = tl.load(x_at + HALF, mask=(m < M)[:, None], other=0)
        sums = tl.dot(a, high, sums, out_dtype=tl.int32)
        scale = tl.load(s_at + group, mask=n < N, other=0.0).to(tl.float32)
        acc += sums.to(tl.float32) * scale[None, :]
        x_at += GROUP
        w_at += HALF
    rows = tl.load(x_scale + m, mask=m < M, other=0.0)
    store_tile(acc * rows[:, None], bias, out, m, n, M, N, out_row, BIAS)


@triton.jit
def expand_kernel(weight, w_scale, out, K, GROUP: tl.constexpr, BYTES: tl.constexpr):
    """A run of one row of a 4-bit weight to plain values (N, K)."""
    HALF: tl.constexpr = GROUP // 2
    row = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BYTES + tl.arange(0, BYTES)
    known = c < K // 2
    group = c // HALF
    packed = tl.load(weight + row * (K // 2) + c, mask=known, other=0).to(tl.int32)
    scale = tl.load(w_scale + row * (K // GROUP) + group, mask=known, other=0.0).to(tl.float32)
    at = out + row * K + group * GROUP + c % HALF
    tl.store(at, (((packed & 15) - 8).to(tl.float32) * scale).to(out.dtype.element_ty), mask=known)
    tl.store(at + HALF, (((packed >> 4) - 8).to(tl.float32) * scale).to(out.dtype.element_ty), mask=known)
