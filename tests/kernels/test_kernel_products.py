"""Products of rounded rows with packed weights are exact in integers, and end as they are told to."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernel_cases import KINDS, SETS, codes_of, columns_of, exact, random, using, weight
from lanting.kernels import calls
from lanting.kernels import library as lib

GATES = (
    *((1, (1, 1), 0), (3, (1, 1), 0), (3, (3, 1), 0)),
    *((1, (1, 2), 4), (3, (3, 2), 0), (3, (3, 2), 5), (3, (3, 2), 11)),
)


def assert_near(out: Tensor, wanted: Tensor, size: Tensor | None = None) -> None:
    """Within a millionth of `size`, or of what is wanted."""
    size = wanted.abs() if size is None else size
    assert ((out.double() - wanted).abs() <= 1e-6 * size + 1e-30).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "columns"), [(1, 96), (13, 224), (14, 64), (15, 1), (29, 65)])
def test_rows_are_rounded_by_their_largest(isa, dtype, rows, columns):
    x = random(rows, columns, dtype=dtype) * 10.0 ** random(rows, 1).to(dtype)
    x[rows // 2] = 0
    codes = calls.quantize(x)
    found = codes_of(codes)
    assert torch.equal(codes.scale, x.abs().amax(1).float() / 127)
    assert torch.equal(codes.sum.long(), found.sum(1))
    assert found.abs().amax(1).eq((codes.scale > 0) * 127).all()
    off = found * codes.scale.double()[:, None] - x.double()
    assert (off.abs() <= 0.5001 * codes.scale[:, None]).all()


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(("rows", "outputs", "columns"), [(1, 1, 1), (13, 33, 96), (14, 64, 224), (31, 70, 300)])
def test_products_are_exact(isa, name, rows, outputs, columns):
    columns = columns_of(name, columns)
    packed, values = weight(name, outputs, columns)
    x, bias = random(rows, columns), random(outputs, seed=1)
    codes, out = calls.quantize(x), torch.empty(rows, outputs)
    calls.product(codes, packed, out)
    assert_near(out, exact(codes, packed))
    wanted = exact(codes, packed, bias)
    assert_near(calls.product(codes, packed, out, bias), wanted, exact(codes, packed).abs() + bias.abs())
    error = (out.double() - F.linear(x, values, bias).double()).norm() / (wanted.norm() + 1e-30)
    assert error < 0.03  # two roundings to 8 bits


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 40),
    outputs=st.integers(1, 70),
    columns=st.integers(1, 200),
    name=st.sampled_from(["int8", "int8 of 16", "int4 of 16", "int4 of 32", "Q4_0", "Q8_0"]),
    isa=st.sampled_from(SETS or ["none"]),
)
def test_products_of_any_shape(rows, outputs, columns, name, isa):
    columns = columns_of(name, columns)
    with using(isa):
        packed, _ = weight(name, outputs, columns)
        codes, out = calls.quantize(random(rows, columns)), torch.empty(rows, outputs)
        assert_near(calls.product(codes, packed, out), exact(codes, packed))


@pytest.mark.parametrize("name", ["int8", "int4 of 64", "Q6_K"])
def test_long_rows_and_many_outputs(isa, name):
    """Where tiles of a weight are made together, or a row in parts, sums are the same integers."""
    columns = columns_of(name, 8704)
    packed, _ = weight(name, 300, columns)
    known = (random(49, columns) * 40).round().clamp(-127, 127)
    known[:, 5000] = 127  # steps of 1/4, then, so that codes are known
    codes, out = calls.quantize(known / 4), torch.empty(49, 300)
    assert (codes.scale == 0.25).all() and torch.equal(codes.sum.float(), known.sum(1))
    wanted = exact(codes, packed, codes=known)
    for threads in (1, 3):
        lib.use_threads(threads)
        assert_near(calls.product(codes, packed, out), wanted)


def test_more_rows_than_a_block_holds(isa):
    """Activations beyond a few megabytes pass by in blocks, which changes nothing."""
    packed, _ = weight("Q4_K", 33, 256)
    x, out, parts = random(26000, 256), torch.empty(26000, 33), torch.empty(26000, 33)
    calls.product(calls.quantize(x), packed, out)
    for some, to in zip(x.split(5000), parts.split(5000), strict=True):
        calls.product(calls.quantize(some), packed, to)
    assert torch.equal(out, parts)


def test_the_largest_sums_fit(isa):
    """Every factor as large as it can be, over a longer row than any model has."""
    columns = 1 << 16
    packed = calls.packed("int8", torch.full((2, columns), 127, dtype=torch.int8), torch.full((2, 1), 1 / 127), columns)
    assert packed is not None
    codes, out = calls.quantize(torch.tensor([[1.0], [-1.0]]).expand(2, columns).contiguous()), torch.empty(2, 2)
    calls.product(codes, packed, out)
    torch.testing.assert_close(out, torch.tensor([[1.0, 1.0], [-1.0, -1.0]]) * columns)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_go_into_a_joint_buffer(isa, dtype):
    """Two streams side by side, as attention wants them; between and behind them nothing changes."""
    packed, _ = weight("int4 of 32", 45, 96)
    x = random(2, 20, 96, dtype=dtype)[:, 3:17]  # rows of a larger tensor, too
    joint = torch.full((2, 20, 50), 7, dtype=dtype)
    calls.product(calls.quantize(x), packed, joint[:, 5:19, :45])
    codes = calls.quantize(x.flatten(0, 1))
    wanted = exact(codes, packed).view(2, 14, 45)
    assert (joint[:, :5] == 7).all()
    assert (joint[:, 19:] == 7).all()
    assert (joint[:, :, 45:] == 7).all()
    if dtype == torch.float32:
        assert_near(joint[:, 5:19, :45], wanted)
    else:
        torch.testing.assert_close(joint[:, 5:19, :45].double(), wanted, rtol=2**-8, atol=0)


def test_bfloat16_is_rounded_to_the_nearest(isa):
    """As torch rounds the float32 result, ties included; a GELU is as near as makes no difference but beside ties."""
    packed, _ = weight("Q6_K", 45, 256)
    codes = calls.quantize(random(17, 256))
    wide, narrow = torch.empty(17, 45), torch.empty(17, 45, dtype=torch.bfloat16)
    for gelu in (False, True):
        calls.product(codes, packed, wide, gelu=gelu)
        calls.product(codes, packed, narrow, gelu=gelu)
        other = narrow != wide.bfloat16()
        assert other.float().mean() <= (0.005 if gelu else 0)
        torch.testing.assert_close(narrow.float(), wide, rtol=2**-8, atol=0)


def test_gelu(isa):
    packed, _ = weight("int8", 70, 224)
    codes, bias, out = calls.quantize(random(15, 224)), random(70), torch.empty(15, 70)
    calls.product(codes, packed, out, bias, gelu=True)
    wanted = F.gelu(exact(codes, packed, bias), approximate="tanh")
    torch.testing.assert_close(out.double(), wanted, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("items", "vectors", "split"), GATES)
def test_gates_add_to_what_is_there(isa, dtype, items, vectors, split):
    """One vector for all, one an item, or two an item: for its first rows and for the rest."""
    packed, _ = weight("Q8_0", 45, 96)
    codes, bias = calls.quantize(random(items * 11, 96)), random(45)
    before, gate = random(items, 11, 45, seed=2, dtype=dtype), random(*vectors, 45, seed=3)
    out = calls.product(codes, packed, before.clone(), bias, gate=gate, split=split)
    each = gate.double().expand(items, -1, -1)
    rows = each[:, :1].expand(-1, 11, -1).clone()
    rows[:, split:] = each[:, -1:]
    product = exact(codes, packed, bias).view(items, 11, 45)
    wanted = before.double() + rows * product
    if dtype == torch.float32:
        assert_near(out, wanted, before.abs() + (rows * product).abs())
    else:
        torch.testing.assert_close(out.double(), wanted, rtol=2**-8, atol=1e-5)


def test_two_vectors_for_rows_of_one_item(isa):
    """A matrix is one item."""
    packed, _ = weight("int8", 33, 64)
    codes, gate = calls.quantize(random(9, 64)), random(1, 2, 33, seed=3)
    out = calls.product(codes, packed, torch.zeros(9, 33), gate=gate, split=4)
    rows = torch.cat([gate[0, :1].expand(4, -1), gate[0, 1:].expand(5, -1)]).double()
    assert_near(out, exact(codes, packed) * rows)


@pytest.mark.parametrize("spoilt", [torch.nan, torch.inf, -torch.inf])
def test_rows_that_are_no_numbers_show(isa, spoilt):
    """In their own row of the result, and nowhere else."""
    packed, _ = weight("Q4_0", 32, 64)
    x, out = random(15, 64), torch.empty(15, 32)
    x[4, 60] = spoilt
    calls.product(calls.quantize(x), packed, out)
    assert not torch.isfinite(out[4, :-1]).any()
    assert torch.isfinite(out[torch.arange(15) != 4]).all()


def test_the_smallest_numbers_are_harmless(isa):
    packed, _ = weight("int8", 32, 64)
    out = calls.product(calls.quantize(torch.full((1, 64), 1e-42)), packed, torch.empty(1, 32))
    assert out.abs().max() < 1e-30


def test_shapes_that_do_not_fit_are_refused():
    packed, _ = weight("int8", 32, 64)
    codes = calls.quantize(random(15, 64))
    good = torch.empty(15, 32)
    for out in (torch.empty(14, 32), torch.empty(15, 31), torch.empty(15, 32, dtype=torch.float16), good.t()):
        with pytest.raises(ValueError, match=r"columns|kernels take"):
            calls.product(codes, packed, out)
    with pytest.raises(ValueError, match="columns meet"):
        calls.product(calls.quantize(random(15, 65)), packed, good)
    for gate in (torch.ones(2, 1, 32), torch.ones(1, 3, 32), torch.ones(1, 1, 31), torch.ones(1, 1, 32).double()):
        with pytest.raises(ValueError, match="vectors"):
            calls.product(codes, packed, good, gate=gate)
    with pytest.raises(ValueError, match="two vectors"):
        calls.product(codes, packed, good.view(3, 5, 32), gate=torch.ones(1, 2, 32))
