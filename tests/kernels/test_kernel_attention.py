"""Attention in one pass, against torch's in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernel_cases import SETS, random, using
from lanting.kernels import calls

SHAPES = (  # items, tokens, heads, width; keys are scored 512 at once
    *((1, 1, 1, 32), (2, 13, 3, 64), (1, 33, 2, 384), (2, 50, 1, 128), (1, 512, 1, 32), (1, 513, 2, 32)),
    *((1, 1061, 1, 64), (1, 20, 1, 512)),
)


def qkv(items: int, tokens: int, heads: int, width: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [random(items, tokens, heads, width, seed=seed).to(dtype) for seed in (1, 2, 3)]


def reference(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """In float64; `mask` says which of the first keys count."""
    seen = None
    if mask is not None:
        seen = torch.ones(q.shape[0], 1, 1, k.shape[1], dtype=torch.bool)
        seen[:, 0, 0, : mask.shape[1]] = mask
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(1, 2)


def close(out: Tensor, wanted: Tensor) -> bool:
    """Of float32: a few roundings. Of bfloat16: of the shares and of the result, against values of size 1."""
    return bool((out.double() - wanted).abs().max() < (4e-6 if out.dtype == torch.float32 else 0.02))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_attention(isa, dtype, shape):
    q, k, v = qkv(*shape, dtype)
    out = calls.attend(q, k, v)
    assert out.shape == q.shape
    assert out.dtype == dtype
    assert close(out, reference(q, k, v))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [20, 531])
def test_masks_cover_the_first_keys(isa, dtype, tokens):
    """Every item its own; what is masked may be anything but a number."""
    q, k, v = qkv(3, tokens, 2, 32, dtype)
    mask = random(3, 14) > 0
    mask[1] = False
    mask[2] = True
    wanted = reference(q, k, v, mask)
    for x in (k, v):
        x[:, :14][~mask] = torch.nan
    assert close(calls.attend(q, k, v, mask), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "keys"), [(1, 40), (37, 13), (20, 531), (530, 7)])
def test_keys_without_queries(isa, dtype, tokens, keys):
    """As many keys as one likes, masked or not."""
    q, (_, k, v) = qkv(2, tokens, 2, 32, dtype)[0], qkv(2, keys, 2, 32, dtype)
    assert close(calls.attend(q, k, v), reference(q, k, v))
    mask = random(2, 5) > 0
    mask[1] = True
    assert close(calls.attend(q, k, v, mask), reference(q, k, v, mask))


def test_keys_that_do_not_fit_are_refused():
    q, k, v = qkv(1, 4, 2, 32)
    for wrong in ((q, k[:, :3], v), (q, k[:, :, :1], v[:, :, :1]), (q, k[..., :16], v[..., :16])):
        with pytest.raises(ValueError, match="are not for queries"):
            calls.attend(*wrong)


def test_all_keys_may_be_covered_by_the_mask(isa):
    q, k, v = qkv(1, 18, 1, 32)
    mask = torch.arange(18)[None] % 3 == 0
    assert close(calls.attend(q, k, v, mask), reference(q, k, v, mask))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_of_any_size(isa, dtype):
    """Exponentials would overflow by far, rising from block to block; then only one key matters."""
    q, k, v = qkv(1, 1100, 1, 32, dtype)
    k = k * torch.linspace(1, 100, 1100).to(dtype)[:, None, None]
    out = calls.attend(q * 30, k, v)
    assert torch.isfinite(out).all()
    assert (out.double() - reference(q * 30, k, v)).abs().max() < (1e-3 if dtype == torch.float32 else 0.02)


def test_no_share_is_lost(isa):
    """Equal values come out as they went in."""
    q, k, _ = qkv(1, 600, 1, 64)
    torch.testing.assert_close(calls.attend(q, k, torch.ones_like(q)), torch.ones_like(q), rtol=3e-6, atol=0)


def test_what_is_no_number_stays_in_its_row(isa):
    q, k, v = qkv(1, 30, 2, 32)
    q[0, 7, 1] = torch.nan
    spoilt = calls.attend(q, k, v).isnan().all(-1)
    assert spoilt[0, 7, 1]
    assert spoilt.sum() == 1


def test_views_are_copied(isa):
    """Queries, keys and values that lie in one buffer are taken, too."""
    joint = random(2, 9, 3, 2, 32)
    q, k, v = joint.unbind(2)
    assert torch.equal(calls.attend(q, k, v), calls.attend(q.contiguous(), k.contiguous(), v.contiguous()))


@settings(max_examples=25, deadline=None)
@given(
    items=st.integers(1, 3),
    tokens=st.integers(1, 70),
    heads=st.integers(1, 3),
    width=st.sampled_from([32, 64, 96, 160]),
    masked=st.integers(0, 70),
    bfloat16=st.booleans(),
    isa=st.sampled_from(SETS or ["none"]),
)
def test_attention_of_any_shape(items, tokens, heads, width, masked, bfloat16, isa):
    q, k, v = qkv(items, tokens, heads, width, torch.bfloat16 if bfloat16 else torch.float32)
    mask = random(items, min(masked, tokens - 1)) > 0  # the last key always counts
    with using(isa):
        assert close(calls.attend(q, k, v, mask), reference(q, k, v, mask))


def test_shapes_that_do_not_fit_are_refused():
    q, k, v = qkv(1, 9, 2, 48)
    with pytest.raises(ValueError, match="heads of 48"):
        calls.attend(q, k, v)
    q, k, v = qkv(1, 9, 2, 64)
    with pytest.raises(ValueError, match="heads"):
        calls.attend(q, k.bfloat16(), v)
    for shape in ((2, 9), (1, 10)):
        with pytest.raises(ValueError, match="mask"):
            calls.attend(q, k, v, torch.ones(*shape, dtype=torch.bool))
