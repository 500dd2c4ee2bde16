"""Networks with the native kernels attached: as exact as without, undone without a trace, whatever hangs on them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import nets
from compute_cases import draw, error, network, pack
from lanting.attach.compute import attach_kernels, detach_kernels
from lanting.attach.held import packed
from lanting.attach.modulation import ModulationTable
from lanting.attach.parts import Part
from lanting.attach.stream import Mapped, Streamer
from lanting.kernels import calls, library
from lanting.nn.linears import Int4Linear, Int8Linear, PackedLinear
from lanting.nn.lora import Factors, LoraLinear, attach

if not library.ready():
    pytest.skip("the kernels are not built here: no compiler", allow_module_level=True)


@pytest.mark.parametrize("two_times", [False, True])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("masked", [False, True])
def test_as_exact_as_torch(two_times, batch, masked):
    net = network(two_times)
    exact = draw(net, batch, masked)
    assert attach_kernels(net)
    assert error(draw(net, batch, masked), exact) < 2e-6
    rough = copy.deepcopy(net).bfloat16()
    detach_kernels(rough)
    plain = error(draw(rough, batch, masked), exact)
    attach_kernels(rough)
    assert error(draw(rough, batch, masked), exact) < 1.15 * plain  # they round in fewer places than torch


@pytest.mark.parametrize("name", library.known_sets())
def test_every_instruction_set_draws(name):
    net = pack(network(), "int8")
    exact, own = draw(network()), library.instruction_set()
    attach_kernels(net)
    library.use(name)
    try:
        assert error(draw(net), exact) < 0.02
        assert error(draw(net.bfloat16()), exact) < 0.025
    finally:
        library.use(own)


@pytest.mark.parametrize("kind", ["int8", "int4", "int4 rotated", "Q4_0", "Q8_0", "Q4_K", "Q6_K"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_linears_multiply_integers(kind, dtype):
    """Rounding inputs to 8 bits costs a percent or so beside the same weights without it."""
    net = pack(network(), kind).to(dtype)
    wanted = draw(net)
    attach_kernels(net)
    assert all(packed(m) is not None for m in net.modules() if isinstance(m, PackedLinear))
    found = draw(net)
    assert 1e-4 < error(found, wanted) < 0.02
    assert torch.equal(found, draw(net))


def test_a_kind_without_kernels_is_expanded_as_before():
    net = pack(network(), "fp8").bfloat16()
    wanted = draw(net)
    attach_kernels(net)
    assert all(packed(m) is None for m in net.modules() if isinstance(m, PackedLinear))
    assert error(draw(net), wanted) < 0.01


@pytest.mark.parametrize("kind", ["", "int4", "Q4_K"])
def test_detached_it_is_bit_for_bit_what_it_was(kind):
    net = pack(network(), kind).bfloat16() if kind else network()
    names, before = [*net.state_dict()], draw(net)
    attach_kernels(net)
    draw(net)
    assert [*net.state_dict()] == names
    detach_kernels(net)
    assert torch.equal(draw(net), before)
    assert not any("float32" in key or key in ("bound", "forward") for m in net.modules() for key in m.__dict__)


def test_off_means_untouched(monkeypatch):
    monkeypatch.setattr("lanting.attach.compute.ready", lambda: False)
    net = pack(network(), "int8")
    before = draw(net)
    assert not attach_kernels(net)
    assert torch.equal(draw(net), before)


def test_modulation_stays_exact():
    """One row a step, and its error would reach every token."""
    net = network()
    for block in net.transformer_blocks:
        block.img_mod[1] = Int8Linear.from_dense(block.img_mod[1].weight, block.img_mod[1].bias)
    attach_kernels(net)
    assert all(block.img_mod[1].product is None for block in net.transformer_blocks)


def test_few_rows_are_multiplied_exactly():
    linear = Int4Linear.from_dense(torch.randn(96, 128), torch.randn(96))
    net = nn.ModuleDict({"one": linear})
    few, many = torch.randn(1, 3, 128), torch.randn(1, 40, 128)
    exact = linear(few), linear(many)
    attach_kernels(net)
    assert torch.equal(linear(few), exact[0])
    assert not torch.equal(linear(many), exact[1]) and error(linear(many), exact[1]) < 0.02
    slanted = many.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(linear(slanted), linear(many))


@pytest.fixture
def in_float32():
    """An instruction set that multiplies plain weights in float32 is in use."""
    own = library.instruction_set()
    for name in library.known_sets():
        library.use(name)
        if library.dense_bytes() == 4:
            yield name
            break
    else:
        pytest.skip("no instruction set here multiplies plain weights in float32")
    library.use(own)


@pytest.mark.parametrize("rows", [1, 84])
def test_a_picture_among_others_has_its_own_bits(in_float32, rows):
    """On several threads torch's products of more rows are summed otherwise, and one row never as two: steps of several
    jobs could then not be shared."""
    net = network()
    attach_kernels(net)
    linear = net.time_text_embed.timestep_embedder.linear_2 if rows == 1 else net.img_in
    x, threads = torch.randn(5, rows, linear.in_features), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with torch.no_grad():
            assert torch.equal(linear(x), torch.cat([linear(one) for one in x.split(1)]))
    finally:
        torch.set_num_threads(threads)


def test_plain_linears_are_multiplied_in_float32_everywhere(in_float32):
    """A text encoder's too: closer to float32 than torch's, and torch's where rows are few or something learns."""
    linear = nn.Linear(96, 130).bfloat16()
    x = torch.randn(2, 9, 96).bfloat16()
    exact, theirs, few = linear.float()(x.float()), linear.bfloat16()(x), linear(x[0, :3])
    attach_kernels(nn.ModuleDict({"one": linear}))
    with torch.no_grad():
        found = linear(x)
        assert found.dtype == torch.bfloat16
        assert error(found.float(), exact) <= error(theirs.float(), exact) + 1e-6
        assert torch.equal(linear(x[0, :3]), few)
        slanted = x.transpose(1, 2).contiguous().transpose(1, 2)
        assert torch.equal(linear(slanted), found)
        assert linear(x[:, :0]).shape == (2, 0, 130)
    linear(x).sum().backward()
    assert linear.weight.grad is not None
    detach_kernels(nn.ModuleDict({"one": linear}))
    assert "forward" not in linear.__dict__


