"""Packed Linears: what they round, what they keep, and that they can stand wherever a Linear stood."""

from __future__ import annotations

import hashlib

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lanting.nn.linears import (
    LINEARS,
    Fp8Linear,
    Int4Linear,
    Int8Linear,
    PackedEmbedding,
    PackedLinear,
)
from lanting.nn.rotate import hadamard, largest_block, rotate_blocks
from lanting.nn.rounding import fitting_group
from lanting.nn.swap import swap

KINDS = {  # kind: (how it is made, largest relative error on normal weights with one outlier)
    "int8": (lambda w, b: Int8Linear.from_dense(w, b), 0.02),
    "int8 in groups": (lambda w, b: Int8Linear.from_dense(w, b, group=64), 0.012),
    "int8 rotated": (lambda w, b: Int8Linear.from_dense(w, b, rotate=64), 0.008),
    "int4 in 32": (lambda w, b: Int4Linear.from_dense(w, b, group=32), 0.09),
    "int4 in 64": (lambda w, b: Int4Linear.from_dense(w, b), 0.1),
    "int4 in 128": (lambda w, b: Int4Linear.from_dense(w, b, group=128), 0.12),
    "int4 rotated": (lambda w, b: Int4Linear.from_dense(w, b, rotate=256), 0.09),
    "int4 float16 scales": (lambda w, b: Int4Linear.from_dense(w, b, scales=torch.float16), 0.1),
    "e4m3 by channel": (lambda w, b: Fp8Linear.from_dense(w, b), 0.03),
    "e4m3 by tensor": (lambda w, b: Fp8Linear.from_dense(w, b, scale="tensor"), 0.03),
    "e4m3 plain": (lambda w, b: Fp8Linear.from_dense(w, b, scale=None), 0.04),
    "e5m2 by channel": (lambda w, b: Fp8Linear.from_dense(w, b, kind="e5m2"), 0.06),
}


@pytest.fixture
def given() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    weight = torch.randn(96, 256) * 0.02
    weight[3, 5] = 0.5
    return weight, torch.randn(96), torch.randn(2, 7, 256)


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.float() - b.float()).norm() / b.float().norm()).item()


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_near_its_source_and_equal_to_its_dense_form(kind, given):
    make, most = KINDS[kind]
    weight, bias, x = given
    packed = make(weight, bias)
    dense = packed.dense(torch.float32)
    assert dense.shape == weight.shape
    assert 0 < apart(dense, weight) < most
    torch.testing.assert_close(packed(x), F.linear(x, dense, bias), atol=1e-5, rtol=1e-5)
    assert packed(x.bfloat16()).dtype == torch.bfloat16
    assert apart(packed(x.bfloat16()), packed(x)) < 0.01


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "rotated" not in kind])
def test_rounding_again_changes_nothing(kind, given):
    """What was read back from a file and is quantized the same way again is the same file.
    (Rotating back and forth rounds in float32 itself.)"""
    make, _ = KINDS[kind]
    weight, bias, _ = given
    once = make(weight, bias)
    assert apart(make(once.dense(torch.float32), bias).dense(torch.float32), once.dense(torch.float32)) < 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_rows_can_be_looked_up(kind, given):
    make, _ = KINDS[kind]
    weight, _, _ = given
    packed = make(weight, None)
    ids = torch.tensor([[3, 95, 0], [3, 7, 1]])
    torch.testing.assert_close(packed.lookup(ids, torch.float32), packed.dense(torch.float32)[ids])
    embedding = PackedEmbedding(packed, torch.bfloat16)
    assert torch.equal(embedding(ids), packed.dense(torch.bfloat16)[ids])
    assert embedding.weight.shape == weight.shape


@pytest.mark.parametrize("kind", KINDS)
def test_casting_a_model_leaves_packed_weights_alone(kind, given):
    make, _ = KINDS[kind]
    weight, bias, x = given
    packed = make(weight, bias)
    before = packed(x)
    assert torch.equal(nn.Sequential(packed).to(torch.float16)(x), before)


