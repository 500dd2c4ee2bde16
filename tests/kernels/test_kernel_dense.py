"""Products of plain weights, for instruction sets that have them: what float64 says, but for the order of sums.

Where a processor multiplies bfloat16, rows are rounded to that; elsewhere both are float32.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernel_cases import SETS, random, using
from lanting.kernels import calls, library


def size_of(name: str) -> int:
    """Bytes of a number of dense rows, 0 where there are none."""
    with using(name):
        return library.dense_bytes()


DENSE = {name: size for name in SETS if (size := size_of(name))}
FLOATS = [name for name, size in DENSE.items() if size == 4]


@pytest.fixture(params=DENSE)
def dense(request: pytest.FixtureRequest) -> Iterator[str]:
    """The instruction set in use, one of those that have them."""
    with using(request.param):
        yield request.param


@pytest.fixture(params=FLOATS)
def floats(request: pytest.FixtureRequest) -> Iterator[str]:
    """The instruction set in use, one of those that multiply in float32."""
    with using(request.param):
        yield request.param


def weight(rows: int, columns: int, dtype: torch.dtype = torch.bfloat16) -> tuple[calls.Packed, Tensor]:
    values = random(rows, columns, seed=rows, dtype=dtype)
    found = calls.dense(values, dtype)
    assert found is not None
    return found, values.double()


def laid(x: Tensor) -> Tensor:
    """Rows as the instruction set in use lays them out."""
    return x if library.dense_bytes() == 4 else x.bfloat16().float()


def assert_near(out: Tensor, wanted: Tensor, x: Tensor, values: Tensor) -> None:
    """Within a few roundings of float32 of the sum of all sizes."""
    size = F.linear(x.double().abs(), values.abs()) + wanted.abs()
    assert ((out.double() - wanted).abs() <= 1e-6 * size + 1e-30).all()


SHAPES = (  # rows, W's rows, columns; 1024 or 4096 columns are laid out at once, and some megabytes of rows pass by
    *((1, 1, 1), (6, 9, 17), (13, 33, 31), (14, 64, 96), (15, 45, 224), (29, 32, 65)),
    *((15, 40, 4200), (3, 33, 8192), (800, 33, 4200), (27000, 5, 100), (49, 300, 4400)),
)


@pytest.mark.parametrize(("rows", "outputs", "columns"), SHAPES)
def test_products(dense, rows, outputs, columns):
    packed, values = weight(outputs, columns)
    x, bias = random(rows, columns, dtype=torch.bfloat16), random(outputs, seed=1)
    codes, out = calls.quantize(x, dense=True), torch.empty(rows, outputs)
    assert_near(calls.product(codes, packed, out, bias), F.linear(x.double(), values, bias.double()), x, values)


@pytest.mark.parametrize(("rows", "outputs", "columns"), SHAPES)
def test_products_of_float32(floats, rows, outputs, columns):
    """Of neither side anything is rounded, and rows in bfloat16 meet the same weight."""
    packed, values = weight(outputs, columns, torch.float32)
    x, bias = random(rows, columns), random(outputs, seed=1)
    out = calls.product(calls.quantize(x, dense=True), packed, torch.empty(rows, outputs), bias)
    assert_near(out, F.linear(x.double(), values, bias.double()), x, values)
    narrow = calls.quantize(x.bfloat16(), dense=True)
    again = calls.product(narrow, packed, torch.empty(rows, outputs), bias)
    assert_near(again, F.linear(x.bfloat16().double(), values, bias.double()), x, values)


def test_a_row_is_the_same_beside_others(floats):
    """So that requests of different people may be drawn together."""
    packed, _ = weight(45, 1500)
    x = random(23, 1500)
    whole = calls.product(calls.quantize(x, dense=True), packed, torch.empty(23, 45))
    for row in range(23):
        alone = calls.product(calls.quantize(x[row : row + 1], dense=True), packed, torch.empty(1, 45))
        assert torch.equal(alone[0], whole[row])


def test_results_end_as_they_are_told_to(dense):
    """GELU; a gate onto what is there, for the first rows and for the rest, in a part of a larger tensor; bfloat16."""
    packed, values = weight(45, 96)
    x, bias = random(22, 96, dtype=torch.bfloat16), random(45, seed=1)
    codes = calls.quantize(x, dense=True)
    product = F.linear(x.double(), values, bias.double())
    out = calls.product(codes, packed, torch.empty(22, 45), bias, gelu=True)
    torch.testing.assert_close(out.double(), F.gelu(product, approximate="tanh"), rtol=1e-5, atol=1e-5)
    narrow = calls.product(codes, packed, torch.empty(22, 45, dtype=torch.bfloat16), bias, gelu=True)
    assert torch.equal(narrow, out.bfloat16())
    joint, gate = torch.ones(2, 15, 50), random(2, 2, 45, seed=2)
    calls.product(codes, packed, joint[:, 3:14, :45], bias, gate=gate, split=4)
    rows = torch.cat([gate[:, :1].expand(-1, 4, -1), gate[:, 1:].expand(-1, 7, -1)], 1).double()
    wanted = 1 + rows * product.view(2, 11, 45)
    torch.testing.assert_close(joint[:, 3:14, :45].double(), wanted, rtol=1e-5, atol=1e-4)
    assert (joint[:, :3] == 1).all()
    assert (joint[:, 14:] == 1).all()
    assert (joint[:, :, 45:] == 1).all()


@pytest.mark.parametrize("columns", [96, 65])
def test_rows_are_laid_out(dense, columns):
    """Plain ones and normed ones: what ones on a diagonal make of them."""
    ones = calls.dense(torch.eye(columns, dtype=torch.bfloat16))
    assert ones is not None
    x, vectors = random(2, 15, columns), random(1, 1, columns, seed=1)
    out = torch.empty(30, columns)
    calls.product(calls.quantize(x.flatten(0, 1), dense=True), ones, out)
    assert torch.equal(out, laid(x.flatten(0, 1)))
    normed = calls.norm(x, vectors, vectors, rounded=False)
    rounded = calls.norm(x, vectors, vectors, rounded=True, dense=True)
    assert isinstance(normed, Tensor)
    assert isinstance(rounded, calls.Rounded)
    assert torch.equal(calls.product(rounded, ones, out), laid(normed.flatten(0, 1)))


def test_what_is_no_number_shows_in_its_row(dense):
    packed, _ = weight(33, 64)
    x = random(15, 64, dtype=torch.bfloat16)
    x[4, 60] = torch.nan
    out = calls.product(calls.quantize(x, dense=True), packed, torch.empty(15, 33))
    assert torch.equal(out.isnan().all(1), torch.arange(15) == 4)
    assert out.isnan().any(1).sum() == 1


def test_other_sets_do_not_take_them(isa):
    found = calls.dense(torch.ones(4, 64, dtype=torch.bfloat16))
    assert (found is not None) == (isa in DENSE)
    both = torch.ones(4, 64), torch.float32
    assert (calls.dense(*both) is not None) == (isa in FLOATS)
    assert (calls.dense(both[0]) is not None) == (isa in FLOATS)
    assert calls.dense(torch.ones(4, 64, dtype=torch.float16)) is None
    assert calls.dense(torch.ones(64, 4, dtype=torch.bfloat16).t()) is None


def test_rows_and_weights_of_different_types_do_not_meet(dense):
    packed, _ = weight(32, 64)
    with pytest.raises(ValueError, match="do not meet"):
        calls.product(calls.quantize(random(3, 64)), packed, torch.empty(3, 32))
