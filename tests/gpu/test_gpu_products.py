"""Products in 8 and 4 bits beside what they mean in floats."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

from lanting.kernels.gpu import here, products, twins
from lanting.kernels.gpu.here import Tuner
from lanting.kernels.gpu.products import Weight, four_bit, four_by_eight, product
from lanting.kernels.gpu.rows import activate
from lanting.kernels.gpu.twins import FP8, Sums
from lanting.nn.linears import Int4Linear

SHAPES = [(5, 32, 16), (33, 96, 72), (70, 80, 264)]  # rows, depth, columns: none fills its tiles


def error(found, wanted):
    return float((found.float() - wanted.float()).norm() / wanted.float().norm())


def operands(shape, form, device):
    torch.manual_seed(0)
    rows, depth, columns = shape
    x, w = torch.randn(rows, depth, device=device), torch.randn(columns, depth, device=device)
    codes, other = twins.coded(x, form), twins.coded(w, form)
    bias = torch.randn(columns, device=device)
    return codes, Weight(other.data, other.scale.flatten()), bias, torch.nn.functional.linear(x, w, bias)


def plain(codes, weight, bias):
    """By the definition, in float64."""
    x, w = codes.data.double() * codes.scale, weight.data.double() * weight.scale[:, None]
    return x @ w.T + (0 if bias is None else bias)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("form", [torch.int8, FP8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_eight_bits(shape, form, dtype, device):
    codes, weight, bias, exact = operands(shape, form, device)
    wanted = plain(codes, weight, bias)
    allowed = 0.003 if dtype == torch.bfloat16 else 5e-3 if device.type == "cuda" and form == FP8 else 1e-6
    found = product(codes, weight, bias, dtype)
    found = activate(found, dtype=dtype) if isinstance(found, Sums) else found
    assert found.dtype == dtype and error(found, wanted) < allowed
    assert 1e-3 < error(found, exact) < (0.015 if form == torch.int8 else 0.05)


@pytest.mark.parametrize("tiles", products.EIGHT)
@pytest.mark.parametrize("form", [torch.int8, FP8])
def test_every_tile(tiles, form, device):
    codes, weight, bias, _ = operands((40, 48, 24), form, device)
    out = torch.full((40, 40), float("nan"), device=device)
    try:
        products.eight_bit(codes, weight, bias, out[:, 8:32], tiles)
    except Exception as problem:  # a GPU with less shared memory: the tuner leaves such tiles out
        assert device.type == "cuda" and "resource" in repr(problem).lower()
        return
    allowed = 5e-3 if device.type == "cuda" and form == FP8 else 1e-6
    assert error(out[:, 8:32], plain(codes, weight, bias)) < allowed
    assert out[:, :8].isnan().all() and out[:, 32:].isnan().all()


@pytest.mark.parametrize("form", [torch.int8, FP8])
def test_twins(form):
    codes, weight, bias, _ = operands((33, 96, 72), form, "cpu")
    found = twins.product(twins.coded(codes.values(), form), weight.data, weight.scale) + bias
    assert error(found, plain(codes, weight, bias)) < 1e-6


def test_integers_are_exact(device):
    """Beyond what float32 can count: nothing is lost before the scales."""
    codes = twins.Codes(
        torch.full((20, 4096), 127, dtype=torch.int8, device=device), torch.ones(20, 1, device=device), (20,)
    )
    codes.data[:, 0] = 126
    weight = Weight(torch.full((16, 4096), 127, dtype=torch.int8, device=device), torch.ones(16, device=device))
    found = product(codes, weight, None, torch.float32)
    found = activate(found) if isinstance(found, Sums) else found
    assert (found == torch.tensor(127 * 127 * 4096 - 127, dtype=torch.float32)).all()


def test_a_batch_keeps_its_shape(device):
    codes = twins.coded(torch.randn(2, 9, 32, device=device), torch.int8)
    weight = twins.coded(torch.randn(16, 32, device=device), torch.int8)
    found = product(codes, Weight(weight.data, weight.scale.flatten()), None, torch.float32)
    assert isinstance(found, Sums) or found.shape == (2, 9, 16)


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("rows", [7, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_four_bits(group, rows, dtype, device, monkeypatch):
    torch.manual_seed(1)
    linear = Int4Linear.from_dense(torch.randn(72, 384), torch.randn(72), group=group).to(device)
    x = torch.randn(2, rows, 384, device=device).to(dtype)
    weight = Weight(linear.weight, linear.weight_scale)
    assert weight.group == group
    exact = x.double() @ linear.values(dtype).double().T + linear.bias
    allowed = {torch.float32: 2e-6, torch.float16: 5e-4, torch.bfloat16: 0.004}[dtype]
    assert error(four_bit(x, weight, linear.bias), exact) < allowed
    monkeypatch.setattr(products, "WIDE", 8)  # expanded first
    assert error(four_bit(x, weight, linear.bias), exact) < allowed
    assert torch.equal(products.expanded(weight, dtype), linear.values(dtype))
    assert torch.equal(twins.expand(weight.data, weight.scale, dtype), linear.values(dtype))


@pytest.mark.parametrize("tiles", products.FOUR)
def test_every_tile_of_four_bits(tiles, device, monkeypatch):
    monkeypatch.setattr(products, "FOUR", (tiles,))
    monkeypatch.setattr(products, "rows_about", lambda rows: 1024)
    linear = Int4Linear.from_dense(torch.randn(72, 192), group=64).to(device)
    x = torch.randn(37, 192, device=device)
    found = four_bit(x, Weight(linear.weight, linear.weight_scale))
    assert error(found, x.double() @ linear.values(torch.float32).double().T) < 2e-6


@pytest.mark.parametrize("group", [64, 128])
@pytest.mark.parametrize("rows", [9, 70])
def test_four_by_eight(group, rows, device, monkeypatch):
    torch.manual_seed(2)
    linear = Int4Linear.from_dense(torch.randn(136, 256), torch.randn(136), group=group).to(device)
    x = torch.randn(rows, 256, device=device)
    codes, weight = twins.coded(x, torch.int8), Weight(linear.weight, linear.weight_scale)
    exact = codes.values().double() @ linear.values(torch.float32).double().T + linear.bias
    assert error(four_by_eight(codes, weight, linear.bias, torch.float32), exact) < 1e-6
    monkeypatch.setattr(products, "available", lambda device: False)
    assert error(four_by_eight(codes, weight, linear.bias, torch.float32), exact) < 2e-6


def test_without_triton_torch_multiplies(device, monkeypatch):
    monkeypatch.setattr(products, "available", lambda device: False)
    for form in (torch.int8, FP8):
        codes, weight, bias, _ = operands((33, 96, 72), form, device)
        found = product(codes, weight, bias, torch.float32)
        found = activate(found) if isinstance(found, Sums) else found
        assert error(found, plain(codes, weight, bias)) < 5e-3


def test_the_fastest_way_is_remembered(monkeypatch):
    tuner, calls = Tuner(), []
    times = {"slow": 3.0, "broken": float("inf"), "quick": 1.0}

    def way(name):
        def run():
            calls.append(name)
            return name

        run.name = name
        return run

    monkeypatch.setattr(tuner, "time", lambda way: times[way.name])
    ways, gpu = [way(name) for name in times], torch.device("cuda", 0)
    assert tuner("a shape", ways, torch.device("cpu")) == "slow"  # nothing is timed on a CPU
    assert tuner("a shape", ways, gpu) == "quick" and tuner.picks == {"a shape": 2}
    assert tuner("a shape", ways, gpu) == "quick" and calls == ["slow", "quick", "quick"]
    monkeypatch.setattr("lanting.kernels.gpu.here.recording", lambda: True)
    assert tuner("another", ways, gpu) == "slow"  # no time while a graph is recorded
    assert tuner("a shape", ways, gpu) == "quick"


class Stream:
    """Notes who waits for whom."""

    def __init__(self, name, log):
        self.name, self.log = name, log

    def wait_stream(self, other):
        self.log.append((self.name, other.name))


def test_work_runs_beside_only_while_a_graph_is_recorded(monkeypatch):
    log, gpu = [], torch.device("cuda", 0)
    main, side = Stream("main", log), Stream("side", log)
    monkeypatch.setattr(here, "second", lambda device: side)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: main)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext(log.append(stream.name)))
    for device, recording, wanted in (
        (gpu, True, [("side", "main"), "side", ("main", "side")]),
        (gpu, False, []),
        (torch.device("cpu"), True, []),
    ):
        log.clear()
        monkeypatch.setattr(here, "recording", lambda recording=recording: recording)
        with here.beside(device):
            pass
        here.meet(device)
        assert log == wanted


def plainly(codes, weight, bias, dtype, out):
    made = plain(codes, weight, bias).to(dtype)
    return made if out is None else out.copy_(made)


def test_shapes_that_torch_refuses_are_asked_about_once(monkeypatch, device):
    codes, weight, bias, _ = operands((32, 64, 48), FP8, device)
    wanted, asked = plain(codes, weight, bias), []

    def refuses(number, problem=RuntimeError):
        def way(*_):
            asked.append(number)
            raise problem("CUBLAS_STATUS_NOT_SUPPORTED")

        return way

    monkeypatch.setattr(products, "floats_by_torch", lambda device, dtype: True)
    monkeypatch.setattr(products, "refused", lambda kept=set(): kept)
    monkeypatch.setattr(products, "BY_TORCH", (refuses(0), plainly))
    for _ in range(2):
        assert error(product(codes, weight, bias), wanted) < 0.01
    assert asked == [0]
    monkeypatch.setattr(products, "BY_TORCH", (refuses(0), refuses(1, ValueError), refuses(2)))
    for _ in range(2):
        assert error(product(codes, weight, bias), wanted) < 0.01  # Triton's
    assert asked == [0, 1, 2]


class Torch:
    """Takes what cuBLASLt takes of 8-bit floats, and asserts the rest."""

    def __init__(self, refuses=()):
        self.refuses, self.seen = refuses, []

    def __call__(self, a, b, *, scale_a, scale_b, out_dtype, **given):
        bias, out = given.get("bias"), given.get("out")
        (rows, depth), columns = a.shape, b.shape[1]
        assert a.is_contiguous() and b.T.is_contiguous() and depth % 16 == 0 and columns % 16 == 0
        assert (scale_a.shape, scale_b.shape) == ((rows, 1), (1, columns))
        assert all(s.dtype == torch.float32 and s.is_contiguous() for s in (scale_a, scale_b))
        assert all(x.data_ptr() % 16 == 0 for x in (a, b, scale_a, scale_b, *(x for x in (bias, out) if x is not None)))
        assert bias is None or (bias.dtype == out_dtype and bias.is_contiguous())
        assert out is None or (out.shape == (rows, columns) and out.dtype == out_dtype and out.is_contiguous())
        now = ("bias" if bias is not None else "bare", "fast" if given["use_fast_accum"] else "exact")
        self.seen.append(now)
        if now in self.refuses:
            raise RuntimeError("CUBLAS_STATUS_NOT_SUPPORTED")
        made = (a.float() @ b.float()) * scale_a * scale_b
        made = (made if bias is None else made + bias.float()).to(out_dtype)
        return made if out is None else out.copy_(made)


@pytest.mark.parametrize("rows", [1, 10, 33])
@pytest.mark.parametrize("refuses", [(), (("bias", "fast"),), (("bias", "fast"), ("bare", "fast"))])
def test_what_torch_is_given_is_what_it_takes(rows, refuses, device, monkeypatch):
    """Few rows, places in the middle of a larger tensor, a scale for all, and every way that may be refused."""
    codes, weight, bias, _ = operands((rows, 64, 48), FP8, device)
    stand_in = Torch(refuses)
    monkeypatch.setattr(torch, "_scaled_mm", stand_in)
    monkeypatch.setattr(products, "floats_by_torch", lambda device, dtype: True)
    monkeypatch.setattr(products, "refused", lambda kept=set(): kept)
    wanted, joint = plain(codes, weight, bias), torch.full((rows + 3, 48), 7.0, dtype=torch.bfloat16, device=device)
    for place in (None, joint[3:], joint.new_zeros(rows, 96)[:, :48]):
        found = product(codes, weight, bias, torch.bfloat16, place)
        assert isinstance(found, torch.Tensor) and error(found.flatten(0, -2), wanted) < 0.01
        assert place is None or found.data_ptr() == place.data_ptr()
    assert (joint[:3] == 7).all() and stand_in.seen[: 1 + len(refuses)][-1] not in refuses
    assert len(stand_in.seen) == 3 + len(refuses)  # refused once, and never asked again
    for one in (True, False):  # as files have them: one scale for all, a weight that is a view
        other = Weight(weight.data if one else weight.data.T.contiguous().T, weight.scale[:1].expand(48))
        assert error(product(codes, other, None), plain(codes, other, None)) < 0.01


def test_tiles_that_do_not_fit_are_left_out(monkeypatch, device):
    codes, weight, bias, _ = operands((256, 64, 48), FP8, device)

    class OutOfResources(Exception):
        pass

    tried, kept = [], set()

    def multiply(codes, weight, bias, out, tiles):
        tried.append(tiles)
        if tiles[1] > 128:
            raise OutOfResources("shared memory")
        return plainly(codes, weight, bias, out.dtype, out)

    monkeypatch.setattr(products, "eight_bit", multiply)
    monkeypatch.setattr(products, "refused", lambda: kept)
    for _ in range(2):
        assert error(product(codes, weight, bias), plain(codes, weight, bias)) < 0.01
    assert tried == [products.EIGHT[0], products.EIGHT[1], products.EIGHT[1]]


def test_what_refuses_in_a_recording_ends_it(monkeypatch, device):
    codes, weight, bias, _ = operands((16, 64, 48), FP8, device)

    def refuses(*_):
        raise RuntimeError("no")

    monkeypatch.setattr(products, "floats_by_torch", lambda device, dtype: True)
    monkeypatch.setattr(products, "refused", lambda: set())
    monkeypatch.setattr(products, "BY_TORCH", (refuses,))
    monkeypatch.setattr(products, "recording", lambda: True)
    with pytest.raises(RuntimeError, match="no"):
        product(codes, weight, bias)
