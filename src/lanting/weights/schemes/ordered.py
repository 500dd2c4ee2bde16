"""MLX's and SDNQ's tensors as our Linears hold them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lanting.nn.fourbit import small_floats
from lanting.nn.number_types import RUN
from lanting.nn.numbers import pack_runs, unpack_runs
from lanting.weights.form import SECOND, Form
from lanting.weights.schemes.sdnq import TURNED


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


def sdnq(form: Form, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of an Int8Linear, an Fp8Linear, an AffineLinear or a NumberLinear, which a low rank may stand around."""
    rows = form.shape[0]
    weight, scale, zero = parts["weight"], parts["scale"], parts.get("zero")
    if form.layout == TURNED:
        weight, scale, zero = weight.T.contiguous(), scale.T, None if zero is None else zero.T
    assert form.scale is not None
    held = {"weight": in_rows(weight, form)}
    for part, each in (("weight_scale", scale), ("weight_offset", zero)):
        if each is not None:
            each = each.reshape(-1, 1).expand(rows, 1) if each.numel() == 1 and form.scale else each
            held[part] = each.reshape(form.scale).contiguous()
    if form.rank:
        up, down = parts["up"], parts["down"]
        up, down = (up, down) if up.shape == (rows, form.rank) else (up.T, down.T)
        held = {f"residual.{part}": each for part, each in held.items()}
        held |= {"up": up.contiguous(), "down": down.contiguous()}
    return held


def in_rows(weight: Tensor, form: Form) -> Tensor:
    """Codes of SDNQ's, one run through the whole matrix, in whole bytes of each row."""
    rows, columns = form.shape
    bits = int(form.kind.removeprefix("uint")) if form.kind.startswith("uint") else 8
    if weight.dtype != torch.uint8 or columns % RUN == 0:
        return weight.reshape(rows, columns * bits // 8)
    codes = unpack_runs(weight.reshape(1, -1), bits).view(rows, columns)
    return pack_runs(torch.nn.functional.pad(codes, (0, -columns % RUN)), bits)
