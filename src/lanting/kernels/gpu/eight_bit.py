"""Attention whose scores come from 8-bit queries and keys; weights and values stay as they are.

A tile of 128 queries or 64 keys of a head shares a scale. The mean of all keys is taken off first: it adds the same to
all scores of a query, which a softmax does not see, and it is what makes keys large. After "SageAttention: Accurate
8-Bit Attention for Plug-and-play Inference Acceleration" (Zhang et al., 2024).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lanting.kernels.gpu.here import available

QUERIES, KEYS = 128, 64  # of a tile
LOG2E = 1.4426950408889634  # powers of two are what GPUs compute


def codes(x: Tensor, block: int, factor: float, smooth: bool) -> tuple[Tensor, Tensor]:
    """(B, S, H, E) as int8 (B, H, S, E) with scales (B, H, tiles), times `factor`."""
    from lanting.kernels.gpu.jit import attention as jit

    kernel: Any = jit.head_codes_kernel
    items, tokens, heads, width = x.shape
    tiles = -(-tokens // block)
    mean = x.mean(1, dtype=torch.float32).contiguous() if smooth else x
    data = torch.empty(items, heads, tokens, width, dtype=torch.int8, device=x.device)
    scales = torch.empty(items, heads, tiles, dtype=torch.float32, device=x.device)
    kernel[(tiles, items * heads)](
        *(x, mean, data, scales, tokens, heads, x.stride(0), x.stride(1), x.stride(2), factor),
        SMOOTH=smooth,
        BLOCK=block,
        E=width,
        num_warps=4,
    )
    return data, scales


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Attention of (B, S, H, E) over all keys; mask (B, T) bool over the first T -> (B, S, H, E).

    Raises ValueError where it can't: without Triton, and for heads of other than 32, 64, 128 or 256 numbers.
    """
    items, queries, heads, width = q.shape
    if not available(q.device) or width not in (32, 64, 128, 256):
        raise ValueError("attention in 8 bits needs Triton and heads of 32, 64, 128 or 256 numbers")
    from lanting.kernels.gpu.jit import attention as jit

    kernel: Any = jit.attend_kernel
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    q_codes, q_scale = codes(q, QUERIES, width**-0.5 * LOG2E, False)
    k_codes, k_scale = codes(k, KEYS, 1.0, True)
    seen = q_scale if mask is None else mask.to(torch.uint8).contiguous()
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    kernel[(-(-queries // QUERIES), items * heads)](
        *(q_codes, k_codes, v, q_scale, k_scale, seen, out, queries, k.shape[1], heads),
        *(0 if mask is None else mask.shape[1], v.stride(0), v.stride(1), v.stride(2)),
        MASK=mask is not None,
        BM=QUERIES,
        BN=KEYS,
        E=width,
        num_warps=4 if width <= 64 else 8,
        num_stages=3,
    )
    return out
