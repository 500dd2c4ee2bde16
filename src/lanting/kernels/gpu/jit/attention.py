"""Attention with scores in 8 bits: one program a tile of queries, softmax kept up tile by tile of keys."""
# pyright: reportOperatorIssue=false

import triton
import triton.language as tl


@triton.jit
def head_codes_kernel(
    x,
    mean,
    codes,
    scales,
    tokens,
    heads,
    x_item,
    x_token,
    x_head,
    factor,
    SMOOTH: tl.constexpr,
    BLOCK: tl.constexpr,
    E: tl.constexpr,
):
    """A tile (BLOCK, E) of one head of x (B, S, H, E) to int8 with one scale: codes (B, H, S, E), scales (B, H, tiles).

    With SMOOTH the mean (B, H, E) of all tokens goes first; `factor` joins the scale.
    """
    tile = tl.program_id(0)
    pair = tl.program_id(1)  # item and head
    item = (pair // heads).to(tl.int64)
    token = tile * BLOCK + tl.arange(0, BLOCK)
    e = tl.arange(0, E)
    known = (token < tokens)[:, None] & (e < E)[None, :]
    at = item * x_item + (pair % heads).to(tl.int64) * x_head + token.to(tl.int64)[:, None] * x_token + e[None, :]
    v = tl.load(x + at, mask=known, other=0.0).to(tl.float32)
    if SMOOTH:
        v = tl.where(known, v - tl.load(mean + pair.to(tl.int64) * E + e)[None, :], 0.0)
    peak = tl.max(tl.max(tl.abs(v), axis=1), axis=0)
    bad = tl.sum(tl.sum(v * 0.0, axis=1), axis=0)  # 0, or NaN
    v = v * tl.where(peak > 1e-30, 127.0 / peak, 0.0)
    v = tl.where(v > 127.0, 127.0, v)
    v = tl.where(v < -127.0, -127.0, v)
    v = (v + 12582912.0) - 12582912.0  # to whole numbers
    to = (pair.to(tl.int64) * tokens + token)[:, None] * E + e[None, :]
    tl.store(codes + to, v.to(tl.int8), mask=known)
    tl.store(scales + pair * tl.num_programs(0) + tile, tl.where(peak > 1e-30, peak / 127.0, 1.0) * factor + bad)


@triton.jit
def attend_kernel(
    q,
    k,
    v,
    q_scale,
    k_scale,
    seen,
    out,
    queries,
    keys,
    heads,
    masked,
    v_item,
    v_token,
    v_head,
    MASK: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    E: tl.constexpr,
):
    """q, k (B, H, S, E) int8, v (B, S, H, E) in 16 or 32 bits -> out (B, S, H, E); `seen` (B, masked) of first keys."""
    tile = tl.program_id(0)
    pair = tl.program_id(1)
    item = (pair // heads).to(tl.int64)
    head = (pair % heads).to(tl.int64)
    m = tile * BM + tl.arange(0, BM)
    n = tl.arange(0, BN)
    e = tl.arange(0, E)
    a = tl.load(q + (pair.to(tl.int64) * queries + m)[:, None] * E + e[None, :], mask=(m < queries)[:, None], other=0)
    own = tl.load(q_scale + pair * tl.num_programs(0) + tile)
    tiles = tl.cdiv(keys, BN)
    high = tl.full((BM,), -1.0e30, dtype=tl.float32)
    total = tl.zeros((BM,), dtype=tl.float32)
    acc = tl.zeros((BM, E), dtype=tl.float32)
    k_at = k + (pair.to(tl.int64) * keys + n)[None, :] * E + e[:, None]
    v_at = v + item * v_item + head * v_head + n.to(tl.int64)[:, None] * v_token + e[None, :]
    for start in range(0, keys, BN):
        left = keys - start
        b = tl.load(k_at, mask=(n < left)[None, :], other=0)
        score = tl.dot(a, b, out_dtype=tl.int32).to(tl.float32) * (own * tl.load(k_scale + pair * tiles + start // BN))
        known = n < left
        if MASK:
            text = start + n
            known = known & (tl.load(seen + item * masked + text, mask=text < masked, other=1) != 0)
        score = tl.where(known[None, :], score, -1.0e30)
        highest = tl.maximum(high, tl.max(score, axis=1))
        fade = tl.exp2(high - highest)
        weight = tl.exp2(score - highest[:, None])
        total = total * fade + tl.sum(weight, axis=1)
        c = tl.load(v_at, mask=(n < left)[:, None], other=0.0)
        acc = tl.dot(weight.to(c.dtype), c, acc * fade[:, None], input_precision="ieee")
        high = highest
        k_at += BN * E
        v_at += BN * v_token
    to = out + ((item * queries + m) * heads + head)[:, None] * E + e[None, :]
    tl.store(to, (acc / total[:, None]).to(out.dtype.element_ty), mask=(m < queries)[:, None])
