"""A block in one call: the bits of single calls, for all kinds of Linears; only where it fits, whatever moves."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

from compute_cases import draw, error, network, pack
from lanting.attach import compute, whole
from lanting.attach.compute import attach_kernels, detach_kernels
from lanting.attach.modulation import ModulationTable
from lanting.kernels import calls, library
from lanting.nn.lora import Factors, attach
from lanting.nn.mmdit import QwenImageTransformer

if not library.ready():
    pytest.skip("the kernels are not built here: no compiler", allow_module_level=True)

PLAIN = [""] if library.dense_bytes() else []  # else plain Linears are torch's
KINDS = [*PLAIN, "int8", "int4", "Q4_0", "Q8_0", "Q4_K", "Q6_K"]
WAYS = [(1, False, False), (2, True, False), (1, False, True), (2, True, True)]  # batch, masked, two times


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The names of the kernels that Python calls."""
    names: list[str] = []
    plain = calls.call

    def call(name: str, *given: object) -> None:
        names.append(name)
        plain(name, *given)

    monkeypatch.setattr(calls, "call", call)
    yield names


def singly(net: QwenImageTransformer, monkeypatch: pytest.MonkeyPatch, *given: Any) -> torch.Tensor:
    """The same by single calls."""
    with monkeypatch.context() as patch:
        patch.setattr(compute, "at_its_own", lambda module: False)
        return draw(net, *given)


def attached(kind: str = "", dtype: torch.dtype = torch.bfloat16, **options: Any) -> QwenImageTransformer:
    net = network(**options)
    net = (pack(net, kind) if kind else net).to(dtype)
    assert attach_kernels(net)
    return net


