"""Codes of 1 to 8 bits with scales and offsets: in and out of bytes, and what they are worth."""

from __future__ import annotations

import pytest
import torch

from lanting.nn.affine import AffineLinear, pack_codes, unpack_codes


@pytest.mark.parametrize("bits", range(1, 9))
def test_codes_come_back_and_lie_from_the_lowest_bit_on(bits):
    codes = torch.randint(1 << bits, (3, 40))
    packed = pack_codes(codes, bits)
    assert packed.shape == (3, 40 * bits // 8) and packed.dtype == torch.uint8
    assert torch.equal(unpack_codes(packed, bits).long(), codes)
    whole = int.from_bytes(bytes(packed[1].tolist()), "little")
    assert [whole >> bits * place & (1 << bits) - 1 for place in range(40)] == codes[1].tolist()


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_a_code_is_worth_scale_times_code_plus_offset(bits):
    torch.manual_seed(bits)
    linear = AffineLinear(64, 24, bits=bits, group=16)
    codes, scale, zero = torch.randint(1 << bits, (24, 64)), torch.rand(24, 4).half(), torch.randint(1 << bits, (24, 4))
    linear.weight, linear.weight_scale = pack_codes(codes, bits), scale
    linear.weight_offset, linear.bias = -zero * scale.float(), torch.randn(24)
    meant = ((codes.view(24, 4, 16) - zero[:, :, None]) * scale.float()[:, :, None]).view(24, 64)
    assert torch.equal(linear.dense(torch.float32), meant)
    assert torch.equal(linear.dense(torch.bfloat16), meant.bfloat16()), "rounded once"
    rows = torch.tensor([[7, 0], [7, 23]])
    assert torch.equal(linear.lookup(rows, torch.float32), meant[rows])
    x = torch.randn(5, 64)
    torch.testing.assert_close(linear(x), x @ meant.T + linear.bias)


@pytest.mark.parametrize(("width", "bits", "group"), [(60, 4, 20), (64, 9, 16), (64, 4, 24), (64, 4, 0)])
def test_what_can_not_be_is_said(width, bits, group):
    with pytest.raises(ValueError, match=r"no whole bytes|evenly"):
        AffineLinear(width, 8, bits=bits, group=group)
