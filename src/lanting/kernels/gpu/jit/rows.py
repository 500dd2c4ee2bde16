"""One program a row: everything that happens to a row between two products, in float32.

`FORM` says how a result is kept: 0 in the dtype of `out`, 1 as int8, 2 as e4m3, both with a scale for the row; `ROTATE`
in runs of how many numbers it is rotated first (`nn.rotate`), 0 for not at all. Rows are
numbered through items: row r is token r % n of item r // n. A row with a NaN or an infinity gets NaN for its scale, so
that rounding hides nothing.
"""
# pyright: reportOperatorIssue=false, reportAssignmentType=false, reportArgumentType=false

import triton
import triton.language as tl


@triton.jit
def gelu(v):
    """The tanh approximation: (1 + tanh u) / 2 is the logistic function of 2 u."""
    return v * tl.sigmoid(1.5957691216057308 * (v + 0.044715 * v * v * v))


@triton.jit
def clipped(v, CLIP: tl.constexpr):
    """Both streams end at the largest float16 in half precision; comparisons, because they let a NaN pass."""
    if CLIP:
        v = tl.where(v > 65504.0, 65504.0, v)
        v = tl.where(v < -65504.0, -65504.0, v)
    return v


@triton.jit
def paired(v, AT: tl.constexpr, BLOCK: tl.constexpr):
    """For every number its sum with the one whose place differs in the bit AT."""
    sums = tl.sum(tl.reshape(v, (BLOCK // (2 * AT), 2, AT)), axis=1)
    return tl.reshape(tl.broadcast_to(sums[:, None, :], (BLOCK // (2 * AT), 2, AT)), (BLOCK,))


@triton.jit
def rotated(v, AT: tl.constexpr, BLOCK: tl.constexpr):
    """One digit of the regular Hadamard matrix, whose rows are all ones but for a minus on the antidiagonal: for places
    that differ in the bits AT and 2 AT, half of a + b + c - d, d being the one that differs in both."""
    sums = paired(v, AT, BLOCK)
    rest = 2.0 * v - sums
    return 0.5 * (sums + paired(rest, 2 * AT, BLOCK) - rest)


@triton.jit
def store_row(v, out, out_scale, row, column, mask, FORM: tl.constexpr, ROTATE: tl.constexpr, BLOCK: tl.constexpr):
    """Keep a row, runs of ROTATE numbers rotated; `out` points to its beginning, `v` is 0 beyond its end."""
    if ROTATE >= 4:
        v = rotated(v, 1, BLOCK)
    if ROTATE >= 16:
        v = rotated(v, 4, BLOCK)
    if ROTATE >= 64:
        v = rotated(v, 16, BLOCK)
    if ROTATE >= 256:
        v = rotated(v, 64, BLOCK)
    if FORM == 0:
        tl.store(out + column, v.to(out.dtype.element_ty), mask=mask)
    else:
        MOST: tl.constexpr = 127.0 if FORM == 1 else 448.0
        peak = tl.max(tl.abs(v), axis=0)
        bad = tl.sum(v * 0.0, axis=0)  # 0, or NaN
        factor = tl.where(peak > 1e-30, MOST / peak, 0.0)
        code = v * factor
        code = tl.where(code > MOST, MOST, code)
        code = tl.where(code < -MOST, -MOST, code)
        if FORM == 1:
            code = (code + 12582912.0) - 12582912.0  # 1.5 * 2^23: what is left of a sum with it is whole
        tl.store(out + column, code.to(out.dtype.element_ty), mask=mask)
        tl.store(out_scale + row, tl.where(peak > 1e-30, peak / MOST, 1.0) + bad)


@triton.jit
def norm_kernel(
    x,
    y,
    gate,
    shift,
    scale,
    moved,
    out,
    out_scale,
    n,
    width,
    split,
    x_item,
    x_row,
    y_item,
    y_row,
    vector_item,
    vector_each,
    eps,
    ADD: tl.constexpr,
    SHIFT: tl.constexpr,
    CLIP: tl.constexpr,
    FORM: tl.constexpr,
    ROTATE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out = norm(x) * (1 + scale) + shift, where there is one; with ADD x is first x + gate * y, rounded, and kept in
    `moved`."""
    row = tl.program_id(0)
    item = (row // n).to(tl.int64)
    token = row % n
    column = tl.arange(0, BLOCK)
    mask = column < width
    vectors = item * vector_item + tl.where(token >= split, vector_each, 0)
    here = row.to(tl.int64) * width
    v = tl.load(x + item * x_item + token.to(tl.int64) * x_row + column, mask=mask, other=0.0).to(tl.float32)
    if ADD:
        add = tl.load(y + item * y_item + token.to(tl.int64) * y_row + column, mask=mask, other=0.0).to(tl.float32)
        v += tl.load(gate + vectors + column, mask=mask, other=0.0).to(tl.float32) * add
        kept = clipped(v, CLIP).to(moved.dtype.element_ty)
        tl.store(moved + here + column, kept, mask=mask)
        v = kept.to(tl.float32)
    mean = tl.sum(v, axis=0) / width
    v = tl.where(mask, v - mean, 0.0)
    v = v * tl.rsqrt(tl.sum(v * v, axis=0) / width + eps)
    v = v * (1.0 + tl.load(scale + vectors + column, mask=mask, other=0.0).to(tl.float32))
    if SHIFT:
        v += tl.load(shift + vectors + column, mask=mask, other=0.0).to(tl.float32)
    store_row(v, out + here, out_scale, row, column, mask, FORM, ROTATE, BLOCK)


@triton.jit
def activate_kernel(
    x,
    row_scale,
    column_scale,
    bias,
    gate,
    base,
    out,
    out_scale,
    n,
    width,
    split,
    x_item,
    x_row,
    base_item,
    base_row,
    gate_item,
    gate_each,
    out_item,
    out_row,
    SCALED: tl.constexpr,
    BIAS: tl.constexpr,
    GELU: tl.constexpr,
    GATE: tl.constexpr,
    CLIP: tl.constexpr,
    FORM: tl.constexpr,
    ROTATE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """What a product ends with: scales of integer sums, bias, GELU, `base` + gate times it."""
    row = tl.program_id(0)
    item = (row // n).to(tl.int64)
    token = (row % n).to(tl.int64)
    column = tl.arange(0, BLOCK)
    mask = column < width
    v = tl.load(x + item * x_item + token * x_row + column, mask=mask, other=0).to(tl.float32)
    if SCALED:
        v = v * tl.load(row_scale + row) * tl.load(column_scale + column, mask=mask, other=0.0)
    if BIAS:
        v += tl.load(bias + column, mask=mask, other=0.0).to(tl.float32)
    if GELU:
        v = gelu(v)
    if GATE:
        vectors = item * gate_item + tl.where(token >= split, gate_each, 0)
        v = v * tl.load(gate + vectors + column, mask=mask, other=0.0).to(tl.float32)
        v += tl.load(base + item * base_item + token * base_row + column, mask=mask, other=0.0).to(tl.float32)
        v = clipped(v, CLIP)
    v = tl.where(mask, v, 0.0)
    store_row(v, out + item * out_item + token * out_row, out_scale, row, column, mask, FORM, ROTATE, BLOCK)


@triton.jit
def swiglu_kernel(
    gate,
    up,
    gate_row,
    gate_column,
    up_row,
    up_column,
    out,
    out_scale,
    width,
    gate_stride,
    up_stride,
    SCALED: tl.constexpr,
    FORM: tl.constexpr,
    ROTATE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """silu(gate) * up, of numbers or of integer sums with their scales."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    mask = column < width
    g = tl.load(gate + row * gate_stride + column, mask=mask, other=0).to(tl.float32)
    v = tl.load(up + row * up_stride + column, mask=mask, other=0).to(tl.float32)
    if SCALED:
        g = g * tl.load(gate_row + row) * tl.load(gate_column + column, mask=mask, other=0.0)
        v = v * tl.load(up_row + row) * tl.load(up_column + column, mask=mask, other=0.0)
    v = g * tl.sigmoid(g) * v
    store_row(v, out + row * width, out_scale, row, column, mask, FORM, ROTATE, BLOCK)


@triton.jit
def turned(x, at, mask, weight, cos, sin, width, eps):
    """Norm heads (R, E / 2, 2) and turn their pairs where they are; rounded where the reference rounds."""
    v = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    mean = tl.sum(tl.sum(v * v, axis=2), axis=1) / width  # (R,)
    v = v * tl.rsqrt(mean + eps)[:, None, None]
    v = v.to(x.dtype.element_ty).to(tl.float32) * weight
    a, b = tl.split(v.to(x.dtype.element_ty).to(tl.float32))  # (R, E / 2) each
    v = tl.join(a * cos - b * sin, a * sin + b * cos)
    tl.store(x + at, v.to(x.dtype.element_ty), mask=mask)


@triton.jit
def turn_kernel(
    q,
    k,
    first_q,
    first_k,
    other_q,
    other_k,
    cosines,
    sines,
    tokens,
    heads,
    half,
    first,
    eps,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
):
    """Queries and keys (B, S, H, E) in place: HEADS heads of one token. Tokens before `first` have their own norms."""
    row = tl.program_id(0)
    token = row % tokens
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    pair = tl.arange(0, HALF)
    side = tl.arange(0, 2)
    inside = 2 * pair[:, None] + side[None, :]  # (E / 2, 2)
    known = (pair < half)[:, None] & (side < 2)[None, :]
    place = (token + 0 * inside) - first  # negative before `first`
    at = ((row.to(tl.int64) * heads + head) * (2 * half))[:, None, None] + inside[None, :, :]
    mask = (head < heads)[:, None, None] & known[None, :, :]
    angle = token.to(tl.int64) * half + pair
    cos = tl.load(cosines + angle, mask=pair < half, other=0.0)[None, :]
    sin = tl.load(sines + angle, mask=pair < half, other=0.0)[None, :]
    own = tl.load(first_q + inside, mask=known & (place < 0), other=0.0).to(tl.float32)
    own += tl.load(other_q + inside, mask=known & (place >= 0), other=0.0).to(tl.float32)
    turned(q, at, mask, own[None, :, :], cos, sin, 2 * half, eps)
    own = tl.load(first_k + inside, mask=known & (place < 0), other=0.0).to(tl.float32)
    own += tl.load(other_k + inside, mask=known & (place >= 0), other=0.0).to(tl.float32)
    turned(k, at, mask, own[None, :, :], cos, sin, 2 * half, eps)