@pytest.mark.parametrize(("batch", "masked", "two_times"), WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_bits_are_those_of_single_calls(counted, monkeypatch, kind, batch, masked, two_times):
    net = attached(kind, two_times=two_times)
    found = draw(net, batch, masked)
    assert counted.count("lt_block") == 3
    assert torch.equal(draw(net, batch, masked), found)
    counted.clear()
    assert torch.equal(singly(net, monkeypatch, batch, masked), found)
    assert "lt_block" not in counted
    assert counted.count("lt_product") > 30


def test_who_looks_into_blocks_sees_single_calls_of_the_same_bits(counted):
    """Other threads keep the whole blocks, and so does this one afterwards."""
    net, inside = attached("int8"), []
    wanted = draw(net)

    @contextmanager
    def look() -> Iterator[None]:
        inside.append(len(counted))
        yield
        inside.append(len(counted))

    counted.clear()
    with whole.apart(look):
        assert torch.equal(draw(net), wanted)
        assert "lt_block" not in counted and counted.count("lt_product") > 30
        assert len(inside) == 6 and all(end > begin for begin, end in zip(inside[::2], inside[1::2], strict=True))
        with ThreadPoolExecutor(1) as other:
            assert torch.equal(other.submit(draw, net).result(), wanted)
        assert counted.count("lt_block") == 3
    assert torch.equal(draw(net), wanted) and counted.count("lt_block") == 6 and len(inside) == 6


@pytest.mark.parametrize("name", library.known_sets())
@pytest.mark.parametrize("kind", ["", "int8", "int4"])
def test_for_every_instruction_set(monkeypatch, name, kind):
    """Rows lie in panels or one after the other, by the set and by their width: five heads have rows of 1280."""
    own = library.instruction_set()
    library.use(name)
    try:
        for dtype, heads in ((torch.float32, 4), (torch.bfloat16, 4), (torch.bfloat16, 5)):
            net = attached(kind, dtype, heads=heads)
            assert torch.equal(singly(net, monkeypatch), draw(net)), (dtype, heads)
    finally:
        library.use(own)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("kind", ["", "int8"])
def test_threads_change_no_bit(kind, threads):
    net, own = attached(kind, two_times=True), library.thread_count()
    wanted = draw(net, 2, True)
    library.use_threads(threads)
    try:
        assert torch.equal(draw(net, 2, True), wanted)
    finally:
        library.use_threads(own)


def test_pictures_and_texts_of_many_sizes(monkeypatch):
    """A plan keeps calls of some sizes only."""
    net = attached("int8")
    for batch in (1, 2, 3, 1, 4, 5, 6, 7, 8, 9, 1):
        assert torch.equal(draw(net, batch), singly(net, monkeypatch, batch))
    plan = net.transformer_blocks[0].__dict__["whole"]
    assert 0 < len(plan.calls) <= whole.KEPT_SIZES


@pytest.mark.parametrize("kind", [*PLAIN, "int8", "int4"])
def test_weights_that_move_are_found(monkeypatch, kind):
    """Streams, and who mends a part, put other tensors in their places."""
    net = attached(kind)
    before = draw(net)
    block = net.transformer_blocks[1]
    parts = [block.attn.to_q, block.txt_mlp.net[2], block.attn.to_out[0], block.attn.norm_k]
    for every in (("bias",), ("weight",), ("weight", "weight_scale", "bias")):  # together, or one while others stay
        for part in parts:
            for table in (part._parameters, part._buffers):
                for name, x in [*table.items()]:
                    if x is not None and name in every:
                        old, moved = x, x.clone()
                        table[name] = nn.Parameter(moved, requires_grad=False) if isinstance(x, nn.Parameter) else moved
                        old.fill_(1)  # whoever still reads there draws something else
        assert torch.equal(draw(net), before), every
    block.attn.to_k.bias.data.add_(1)
    block.attn.to_k.bias = copy.deepcopy(block.attn.to_k.bias)
    for name in compute.KEPT:
        block.attn.to_k.__dict__.pop(name, None)  # as mending does
    found = draw(net)
    assert not torch.equal(found, before)
    assert torch.equal(found, singly(net, monkeypatch))


@pytest.mark.parametrize("kind", [*PLAIN, "int8"])
def test_no_plan_keeps_a_weight(kind):
    """Streamed blocks are larger than memory."""
    net = attached(kind)
    draw(net)
    linear = net.transformer_blocks[0].attn.to_q
    gone = weakref.ref(linear.weight.untyped_storage())
    table = linear._parameters if kind == "" else linear._buffers
    table["weight"] = torch.empty_like(linear.weight, device="meta")
    gc.collect()
    assert gone() is None


def test_a_copy_has_weights_of_its_own(monkeypatch):
    net = attached("int8")
    wanted = draw(net)
    other = copy.deepcopy(net)
    detach_kernels(net)
    for x in net.state_dict().values():
        x.fill_(1)
    detach_kernels(other)
    attach_kernels(other)
    assert torch.equal(draw(other), wanted)


def test_what_hangs_on_a_block_takes_single_calls(counted):
    net = attached("int8")
    wanted = draw(net)
    block = net.transformer_blocks[1]
    nothing = Factors(torch.zeros(4, 256).bfloat16(), torch.zeros(256, 4).bfloat16())
    attach(net, {f"transformer_blocks.0.attn.{name}": [nothing] for name in ("to_v", "to_out.0", "to_add_out")})
    heard: list[int] = []
    hook = block.attn.attend.register_forward_hook(lambda *given: heard.append(1))
    counted.clear()
    assert error(draw(net), wanted) < 1e-2
    assert counted.count("lt_block") == 1
    assert heard == [1]
    hook.remove()
    counted.clear()
    draw(net)
    assert counted.count("lt_block") == 2


def test_what_does_not_fit_takes_single_calls(counted):
    """Rotated weights; kinds that the kernels don't know; activations that nobody multiplies with plain weights."""
    for kind in ("int4 rotated", "fp8"):
        draw(attached(kind))
    if library.dense_bytes() != 4:
        draw(attached(dtype=torch.float32))
    assert "lt_block" not in counted


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_modulation_comes_from_its_table(dtype, monkeypatch):
    """One item's row is given as it lies there; of two times, or of several items, rows are gathered."""
    for two_times, batch in ((False, 1), (True, 1), (False, 2)):
        net = attached("int8", dtype, two_times=two_times)
        table = ModulationTable(net, together=False)
        wanted = draw(net, batch)
        given = net.transformer_blocks[0].img_mod.row()
        assert (given is None) == (two_times or batch > 1)
        assert given is None or torch.equal(given, net.transformer_blocks[0].img_mod(torch.empty(1, 1, 1)))
        assert torch.equal(singly(net, monkeypatch, batch), wanted)
        table.detach()
        assert error(draw(net, batch), wanted) < 1e-2
