"""What happens to rows between two products: kernels beside their twins, and twins beside what they stand for."""

from __future__ import annotations

import pytest
import torch

from lanting.kernels.gpu import rows, twins
from lanting.kernels.gpu.here import available
from lanting.kernels.gpu.rows import Gated
from lanting.kernels.gpu.twins import FP8, Codes, Sums
from lanting.nn.mmdit import RMSNorm
from lanting.nn.rope import rotate
from lanting.nn.rotate import rotate_blocks

FORMS = [None, torch.int8, FP8]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
STEP = {torch.float32: 2e-6, torch.bfloat16: 0.01, torch.float16: 0.0012}  # one rounding, relative


def near(found, wanted, dtype=torch.float32):
    """As close as one rounding to `dtype` lets two ways to compute the same be."""
    found, wanted = found.float(), wanted.float()
    assert found.shape == wanted.shape and found.isfinite().all()
    assert ((found - wanted).abs() <= STEP[dtype] * (wanted.abs() + wanted.abs().mean())).all()


def same(found, wanted, dtype):
    """Codes may differ by a step where a value lies next to a tie."""
    if not isinstance(wanted, Codes):
        return near(found, wanted, dtype)
    assert found.shape == wanted.shape and found.data.dtype == wanted.data.dtype
    near(found.scale, wanted.scale)
    apart = (found.values() - wanted.values()).abs()
    step = wanted.scale.unflatten(0, wanted.shape) if wanted.data.dtype == torch.int8 else wanted.values().abs() / 7
    assert (apart <= step * 1.01 + 1e-6).all() and (apart > 1e-6).float().mean() < 0.02


def fill_with_nan(monkeypatch):
    """What kernels write to is not clean."""

    def dirty(*size, dtype=None, device=None):
        made = real(*size, dtype=dtype, device=device)
        return made.fill_(float("nan")) if made.is_floating_point() and made.dtype != FP8 else made.zero_()

    real = torch.empty
    monkeypatch.setattr(torch, "empty", dirty)


def vectors(batch, each, width, dtype, device, count=3):
    """As a modulation makes them: pieces of one tensor."""
    return torch.randn(batch, each, count * width, device=device).to(dtype).mul_(0.3).chunk(count, -1)


@pytest.mark.parametrize("kind", [torch.int8, None])
@pytest.mark.parametrize("turn", [4, 16, 64, 256])
def test_rows_are_rotated_on_their_way(kind, turn, device, monkeypatch):
    """In all three operations, beside the matrix of `nn.rotate`."""
    torch.manual_seed(6)
    x, y = (torch.randn(1, 4, 256 + turn, device=device) for _ in range(2))
    gate, shift, scale = vectors(1, 2, 256 + turn, torch.float32, device)
    plain, form = twins.norm(x, shift, scale, 2, None, 1e-6), (kind, turn)
    assert isinstance(plain, torch.Tensor)
    wanted = rotate_blocks(plain, turn)
    wanted = wanted if kind is None else twins.coded(wanted, kind)
    same(twins.norm(x, shift, scale, 2, form, 1e-6), wanted, torch.float32)
    gelu = rotate_blocks(torch.nn.functional.gelu(y, approximate="tanh"), turn)
    fill_with_nan(monkeypatch)
    same(rows.norm(x, shift, scale, 2, form), wanted, torch.float32)
    same(rows.activate(y, gelu=True, form=form), gelu if kind is None else twins.coded(gelu, kind), torch.float32)
    moved, found = rows.join_norm(torch.zeros_like(x), Gated(x, gate, 2), shift, scale, form)
    assert torch.equal(moved, x)
    same(found, wanted, torch.float32)


def test_kernels_run_here(device):
    assert available(device)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 5, 64, 1), (2, 7, 96, 2), (1, 3, 200, 2)])
def test_norm(form, dtype, shape, device, monkeypatch):
    torch.manual_seed(0)
    batch, n, width, each = shape
    x = (torch.randn(batch, n + 2, width, device=device) * 3 + 1).to(dtype)[:, 1:-1]  # part of a larger one
    shift, scale, _ = vectors(batch, each, width, dtype, device)
    wanted = twins.norm(x, shift, scale, n - 2, form, 1e-6)
    fill_with_nan(monkeypatch)
    same(rows.norm(x, shift, scale, n - 2, form), wanted, dtype)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sum_and_its_norm(form, dtype, device, monkeypatch):
    torch.manual_seed(1)
    base, y = (torch.randn(2, 6, 96, device=device).to(dtype) for _ in range(2))
    gate, shift, scale = vectors(2, 2, 96, dtype, device)
    wanted = twins.joined(base, y, gate, 4)
    normed = twins.norm(wanted, shift, scale, 4, form, 1e-6)
    fill_with_nan(monkeypatch)
    before = base.clone()
    x, found = rows.join_norm(y, Gated(base, gate, 4), shift, scale, form)
    assert torch.equal(base, before)  # somebody may want it
    near(x, wanted, dtype)
    same(found, normed, dtype)


