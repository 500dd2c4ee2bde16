"""What happens to rows between products: norms, rotary turns, activations, each against torch in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernel_cases import codes_of, random
from lanting.kernels import calls

DTYPES = [torch.float32, torch.bfloat16]


def assert_same(out: Tensor, wanted: Tensor, atol: float = 3e-6) -> None:
    """`wanted` (float64) in the dtype of `out`."""
    rtol = 3e-6 if out.dtype == torch.float32 else 2**-8
    torch.testing.assert_close(out.double(), wanted, rtol=rtol, atol=atol)


def normed(x: Tensor, shift: Tensor, scale: Tensor, split: int) -> Tensor:
    """Layer norm and modulation in float64; vectors (items or 1, 1 or 2, columns)."""
    items, rows, columns = x.shape
    y = F.layer_norm(x.double(), (columns,), eps=1e-6)
    for_rows = []
    for vectors in (scale, shift):
        each = vectors.double().expand(items, -1, -1)
        chosen = each[:, :1].expand(-1, rows, -1).clone()
        chosen[:, split:] = each[:, -1:]
        for_rows.append(chosen)
    return y * (1 + for_rows[0]) + for_rows[1]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("items", "rows", "columns", "vectors", "split"),
    [
        (1, 1, 64, (1, 1), 0),
        (2, 13, 96, (1, 1), 0),
        (2, 15, 224, (2, 1), 0),
        (2, 7, 65, (2, 2), 3),
        (1, 9, 3, (1, 2), 9),
    ],
)
def test_norm(isa, dtype, items, rows, columns, vectors, split):
    """Also of rows that are part of a larger tensor, and rounded to int8 at once."""
    x = random(items, rows + 4, columns, dtype=dtype)[:, 2:-2] * 3 + 1
    shift, scale = random(*vectors, columns, seed=1), random(*vectors, columns, seed=2)
    wanted = normed(x, shift, scale, split)
    out = calls.norm(x, shift, scale, split, rounded=False)
    assert isinstance(out, Tensor)
    assert out.shape == x.shape
    assert_same(out, wanted, atol=1e-5)
    codes = calls.norm(x, shift, scale, split, rounded=True)
    assert isinstance(codes, calls.Rounded)
    step = codes.scale.double()[:, None]
    assert ((codes_of(codes) * step - wanted.flatten(0, 1)).abs() <= 0.501 * step).all()
    torch.testing.assert_close(codes.scale.double(), wanted.flatten(0, 1).abs().amax(1) / 127, rtol=1e-5, atol=0)


def test_norm_of_rows_that_are_all_alike(isa):
    """Nothing is left of them but the shift."""
    out = calls.norm(torch.full((1, 3, 64), 5.0), torch.full((1, 1, 64), 2.0), torch.ones(1, 1, 64), rounded=False)
    assert torch.equal(out, torch.full((1, 3, 64), 2.0))


def turned(x: Tensor, first: Tensor, rest: Tensor, rope: tuple[Tensor, Tensor], split: int) -> Tensor:
    """RMS norm with the weights of the first tokens and of the rest, then a turn of neighbours as complex numbers."""
    y = x.double() * torch.rsqrt(x.double().square().mean(-1, keepdim=True) + 1e-6)
    y = torch.cat([y[:, :split] * first.double(), y[:, split:] * rest.double()], 1)
    angle = torch.complex(rope[0].double(), rope[1].double())[:, None]
    pairs = torch.view_as_complex(y.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * angle).flatten(-2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("items", "tokens", "heads", "width", "first"),
    [(1, 1, 1, 32, 0), (2, 17, 3, 64, 5), (1, 33, 2, 128, 33), (2, 16, 1, 384, 0), (1, 5, 2, 6, 2)],
)
def test_turn(isa, dtype, items, tokens, heads, width, first):
    q, k = (random(items, tokens, heads, width, seed=seed, dtype=dtype) for seed in (1, 2))
    norms = tuple(random(width, seed=seed) for seed in (3, 4, 5, 6))
    angle = random(tokens, width // 2, seed=7)
    rope = (angle.cos(), angle.sin())
    wanted = [turned(q, norms[0], norms[2], rope, first), turned(k, norms[1], norms[3], rope, first)]
    calls.turn(q, k, norms, rope, first, 1e-6)
    assert_same(q, wanted[0], atol=1e-5 if dtype == torch.float32 else 1e-2)
    assert_same(k, wanted[1], atol=1e-5 if dtype == torch.float32 else 1e-2)


def test_turn_refuses_what_it_would_spoil():
    q, norms = random(1, 4, 2, 64), tuple(torch.ones(64) for _ in range(4))
    rope = (torch.ones(4, 32), torch.zeros(4, 32))
    with pytest.raises(ValueError, match="contiguous"):
        calls.turn(q.transpose(1, 2), q.transpose(1, 2), norms, rope, 0, 1e-6)
    with pytest.raises(ValueError, match="alike"):
        calls.turn(q, q.bfloat16(), norms, rope, 0, 1e-6)
    wide = torch.ones(1, 1, 1, calls.WIDEST + 2)
    with pytest.raises(ValueError, match="heads"):
        calls.turn(wide, wide, norms, rope, 0, 1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_activations_of_what_torch_computed(isa, dtype):
    x = random(2, 11, 70, dtype=dtype) * 4
    out = torch.full((2, 15, 70), 7, dtype=dtype)
    calls.activate(x, out[:, 2:13], gelu=True)
    assert_same(out[:, 2:13], F.gelu(x.double(), approximate="tanh"))
    assert (out[:, :2] == 7).all()
    assert (out[:, 13:] == 7).all()
    before, gate = random(2, 11, 70, seed=1, dtype=dtype), random(2, 2, 70, seed=2)
    found = calls.activate(x, before.clone(), gate=gate, split=4)
    rows = torch.cat([gate[:, :1].expand(-1, 4, -1), gate[:, 1:].expand(-1, 7, -1)], 1).double()
    assert_same(found, before.double() + rows * x.double(), atol=2e-5)
    calls.activate(x, x, gelu=True)
    assert torch.equal(x, out[:, 2:13])
    with pytest.raises(ValueError, match="do not go to"):
        calls.activate(x, out)


def test_bfloat16_is_rounded_as_torch_does(isa):
    """Ties to even, too, and what becomes infinite or a number again."""
    high = torch.randint(-(1 << 15), 1 << 15, (500, 1), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    low = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], dtype=torch.int32)
    x = ((high << 16) | low).flatten().view(torch.float32)
    x = torch.cat([x[x.isfinite()], torch.tensor([torch.inf, -torch.inf, 3.4e38, 1e-40])])[None]
    narrow = calls.activate(x, torch.empty(x.shape, dtype=torch.bfloat16))
    assert torch.equal(narrow, x.bfloat16())
    assert torch.equal(calls.activate(narrow, torch.empty_like(x)), narrow.float())
    assert calls.activate(torch.full((1, 3), torch.nan), torch.empty(1, 3, dtype=torch.bfloat16)).isnan().all()


def test_gelu_everywhere(isa):
    """Far out, too, where the exponential would over- or underflow."""
    x = torch.cat([torch.linspace(-12, 12, 4001), torch.tensor([0.0, -0.0, 1e-30, 90, -90, 1e4, -1e4, 1e18, -1e18])])
    out = calls.activate(x[None], torch.empty(1, len(x)), gelu=True)[0]
    wanted = F.gelu(x.double(), approximate="tanh")
    torch.testing.assert_close(out.double(), wanted, rtol=1e-6, atol=1e-6)
    assert calls.activate(torch.full((1, 5), torch.nan), torch.empty(1, 5), gelu=True).isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize(("items", "channels", "height", "width"), [(1, 3, 1, 1), (2, 96, 5, 13), (1, 100, 9, 15)])
def test_norm_silu(isa, dtype, silu, items, channels, height, width):
    x = random(items, channels, height, width, dtype=dtype).contiguous(memory_format=torch.channels_last)
    x[:, :, 0, 0] = 0
    gamma = random(channels, seed=1) * channels**0.5
    wanted = F.normalize(x.double(), dim=1) * gamma.double()[:, None, None]
    out = calls.norm_silu(x, gamma, silu=silu)
    assert out.shape == x.shape
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert_same(out, F.silu(wanted) if silu else wanted)


def test_norm_silu_wants_channels_last():
    with pytest.raises(ValueError, match="channels last"):
        calls.norm_silu(random(1, 8, 4, 4), torch.ones(8))
