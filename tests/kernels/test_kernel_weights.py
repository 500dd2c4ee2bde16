"""Packed weights become int8 with one scale per row: nearest to what they stand for, in every instruction set."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernel_cases import GGUF, KINDS, SETS, columns_of, pack, random, using, weight
from lanting.kernels import calls
from lanting.kernels.calls import Packed
from lanting.nn.blocks import TYPES
from lanting.nn.dequant import dequantize

SLACK = {"amx": 0.01, "avx512_bf16": 0.01, "avx512_vnni": 0.01, "avx_vnni": 0.01, "avx2": 0.01}
"""How far from a tie a value may be rounded the other way, in steps. Vectors multiply codes of 8 and 6 bits with
factors of 15 and 12 bits after the point; all others compute in float32."""


def steps(packed: Packed, values: Tensor) -> Tensor:
    """Values in steps of their row, where integers are what int8 can say."""
    return values.double() * 127 / packed.bound.double().clamp(min=1e-30)[:, None]


def slack(isa: str) -> float:
    return SLACK.get(isa, 1e-4)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("rows", [1, 31, 70])
def test_weights_are_rounded_to_the_nearest_step(isa, name, rows):
    packed, values = weight(name, rows, columns_of(name, 180))
    off = (calls.expanded(packed) - steps(packed, values)).abs().max()
    assert off <= 0.5 + slack(isa)


@pytest.mark.parametrize("name", KINDS)
def test_bounds_hold_and_are_met(name):
    """No value exceeds its row's bound, and no bound wastes more than half of the range."""
    packed, values = weight(name, 70, columns_of(name, 180))
    most = values.abs().amax(1)
    assert (most <= packed.bound * (1 + 1e-6)).all()
    assert (packed.bound <= 1.5 * most).all()
    assert packed.bound[-1] == 0
    assert not calls.expanded(packed)[-1].any()


@pytest.mark.parametrize("name", ["int8 of 16", "int4 of 32"])
def test_a_group_of_zeros_does_not_swallow_its_row(name):
    """Its scale is 1, a hundred times what the others have."""
    dense = random(4, 96) * 0.01
    dense[:, 32:64] = 0
    linear = pack(name, dense)
    packed = calls.packed(linear.kind, linear.weight, linear.weight_scale, 96)
    assert packed is not None
    assert linear.weight_scale.amax() == 1
    assert (calls.expanded(packed) - steps(packed, linear.values(torch.float32))).abs().max() < 0.51
    assert packed.bound.max() < 0.1


@pytest.mark.parametrize("name", KINDS)
def test_instruction_sets_agree_but_for_ties(name):
    """At most one step apart, and only beside ties, which a fused multiplication may round otherwise than two."""
    packed, values = weight(name, 70, columns_of(name, 700))
    exact = steps(packed, values)
    beside_tie = ((exact - exact.floor()) - 0.5).abs() < 0.01
    with using("plain"):
        plain = calls.expanded(packed).int()
    for isa in SETS:
        with using(isa):
            found = calls.expanded(packed).int()
        assert (found - plain).abs().max() <= 1
        assert not ((found != plain) & ~beside_tie).any()
    if name == "int8":
        assert torch.equal(plain, packed.data.int())


@pytest.mark.parametrize("kind", GGUF)
def test_blocks_of_any_bytes_are_read(isa, kind):
    """Files are others': negative scales, lowest codes, any bits; only scales are kept to numbers."""
    size, rows = TYPES[kind].size, 40
    data = torch.randint(0, 256, (rows, 3, size), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    for place in {"Q4_0": (0,), "Q8_0": (0,), "Q4_K": (0, 2), "Q6_K": (208,)}[kind]:
        scales = (random(rows, 3, 1, seed=place) * 0.1).half()
        data[:, :, place : place + 2] = scales.view(torch.uint8)
    data = data.flatten(1)
    packed = calls.packed(kind, data, None, 3 * TYPES[kind].values)
    assert packed is not None
    values = steps(packed, dequantize(data, kind)).clamp(-127, 127)  # Q8_0's -128 is beyond what its scale is for
    assert (calls.expanded(packed) - values).abs().max() <= 0.5 + slack(isa)


@pytest.mark.parametrize("group", [16, 256])
def test_the_lowest_byte_is_as_its_neighbour(isa, group):
    """-128 has no counterpart; nobody writes it, but files may hold it."""
    data = torch.full((3, 256), -128, dtype=torch.int8)
    packed = calls.packed("int8", data, torch.full((3, 256 // group), 0.5), 256)
    assert packed is not None
    assert (calls.expanded(packed) == -127).all()


@pytest.mark.parametrize("spoilt", [torch.nan, torch.inf])
def test_scales_that_are_no_numbers_show(isa, spoilt):
    scale = torch.ones(33, 4)
    scale[7, 2] = spoilt
    packed = calls.packed("int8", torch.ones(33, 64, dtype=torch.int8), scale, 64)
    assert packed is not None
    out = torch.empty(2, 33)
    calls.product(calls.quantize(torch.ones(2, 64)), packed, out)
    good = torch.arange(33) != 7
    assert not torch.isfinite(out[:, 7]).any()
    assert torch.isfinite(out[:, good]).all()


def test_only_what_can_be_read_is_taken():
    data, scale = torch.ones(8, 64, dtype=torch.int8), torch.ones(8, 1)
    assert calls.packed("int8", data, scale, 64) is not None
    assert calls.packed("int8", data, torch.ones(8, 8), 64) is None, "groups of 8"
    assert calls.packed("int8", data, torch.ones(()), 64) is None, "one scale for all"
    assert calls.packed("int8", data, torch.ones(4, 2), 64) is None, "a scale for two rows"
    assert calls.packed("int8", data, None, 64) is None
    assert calls.packed("int8", data.t().contiguous().t(), scale, 64) is None
    assert calls.packed("int8", data, scale.double(), 64) is None
    assert calls.packed("int8", data, scale, 128) is None
    assert calls.packed("fp8 e4m3", data, scale, 64) is None
    assert calls.packed("int4", data.view(torch.uint8), torch.ones(8, 16), 128) is None, "groups of 8"
    assert calls.packed("Q4_K", torch.ones(8, 144, dtype=torch.uint8), None, 512) is None
    assert calls.packed("Q5_K", torch.ones(8, 176, dtype=torch.uint8), None, 256) is None
    assert calls.packed("int8", torch.ones(1, 1 << 17, dtype=torch.int8), torch.ones(1, 1), 1 << 17) is None, "32 bits"
    assert calls.packed("int8", data.to("meta"), scale.to("meta"), 64) is None
