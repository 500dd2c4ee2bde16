"""Weights of 4-bit codes with offsets by the kernels of our int4, which know scales alone.

code x scale + offset is (code - 8) x scale, an int4, and 8 x scale + offset, the same for all inputs of a group: that
part of a product is the sum of a group's inputs times it, a matrix of one column for each group. So
    x W^T = int4 (x) + sums of x's groups (8 scale + offset)^T
Two neighbours share a byte here, and the two halves of a group with int4: instead of weights, inputs are moved, and by
the same move inputs whose groups do not stand together. Rejected: packing weights anew, which mapped files could not
keep, and expanding them, four to twenty times as slow on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lanting.kernels import calls
from lanting.kernels.gpu.here import available, on
from lanting.kernels.gpu.products import Weight, four_bit
from lanting.nn.affine import AffineLinear, OrderedLinear

GROUPS = (16, 32, 64, 128)  # that kernels know
HALF = 8  # what int4 takes from each code
FEWEST = 16  # rows below which a weight is expanded, and exact
Way = Callable[[AffineLinear, Tensor], Tensor | None]


def with_offsets(linear: AffineLinear, x: Tensor, by: Way) -> Tensor:
    """x W^T + b by kernels, `on_cpu` or `on_gpu`; as defined where that is no gain."""
    rows = x.numel() // max(1, x.shape[-1])
    if linear.bits != 4 or linear.group not in GROUPS or rows < FEWEST or x.requires_grad:
        return linear.plain(x)
    whole = by(linear, x)
    return linear.plain(x) if whole is None else whole.to(x.dtype).view(*x.shape[:-1], linear.out_features)


def on_cpu(linear: AffineLinear, x: Tensor) -> Tensor | None:
    """(rows, out) float32, of x rounded to int8; None where kernels can't."""
    if x.device.type != "cpu" or x.dtype not in (torch.float32, torch.bfloat16):
        return None
    bound = linear.__dict__.get("bound")  # of each row: found once, as in `attach.held`
    weight = calls.packed("int4", linear.weight, linear.weight_scale, linear.in_features, bound)
    if weight is None:
        return None
    linear.__dict__["bound"] = weight.bound
    halves, sums = moved(linear, x)
    out = torch.empty(len(halves), linear.out_features)
    calls.product(calls.quantize(halves), weight, out, None if linear.bias is None else linear.bias.float())
    return out.addmm_(sums, beyond(linear).T)


def on_gpu(linear: AffineLinear, x: Tensor) -> Tensor | None:
    """(rows, out) float32; None where there are no kernels."""
    if not available(x.device) or not (linear.weight.is_contiguous() and linear.weight_scale.is_contiguous()):
        return None
    with on(x.device):
        halves, sums = moved(linear, x)
        made = four_bit(halves, Weight(linear.weight, linear.weight_scale), linear.bias)
        return torch.addmm(made.float(), sums, beyond(linear).T)


def moved(linear: AffineLinear, x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (n, in) as int4 wants them, and the sums of their groups (n, groups), float32."""
    if isinstance(linear, OrderedLinear):
        x = x.index_select(-1, linear.order)
    grouped = x.flatten(0, -2).unflatten(1, (-1, linear.group // 2, 2))  # (n, groups, g / 2, 2)
    return grouped.transpose(2, 3).flatten(1), grouped.sum((2, 3), dtype=torch.float32)


def beyond(linear: AffineLinear) -> Tensor:
    """What every input of a group is multiplied by beside int4: (out, groups), float32."""
    return torch.add(linear.weight_offset.float(), linear.weight_scale.float(), alpha=HALF)
