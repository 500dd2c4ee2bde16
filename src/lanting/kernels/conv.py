"""3x3 convolutions of pictures with channels last, as `csrc/vae.h` computes them: Winograd's way.

    laid = lay(weight, bias, x.dtype)               once: for every 9 numbers of a weight 16
    y = convolve(x, laid, gamma)                    norm and SiLU first
    convolve(x, laid, gamma, add=y, out=y)          plus y, where y is
    convolve(x, lay(..., grow=True))                of the picture doubled

Pictures are (B, C, H, W) float32 or bfloat16 on the CPU, laid out (B, H, W, C).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lanting.kernels import library as lib
from lanting.kernels.calls import TYPES, call

LANES = 16  # channels are rounded up to


def rounded(channels: int) -> int:
    return -(-channels // LANES) * LANES


def padded(vector: Tensor) -> Tensor:
    """(C) as float32, with zeros up to a multiple of 16."""
    made = torch.zeros(rounded(vector.numel()))
    made[: vector.numel()] = vector.detach().flatten().float()
    return made


@dataclass(frozen=True, slots=True)
class Laid:
    """The weight of a convolution for pictures of one dtype, and its bias."""

    data: Tensor
    bias: Tensor
    dtype: torch.dtype
    channels: tuple[int, int]  # of the picture, of the result
    grow: bool


def lay(weight: Tensor, bias: Tensor, dtype: torch.dtype, *, grow: bool = False) -> Laid:
    """Lay out a weight (out, in, 3, 3); `grow`: for pictures that are doubled first, each pixel becoming four."""
    found = lib.library()
    if found is None or weight.shape[2:] != (3, 3) or dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"there are no kernels for a convolution of {tuple(weight.shape)} in {dtype}")
    outs, channels = weight.shape[:2]
    size = (9 if grow else 16) * rounded(outs) * rounded(channels) * found.lt_conv_bytes(TYPES[dtype])
    data, plain = torch.empty(size, dtype=torch.uint8), weight.detach().float().contiguous()
    given = (plain.data_ptr(), data.data_ptr(), channels, outs, TYPES[dtype], int(grow))
    call("lt_conv_weight", lib.ConvWeight(*given))
    return Laid(data, padded(bias), dtype, (channels, outs), grow)


def convolve(
    x: Tensor, laid: Laid, gamma: Tensor | None = None, *, add: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """x, through x / |x| * gamma and SiLU where there is a gamma (see `padded`), convolved, plus `add`, which may be
    `out`; `out` must not be x."""
    items, channels, high, wide = x.shape
    scale = 2 if laid.grow else 1
    shape = (items, laid.channels[1], scale * high, scale * wide)
    if out is None:
        out = torch.empty(shape, dtype=x.dtype, memory_format=torch.channels_last)
    for each, expected in ((x, (items, laid.channels[0], high, wide)), (out, shape), (add, shape)):
        if each is not None and not fits(each, expected, laid.dtype):
            raise ValueError(f"a picture {tuple(each.shape)} in {each.dtype} is not {expected} with channels last")
    at = [None if each is None else each.data_ptr() for each in (x, out, add, laid.data, laid.bias, gamma)]
    call("lt_convolve", lib.Conv(*at, items, high, wide, channels, laid.channels[1], TYPES[x.dtype], int(laid.grow)))
    return out


def fits(x: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> bool:
    there = x.shape == shape and x.dtype == dtype and x.device.type == "cpu"
    return there and x.permute(0, 2, 3, 1).is_contiguous()