@pytest.mark.parametrize("kind", KINDS)
def test_states_load_by_assignment_on_meta(kind, given):
    make, _ = KINDS[kind]
    weight, bias, x = given
    packed = make(weight, bias)
    options = {"group": packed.group} if isinstance(packed, Int4Linear) else {}
    if not isinstance(packed, Int4Linear):
        options["scale"] = None if packed.weight_scale is None else tuple(packed.weight_scale.shape)
    if isinstance(packed, Fp8Linear):
        options["kind"] = packed.kind.split()[1]
    with torch.device("meta"):
        other = type(packed)(256, 96, rotate=packed.rotate, **options)
    other.load_state_dict(packed.state_dict(), strict=True, assign=True)
    assert torch.equal(other(x), packed(x))


def test_block_scales_cover_rows_and_columns(given):
    """ComfyUI's int8_blockwise: one scale per 32 x 64 weights here."""
    _, _, x = given
    with torch.device("meta"):
        packed = Int8Linear(256, 96, bias=False, scale=(3, 4))
    packed.weight = torch.randint(-127, 128, (96, 256), dtype=torch.int8)
    packed.weight_scale = torch.rand(3, 4)
    wanted = packed.weight.float() * packed.weight_scale.repeat_interleave(32, 0).repeat_interleave(64, 1)
    assert torch.equal(packed.dense(torch.float32), wanted)
    assert torch.equal(packed.lookup(torch.tensor([40, 95]), torch.float32), wanted[[40, 95]])
    torch.testing.assert_close(packed(x), F.linear(x, wanted))


def test_fp8_without_a_device_type_for_it_reads_a_table(given):
    weight, bias, x = given
    packed = Fp8Linear.from_dense(weight, bias)
    expected = packed(x)
    packed.weight = packed.weight.view(torch.uint8)
    assert torch.equal(packed(x), expected)


def test_scale_is_applied_in_float32_and_rounded_once():
    packed = Fp8Linear.from_dense(torch.full((1, 16), 3.0), scale="tensor")
    packed.weight_scale = torch.tensor(1.001)
    exact = packed.weight.float() * 1.001
    assert torch.equal(packed.dense(torch.bfloat16), exact.bfloat16())


@pytest.mark.parametrize("make", [make for make, _ in KINDS.values()])
def test_zeros_stay_zeros(make):
    packed = make(torch.zeros(64, 256), None)
    assert torch.equal(packed.dense(torch.float32), torch.zeros(64, 256))


@pytest.mark.parametrize("scale", [(2,), (96, 3), (7, 1), (0, 1), (96, 256, 1)])
def test_scales_that_cover_nothing_are_refused(scale):
    with pytest.raises(ValueError, match="cover no weight"):
        Int8Linear(256, 96, scale=scale)


def test_groups_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="do not divide"):
        Int4Linear(96, 8, group=64)
    assert [fitting_group(n, 64) for n in (3072, 96, 48, 40)] == [64, 32, 16, 0]


def test_rotation_is_its_own_inverse():
    x = torch.randn(5, 96, dtype=torch.float64)
    assert [largest_block(n) for n in (96, 3072, 3420, 7)] == [16, 256, 4, 0]
    turned = rotate_blocks(x, 16)
    assert not torch.allclose(turned, x)
    torch.testing.assert_close(rotate_blocks(turned, 16), x)
    torch.testing.assert_close(hadamard(64) @ hadamard(64), torch.eye(64))
    for size in (2, 8, 48, 128):
        with pytest.raises(ValueError, match="power of 4"):
            hadamard(size)
    with pytest.raises(ValueError, match="do not divide"):
        rotate_blocks(x, 64)


@pytest.mark.parametrize(
    ("size", "digest"),
    [(16, "9b46fb3c57a096bd"), (64, "42759176f7fc530e"), (256, "de75fba5a830070a")],
)
def test_rotation_is_the_one_of_convrot_files(size, digest):
    """The pattern of signs that ComfyUI's kernels have, by its sha256; being orthogonal would not be enough."""
    signs = (hadamard(size) * size**0.5).to(torch.int8).view(torch.uint8).flatten().tolist()
    assert hashlib.sha256(bytes(signs)).hexdigest().startswith(digest)


def test_swap_takes_every_linear():
    net = nn.Sequential(nn.Linear(32, 32), nn.SiLU(), Int8Linear.from_dense(torch.randn(32, 32)))
    assert swap(net, LINEARS, lambda path, old: nn.Identity()) == 2
    assert isinstance(net[1], nn.SiLU)
    assert not any(isinstance(part, PackedLinear) for part in net.modules())