def test_the_twin_of_norm_is_the_block_s_own():
    from lanting.nn import mmdit

    x = torch.randn(2, 6, 32)
    shift, scale, gate = vectors(2, 2, 32, torch.float32, "cpu")
    at = [mmdit.per_token(v, 6, 4) for v in (shift, scale, gate)]
    near(twins.norm(x, shift, scale, 4, None, 1e-6), mmdit.layer_norm(x) * (1 + at[1]) + at[0])
    near(twins.joined(x, x, gate, 4), x + at[2] * x)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["plain", "bias", "gelu", "gate", "all"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_follows_a_product(form, kind, dtype, device, monkeypatch):
    torch.manual_seed(2)
    x, base = (torch.randn(2, 5, 72, device=device).to(dtype) * 3 for _ in range(2))
    (gate,) = vectors(2, 2, 72, dtype, device, 1)
    bias = torch.randn(72, device=device).to(dtype) if kind in ("bias", "all") else None
    given = {"bias": bias, "gelu": kind in ("gelu", "all"), "form": form}
    given["gated"] = Gated(base, gate, 2) if kind in ("gate", "all") else None
    wanted = torch_activate(monkeypatch, x, **given)
    fill_with_nan(monkeypatch)
    same(rows.activate(x, **given), wanted, dtype)


def torch_activate(monkeypatch, *args, **given):
    with monkeypatch.context() as patch:
        patch.setattr(rows, "known", lambda x: False)
        return rows.activate(*args, **given)


@pytest.mark.parametrize("gelu", [False, True])
def test_sums_of_integers_get_their_scales(gelu, device, monkeypatch):
    torch.manual_seed(3)
    sums = torch.randint(-(2**26), 2**26, (6, 40), dtype=torch.int32, device=device)
    row, column = torch.rand(6, 1, device=device) / 2**13, torch.rand(40, device=device) / 2**13
    given = Sums(sums, row, column, torch.randn(40, device=device), (2, 3))
    wanted = torch_activate(monkeypatch, given, gelu=gelu)
    assert wanted.dtype == torch.float32
    joint = torch.full((2, 5, 40), 7.0, device=device)
    near(rows.activate(given, gelu=gelu), wanted)
    near(rows.activate(given, gelu=gelu, out=joint[:, 2:]), wanted)
    assert (joint[:, :2] == 7).all()


def test_results_go_where_they_are_sent(device):
    x = torch.randn(2, 3, 48, device=device)
    wanted = torch.nn.functional.gelu(x, approximate="tanh")
    assert rows.activate(x, gelu=True, out=x) is x
    near(x, wanted)


@pytest.mark.parametrize("form", [torch.int8, FP8])
@pytest.mark.parametrize("width", [16, 100, 3072])
def test_rounding_rows(form, width, device, monkeypatch):
    torch.manual_seed(4)
    x = torch.randn(5, width, device=device) * torch.logspace(-3, 3, 5, device=device)[:, None]
    x[3] = 0
    x[4, 0] = 1e-36
    fill_with_nan(monkeypatch)
    found = rows.quantize(x, form)
    same(found, twins.coded(x, form), torch.float32)
    assert (found.data[3].float() == 0).all() and found.scale[3] == 1
    error = (found.values() - x).norm(dim=-1) / x.norm(dim=-1).clamp(min=1e-30)
    assert error.max() < {torch.int8: 0.02, FP8: 0.04}[form]
    assert (found.data.float().abs().amax(-1)[[0, 1, 2, 4]] == twins.MOST[form]).all()


@pytest.mark.parametrize("form", [torch.int8, FP8])
@pytest.mark.parametrize("bad", ["nan", "inf", "-inf"])
def test_a_bad_number_stays_visible_in_its_row_alone(form, bad, device):
    x = torch.randn(3, 40, device=device)
    x[1, 7] = float(bad)
    for codes in (rows.quantize(x, form), twins.coded(x, form)):
        values = codes.values()
        assert values[1].isnan().all() and values[[0, 2]].isfinite().all()


def test_half_precision_is_clipped_as_the_reference_clips(device):
    base = torch.full((1, 2, 16), 6e4, dtype=torch.float16, device=device)
    gate = torch.ones(1, 1, 16, dtype=torch.float16, device=device)
    gate[..., 3] = float("nan")
    for x in (rows.activate(base, gated=Gated(base, gate)), twins.joined(base, base, gate, 0)):
        assert (x[..., :3] == 65504).all() and x[..., 3].isnan().all()
    x, _ = rows.join_norm(base, Gated(base, gate), gate, gate)
    assert (x[..., :3] == 65504).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 5, 2, 2, 32), (2, 3, 0, 24, 128), (1, 2, 1, 3, 40)])
def test_turns_round_where_the_reference_rounds(dtype, shape, device):
    torch.manual_seed(5)
    batch, tokens, first, heads, width = shape
    q, k = (torch.randn(batch, tokens, heads, width, device=device).to(dtype) for _ in range(2))
    norms = [RMSNorm(width).to(device, dtype) for _ in range(4)]
    for norm in norms:
        torch.nn.init.normal_(norm.weight, 1, 0.2)
    angles = torch.randn(tokens, width // 2, device=device)
    rope = (angles.cos(), angles.sin())
    with torch.no_grad():
        wanted = [
            rotate(torch.cat([norms[i](x[:, :first]), norms[i + 2](x[:, first:])], 1), *rope)
            for i, x in enumerate((q, k))
        ]
        weights = tuple(norm.weight for norm in norms)
        twin = [q.clone(), k.clone()]
        for i, x in enumerate(twin):
            twins.turn(x, weights[i], weights[i + 2], rope, first, 1e-6)
        rows.turn(q, k, weights, rope, first, 1e-6)
    for found, own, want in zip((q, k), twin, wanted, strict=True):
        assert torch.equal(own, want)
        if dtype == torch.float32:
            near(found, want)
        else:  # a sum in another order now and then rounds another way
            assert (found != want).float().mean() < 0.02
            near(found, want, dtype)


def test_what_kernels_do_not_know_is_the_twins_work(device, monkeypatch):
    monkeypatch.setattr(rows, "WIDEST", 32)
    x = torch.randn(2, 3, 48, device=device)
    assert not rows.known(x) and rows.known(x[..., :32])
    near(rows.activate(x, gelu=True), torch.nn.functional.gelu(x, approximate="tanh"))
