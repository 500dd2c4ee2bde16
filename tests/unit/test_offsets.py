"""Codes of 4 bits with offsets, multiplied by the kernels of our int4."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lanting.attach.compute import attach_kernels, detach_kernels
from lanting.attach.offsets import beyond, moved
from lanting.kernels.library import ready
from lanting.nn.affine import AffineLinear, OrderedLinear, pack_codes
from lanting.nn.linears import Int4Linear


def linear(cls: type[AffineLinear], group: int = 64, bits: int = 4, bias: bool = True) -> AffineLinear:
    torch.manual_seed(group)
    made = cls(256, 72, bias, bits, group)
    codes, scale = torch.randint(1 << bits, (72, 256)), (torch.rand(72, 256 // group) / 16).half()
    made.weight, made.weight_scale = pack_codes(codes, bits), scale
    made.weight_offset = -torch.randint(1 << bits, scale.shape) * scale.float()
    made.bias = torch.randn(72).bfloat16() if bias else None
    if isinstance(made, OrderedLinear):
        made.order = torch.randperm(256).int()
    return made


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found.float() - wanted.float()).norm() / wanted.float().norm())


@pytest.mark.parametrize("cls", [AffineLinear, OrderedLinear])
@pytest.mark.parametrize("group", [32, 128])
def test_parts_add_up(cls, group):
    """An int4 of the same bytes, inputs moved, and what is beyond it."""
    made, x = linear(cls, group), torch.randn(3, 5, 256)
    int4 = Int4Linear(256, 72, True, group)
    int4.weight, int4.weight_scale, int4.bias = made.weight, made.weight_scale, made.bias
    halves, sums = moved(made, x)
    found = int4.plain(halves) + sums @ beyond(made).T
    torch.testing.assert_close(found.view(3, 5, 72), made.plain(x), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(made.plain(x), nn.functional.linear(x, made.dense(torch.float32), made.bias.float()))


@pytest.mark.parametrize("cls", [AffineLinear, OrderedLinear])
@pytest.mark.parametrize("group", [16, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_multiply_them(cls, group, dtype):
    assert ready()
    made = linear(cls, group)
    exact = made.plain(torch.eye(256)).T  # without rounding of inputs
    x = torch.randn(2, 20, 256).to(dtype)
    wanted = nn.functional.linear(x.float(), exact - made.bias.float()[:, None], made.bias.float())
    net = nn.ModuleDict({"one": made})
    assert attach_kernels(net) and "bound" not in made.__dict__
    found = made(x)
    assert "bound" in made.__dict__ and found.dtype == dtype and found.shape == (2, 20, 72)
    assert 1e-4 < error(found, wanted) < 0.015
    assert torch.equal(made(x), found)
    few = x[0, :3]
    assert torch.equal(made(few), made.plain(few)), "too few rows to gain"
    detach_kernels(net)
    assert torch.equal(made(x), made.plain(x)) and "bound" not in made.__dict__


@pytest.mark.parametrize(("group", "bits"), [(256, 4), (64, 3), (64, 8)])
def test_others_stay_exact(group, bits):
    made, x = linear(AffineLinear, group, bits, bias=False), torch.randn(20, 256)
    attach_kernels(nn.ModuleDict({"one": made}))
    assert torch.equal(made(x), made.plain(x))
