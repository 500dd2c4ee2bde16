"""Codes of 4 bits with offsets by Triton's kernels of our int4."""

from __future__ import annotations

import pytest
import torch

from lanting.attach import offsets
from lanting.attach.gpu_linears import How, product_of
from lanting.kernels.gpu import products
from lanting.nn.affine import OrderedLinear, pack_codes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_products_with_offsets(dtype, device, monkeypatch):
    for module in (products, offsets):
        monkeypatch.setattr(module, "available", lambda device: True)
    torch.manual_seed(0)
    made = OrderedLinear(128, 40, bits=4, group=32)
    scale = (torch.rand(40, 4) / 16).half()
    made.weight, made.weight_scale = pack_codes(torch.randint(16, (40, 128)), 4), scale
    made.weight_offset, made.bias = -torch.randint(16, scale.shape) * scale.float(), torch.randn(40)
    made.order = torch.randperm(128).int()
    made, x = made.to(device), torch.randn(1, 20, 128, device=device).to(dtype)
    exact = made.plain(x.float())
    found = product_of(How(), made, x)
    assert found.dtype == dtype and not torch.equal(found, made.plain(x))
    assert float((found - exact).norm() / exact.norm()) < (1e-5 if dtype == torch.float32 else 2e-3)
