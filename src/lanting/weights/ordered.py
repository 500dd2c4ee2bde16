"""MLX's tensors in the order of our Linears: bytes where it has words, the first of two codes on the other side."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lanting.nn.fourbit import small_floats
from lanting.weights.forms import SECOND, Form


def mlx(form: Form, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The buffers of an AffineLinear; of a TableLinear, an Nvfp4Linear or an Fp8Linear for MLX's other modes."""
    held = {**parts, "weight": parts["weight"].view(torch.uint8)}
    scale = held["weight_scale"]
    if form.kind == "mxfp8":
        return {"weight": held["weight"].view(torch.float8_e4m3fn), "weight_scale": powers(scale).bfloat16()}
    if form.kind == "nvfp4":
        return {"weight": swapped(held["weight"]), "weight_scale": scale, SECOND: torch.ones(())}
    if form.kind == "fp4":
        table = small_floats(torch.arange(16), exponent=2, mantissa=1)
        return {"weight": swapped(held["weight"]), "quant_map": table, "absmax": powers(scale).flatten()}
    return held


def powers(exponents: Tensor) -> Tensor:
    """What the bytes of e8m0 stand for, float32."""
    return torch.exp2(exponents.float() - 127)


def swapped(codes: Tensor) -> Tensor:
    """Bytes with the first of their two codes in the high bits."""
    return codes << 4 | codes >> 4
