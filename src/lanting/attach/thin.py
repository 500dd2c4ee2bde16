"""A low-rank Linear on a CPU: its thin matrices go through the kernels, as plain weights do.

torch's products in bfloat16 are ten times slower than those in float32 where a processor does not multiply it; two thin
ones took up to twice as long there as the weight that they help.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lanting.attach.held import floats
from lanting.kernels import calls
from lanting.nn.lowrank import LowRankLinear
from lanting.nn.rotate import rotate_blocks


def thin_product(linear: LowRankLinear, x: Tensor) -> Tensor:
    """`LowRankLinear.plain`; that itself where the kernels don't multiply plain weights."""
    down, up = calls.dense(linear.down, x.dtype), calls.dense(linear.up, x.dtype)
    if down is None or up is None or x.device.type != "cpu" or x.requires_grad:
        return linear.plain(x)
    x = rotate_blocks(x, linear.rotate) if linear.rotate else x
    thin = torch.empty(x.shape[:-1].numel(), len(linear.down), dtype=x.dtype)
    added = torch.empty(*x.shape[:-1], linear.out_features, dtype=x.dtype)
    calls.product(calls.quantize(x.flatten(0, -2).contiguous(), dense=True), down, thin)
    calls.product(calls.quantize(thin, dense=True), up, added.flatten(0, -2), floats(linear, "bias"))
    return added.add_(linear.coarse(x))