@pytest.mark.parametrize("kind", ["", "int8"])
def test_a_lora_counts_the_same(kind):
    net = pack(network(), kind) if kind else network()
    net = net.bfloat16()
    path = "transformer_blocks.1.attn.to_q"
    factors = {
        name: [Factors(torch.randn(4, width).bfloat16() * 0.1, torch.randn(rows, 4).bfloat16() * 0.1)]
        for name, width, rows in (
            (path, 256, 256),
            ("transformer_blocks.2.img_mlp.net.0.proj", 256, 1024),
            ("transformer_blocks.2.txt_mlp.net.2", 1024, 256),
            ("transformer_blocks.0.attn.to_out.0", 256, 256),
        )
    }
    without = draw(net)
    attach(net, factors)
    assert isinstance(net.get_submodule(path), LoraLinear)
    wanted = draw(net)
    attach_kernels(net)
    found = draw(net)
    assert error(wanted, without) > 0.05  # it does something
    assert error(found, wanted) < 0.02


def test_streamed_and_tabled_blocks_give_the_bits_of_resident_ones(tmp_path):
    net = pack(network(), "int4").bfloat16()
    read = nets.saved(net, tmp_path).read
    attach_kernels(net)
    table = ModulationTable(net)
    resident = draw(net)
    blocks = list(net.transformer_blocks)
    streamer = Streamer(blocks, Mapped([Part(b, f"transformer_blocks.{i}") for i, b in enumerate(blocks)], read), 2)
    try:
        assert torch.equal(draw(net), resident)
        assert torch.equal(draw(net), resident)
    finally:
        streamer.close()
        table.forget()


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_change_no_bit(threads):
    net = pack(network(), "int4").bfloat16()
    attach_kernels(net)
    wanted, own = draw(net, 2, True), library.thread_count()
    library.use_threads(threads)
    try:
        assert torch.equal(draw(net, 2, True), wanted)
    finally:
        library.use_threads(own)


def test_half_precision_and_gradients_go_the_old_way():
    net = network().half()
    wanted = draw(net)
    attach_kernels(net)
    assert torch.equal(draw(net), wanted)


def test_a_nan_stays_visible():
    """Sentinels look for it: rounding must not hide it."""
    net = pack(network(), "int8").bfloat16()
    attach_kernels(net)
    net.transformer_blocks[1].attn.to_q.bias[3] = float("nan")
    assert draw(net).isnan().any()


def test_shapes_that_do_not_fit_are_refused():
    weight = calls.packed("int8", torch.zeros(8, 64, dtype=torch.int8), torch.ones(8, 1), 64)
    assert weight is not None
    with pytest.raises(ValueError, match="columns"):
        calls.product(calls.quantize(torch.randn(4, 32)), weight, torch.empty(4, 8))
