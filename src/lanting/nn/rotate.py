"""Hadamard rotations in blocks: they spread an outlier over its neighbours, so that few bits suffice.

An orthogonal matrix H with entries +-1/sqrt(n) turns the inputs and the weight's columns alike, and
(x H)(W H)^T = x W^T: exact in arithmetic, better after rounding. Blocks of a power of two, because a whole row of
3072 has no Sylvester matrix and a block is a small dense product on every device. Sylvester's matrix is symmetric,
so it is its own inverse and the way back is the way there.
Source: "QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs" (Ashkboos et al., 2024).
"""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST = 256  # a block beyond this costs more than the spreading gains


def hadamard(size: int, dtype: torch.dtype = torch.float32, device: torch.device | None = None) -> Tensor:
    """The orthonormal Sylvester matrix (size, size); `size` is a power of two, else a ValueError."""
    if size < 1 or size & (size - 1):
        raise ValueError(f"a Hadamard block must be a power of two, not {size}")
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return (matrix / size**0.5).to(device=device, dtype=dtype)


def rotate_blocks(x: Tensor, size: int) -> Tensor:
    """Rotate neighbouring runs of `size` numbers of the last axis (..., n); rotating twice gives x back.

    Raises ValueError when `size` does not divide n.
    """
    if x.shape[-1] % size:
        raise ValueError(f"blocks of {size} do not divide rows of {x.shape[-1]}")
    return (x.unflatten(-1, (-1, size)) @ hadamard(size, x.dtype, x.device)).flatten(-2)


def largest_block(features: int, most: int = LARGEST) -> int:
    """The largest power of two that divides `features`, at most `most`; 1 where it is odd."""
    return min(features & -features, most)
