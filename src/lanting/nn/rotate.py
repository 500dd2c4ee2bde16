"""Hadamard rotations in blocks: they spread an outlier over its neighbours, so that few bits suffice.

An orthogonal matrix H with entries +-1/sqrt(n) turns the inputs and the weight's columns alike, and
(x H)(W H)^T = x W^T: exact in arithmetic, better after rounding. Blocks, because a whole row of 3072 has no matrix of
this kind and a block is a small dense product on every device. The matrix is the regular one (all rows sum to the same:
no output collects the mean of its block, as the first of Sylvester's does), and it is symmetric, so the way back is
the way there. ComfyUI's `convrot` files are rotated by the same matrix.
Source: "QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs" (Ashkboos et al., 2024).
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

LARGEST = 256  # a block beyond this costs more than the spreading gains


@cache
def hadamard(size: int, dtype: torch.dtype = torch.float32, device: torch.device | None = None) -> Tensor:
    """The regular orthonormal matrix (size, size): Kronecker powers of the one with -1 on its antidiagonal.

    Raises ValueError unless `size` is a power of 4, at least 4.
    """
    if size < 4 or size & (size - 1) or size.bit_length() % 2 == 0:
        raise ValueError(f"a block to rotate must be a power of 4, not {size}")
    seed = 1 - 2 * torch.eye(4, device="cpu").flip(1)
    matrix = seed
    while len(matrix) < size:
        matrix = torch.kron(matrix, seed)
    return (matrix / size**0.5).to(device=device or "cpu", dtype=dtype)


def rotate_blocks(x: Tensor, size: int) -> Tensor:
    """Rotate neighbouring runs of `size` numbers of the last axis (..., n); rotating twice gives x back.

    Raises ValueError when `size` does not divide n.
    """
    if x.shape[-1] % size:
        raise ValueError(f"blocks of {size} do not divide rows of {x.shape[-1]}")
    return (x.unflatten(-1, (-1, size)) @ hadamard(size, x.dtype, x.device)).flatten(-2)


def largest_block(features: int, most: int = LARGEST) -> int:
    """The largest power of 4 that divides `features`, at most `most`; 0 where 4 does not."""
    return next((size for size in (256, 64, 16, 4) if size <= most and features % size == 0), 0)
