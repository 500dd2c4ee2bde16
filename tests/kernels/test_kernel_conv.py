"""Convolutions of pictures, with what comes before and after them, against torch in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernel_cases import random
from lanting.kernels import library as lib
from lanting.kernels.conv import Laid, convolve, lay, padded

SHAPES = [  # items, channels, channels of the result, height, width
    (1, 1, 1, 1, 1),
    (2, 3, 96, 5, 7),
    (1, 24, 4, 6, 33),
    (1, 96, 48, 3, 40),
    (1, 64, 32, 9, 2),
    (1, 272, 16, 2, 67),
]


def picture(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return random(*shape, seed=seed, dtype=dtype).contiguous(memory_format=torch.channels_last)


def layer(channels: int, outs: int, dtype: torch.dtype, grow: bool = False) -> tuple[Tensor, Tensor, Laid]:
    weight = random(outs, channels, 3, 3, seed=1, dtype=dtype) / (channels * 9) ** 0.5
    bias = random(outs, seed=2, dtype=dtype)
    return weight.double(), bias.double(), lay(weight, bias, dtype, grow=grow)


def assert_same(out: Tensor, wanted: Tensor) -> None:
    """In bfloat16 what is multiplied is rounded as well, so that errors go with the whole sum, not with its result."""
    error = (out.double() - wanted).abs()
    assert error.max() <= (3e-5 if out.dtype == torch.float32 else 6e-2)
    assert error.square().mean().sqrt() <= (3e-6 if out.dtype == torch.float32 else 6e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_convolution(isa, dtype, shape):
    items, channels, outs, height, width = shape
    x = picture(items, channels, height, width, dtype=dtype)
    weight, bias, laid = layer(channels, outs, dtype)
    assert_same(convolve(x, laid), F.conv2d(x.double(), weight, bias, padding=1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_of_a_doubled_picture(isa, dtype, shape):
    items, channels, outs, height, width = shape
    x = picture(items, channels, height, width, dtype=dtype)
    weight, bias, laid = layer(channels, outs, dtype, grow=True)
    doubled = F.interpolate(x.double(), scale_factor=2.0, mode="nearest-exact")
    assert_same(convolve(x, laid), F.conv2d(doubled, weight, bias, padding=1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_norm_and_silu_first_and_a_sum_in_place(isa, dtype, shape):
    items, channels, outs, height, width = shape
    x, other = picture(items, channels, height, width, dtype=dtype), picture(items, outs, height, width, dtype=dtype)
    x[0, :, 0, 0] = 0  # has no direction
    gamma = random(channels, seed=3) * channels**0.5
    weight, bias, laid = layer(channels, outs, dtype)
    normed = F.silu(F.normalize(x.double(), dim=1) * gamma.double().view(1, -1, 1, 1))
    wanted = F.conv2d(normed, weight, bias, padding=1) + other.double()
    made = convolve(x, laid, padded(gamma), add=other, out=other)
    assert made is other
    assert_same(made, wanted)


def test_silu_of_all_sizes(isa):
    """One channel alone has the length 1: what its norm leaves is its sign, so gamma alone is what SiLU sees."""
    gamma = torch.cat([torch.linspace(-90, 90, 59), torch.tensor([-1e4, 1e4])])
    kernel = torch.zeros(1, 1, 3, 3)
    kernel[0, 0, 1, 1] = 1
    laid = lay(kernel, torch.zeros(1), torch.float32)
    for each in gamma:
        out = convolve(torch.ones(1, 1, 2, 2), laid, padded(each.view(1)))
        torch.testing.assert_close(out[0, 0, 0, 0], F.silu(each), rtol=3e-6, atol=1e-30)


def test_threads_change_nothing(isa):
    x = picture(2, 16, 41, 70, dtype=torch.bfloat16)
    laid = layer(16, 32, torch.bfloat16)[2]
    gamma, found = padded(torch.ones(16)), []
    for count in (1, 3):
        lib.use_threads(count)
        found.append(convolve(x, laid, gamma))
    assert torch.equal(*found)


def test_what_does_not_fit_is_refused(isa):
    laid = layer(16, 16, torch.float32)[2]
    with pytest.raises(ValueError, match="channels last"):
        convolve(random(1, 16, 4, 4), laid)
    with pytest.raises(ValueError, match="not"):
        convolve(picture(1, 16, 4, 4, dtype=torch.bfloat16), laid)
    with pytest.raises(ValueError, match="channels last"):
        convolve(picture(1, 16, 4, 4, dtype=torch.float32), laid, out=picture(1, 16, 4, 8, dtype=torch.float32))
    with pytest.raises(ValueError, match="no kernels"):
        lay(torch.zeros(8, 8, 1, 1), torch.zeros(8), torch.float32)
