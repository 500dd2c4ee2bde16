"""Which attention is taken, with pretended ones, and that those of torch compute what they should."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch

from lanting.attach.gpu import check_attention
from lanting.core.errors import RequestError
from lanting.core.lang import chinese
from lanting.kernels.gpu import attention, eight_bit, names
from lanting.kernels.gpu.attention import VARIABLE, WAYS, Choices, exact

CPU = torch.device("cpu")


def right(q, k, v, mask):
    return exact(q.float(), k.float(), v.float(), mask).to(q.dtype)


def wrong(q, k, v, mask):
    return right(q, k, v, None) * 1.1


def missing(q, k, v, mask):
    raise ModuleNotFoundError("flash_attn")


@pytest.fixture(autouse=True)
def free(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)


def given(**ways):
    return Choices(ways)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_first_right_one_is_taken(dtype):
    choices = given(fa2=missing, flash=wrong, cudnn=right, math=right)
    q, k, v = torch.randn(3, 1, 9, 2, 32).to(dtype).unbind()
    assert torch.equal(choices(q, k, v, None), right(q, k, v, None))
    assert choices.names == {(CPU, dtype, 32, False): "cudnn"}


def test_a_choice_is_made_once_for_what_matters():
    asked = []

    def counted(q, k, v, mask):
        asked.append(mask is not None)
        return right(q, k, v, mask)

    choices = given(fa2=counted, math=right)
    q = torch.randn(1, 40, 2, 32)
    for _ in range(3):
        choices(q, q, q, None)
    assert len(asked) == 4  # a trial and three calls
    choices(q, q, q, torch.ones(1, 21, dtype=torch.bool))
    assert asked[4:] == [True, True] and len(choices.names) == 2


def test_one_that_forgets_the_mask_is_left_out_where_there_is_one():
    choices = given(fa2=lambda q, k, v, mask: right(q, k, v, None), math=right)
    assert choices.choose(CPU, torch.float32, 32, False) == "fa2"
    assert choices.choose(CPU, torch.float32, 32, True) == "math"


@pytest.mark.parametrize("odd", ["nan", "dtype", "shape"])
def test_what_looks_odd_is_left_out(odd):
    def strange(q, k, v, mask):
        found = right(q, k, v, mask)
        return {"nan": found * float("nan"), "dtype": found.double(), "shape": found[:, :-1]}[odd]

    assert given(fa2=strange, math=right).choose(CPU, torch.float32, 32, False) == "math"


def test_one_can_be_asked_for(monkeypatch):
    choices = given(fa2=right, flash=right, cudnn=wrong, math=right)
    monkeypatch.setenv(VARIABLE, "flash")
    assert choices.choose(CPU, torch.float32, 32, False) == "flash"
    monkeypatch.setenv(VARIABLE, "cudnn")  # which errs here
    assert choices.choose(CPU, torch.float32, 32, False) == "fa2"


def test_hopper_prefers_what_was_made_for_it(monkeypatch):
    assert attention.order(CPU)[0] == "fa2"
    monkeypatch.setattr(attention, "capability", lambda device: (9, 0))
    assert attention.order(CPU)[:3] == ("fa3", "cudnn", "fa2")


def test_an_unknown_name_is_explained(monkeypatch):
    monkeypatch.setenv(VARIABLE, "fa9")
    with pytest.raises(RequestError, match=r"fa9.*use one of auto, fa3") as caught:
        check_attention()
    assert caught.value.sentence in chinese()


@pytest.mark.parametrize("masked", [False, True])
def test_torchs_own_compute_attention(masked, device):
    q, k, v = torch.randn(3, 2, 30, 2, 32, device=device).unbind()
    mask = (torch.rand(2, 11, device=device) > 0.4) if masked else None
    found = WAYS["math"](q, k, v, mask)
    assert torch.allclose(found, exact(q, k, v, mask), atol=2e-3 if device.type == "cuda" else 1e-5)
    few = WAYS["math"](q[:, :7], k, v, mask)  # frozen references: keys without queries
    assert torch.allclose(few, found[:, :7], atol=1e-5)


def far(found, wanted):
    return float((found.float() - wanted.float()).norm() / wanted.float().norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(2, 70, 70, 2, 32), (1, 5, 150, 1, 64), (1, 130, 64, 1, 128)])
@pytest.mark.parametrize("masked", [False, True])
def test_scores_in_eight_bits(dtype, shape, masked, device):
    torch.manual_seed(6)
    batch, queries, keys, heads, width = shape
    q = torch.randn(batch, queries, heads, width, device=device).to(dtype)
    k, v = torch.randn(2, batch, keys, heads, width, device=device).to(dtype).unbind()
    mask = (torch.rand(batch, 21, device=device) > 0.4) if masked else None
    found = eight_bit.attend(q, k, v, mask)
    assert found.dtype == dtype and far(found, exact(q.float(), k.float(), v.float(), mask)) < 0.02


def test_what_all_keys_share_costs_nothing(device):
    """Keys with a large mean, as those of real networks: without taking it off, 8 bits would say little."""
    torch.manual_seed(7)
    q, k, v = torch.randn(3, 1, 70, 2, 64, device=device).unbind()
    k = k + 30 * torch.randn(1, 1, 2, 64, device=device)
    assert far(eight_bit.attend(q, k, v, None), exact(q, k, v, None)) < 0.02


def test_eight_bits_hide_no_nan(device):
    q, k, v = torch.randn(3, 1, 70, 1, 32, device=device).unbind()
    q[0, 3, 0, 5] = float("nan")
    assert eight_bit.attend(q, k, v, None)[0, 3].isnan().all()


def test_eight_bits_only_if_asked_for(monkeypatch, device):
    assert all("int8" not in order for order in (names.HOPPER, names.OLDER))
    monkeypatch.setenv(VARIABLE, "int8")
    assert Choices().choose(device, torch.bfloat16, 64, True) == "int8"
    assert Choices().choose(device, torch.bfloat16, 40, True) != "int8"  # heads that it does not know


def test_packages_are_called_with_their_own_layout(monkeypatch):
    package = SimpleNamespace(flash_attn_func=lambda q, k, v: (right(q, k, v, None), None))
    monkeypatch.setitem(sys.modules, "flash_attn_interface", package)
    q = torch.randn(1, 9, 2, 32).half()
    assert torch.equal(WAYS["fa3"](q, q, q, None), right(q, q, q, None))
    with pytest.raises(ValueError, match="mask"):
        WAYS["fa3"](q, q, q, torch.ones(1, 4, dtype=torch.bool))


def test_choices_can_be_shown(monkeypatch):
    choices = given(math=right)
    monkeypatch.setattr(attention, "choices", lambda: choices)
    q = torch.randn(1, 9, 2, 32)
    choices(q, q, q, torch.ones(1, 4, dtype=torch.bool))
    assert attention.chosen() == {"cpu float32 32 masked": "math"}
