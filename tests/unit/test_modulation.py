"""The modulation table: equal to the modulation it replaces, recomputed when it must be, and without its weights."""

from __future__ import annotations

import pytest
import torch

import nets
from lanting.attach.modulation import ModulationTable
from lanting.flow.schedule import Schedule, model_timestep
from lanting.nn.lora import Factors, LoraLinear, attach, detach

RELEASES = [{}, {"zero_cond_t": True}, {"use_additional_t_cond": True, "use_layer3d_rope": True}]
TIMES = torch.tensor([1.0, 0.9, 0.7, 0.3])


def in_blocks(net):
    return sum(nets.bytes_of(mod) for block in net.transformer_blocks for mod in (block.img_mod, block.txt_mod))


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch", [1, 2])
def test_rounding_is_all_that_changes(release, dtype, batch, tmp_path):
    net = nets.transformer(**release).to(dtype)
    wanted = [nets.run(net, time=float(time), dtype=dtype, batch=batch) for time in TIMES.to(dtype)]
    table = ModulationTable(net, nets.saved(net, tmp_path).read)
    table.prepare(TIMES.to(dtype))
    found = [nets.run(net, time=float(time), dtype=dtype, batch=batch) for time in TIMES.to(dtype)]
    for a, b in zip(wanted, found, strict=True):
        bound = 1e-5 if dtype == torch.float32 else 2e-2
        assert (a - b).abs().max() <= bound * a.abs().max()
    assert table.bytes == 5 * 2 * len(table.times) * 6 * 64 * dtype.itemsize and in_blocks(net) == 0


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("quantize", [False, True])
def test_products_of_the_same_shape_are_bit_identical(release, dtype, quantize, tmp_path):
    net = nets.transformer(**release).to(dtype)
    net = nets.int4(net) if quantize else net
    read = nets.saved(net, tmp_path).read
    wanted = [nets.run(net, time=float(time), dtype=dtype) for time in TIMES.to(dtype)]
    table = ModulationTable(net, read, together=False)
    table.prepare(TIMES.to(dtype))
    for time, a in zip(TIMES.to(dtype), wanted, strict=True):
        assert torch.equal(a, nets.run(net, time=float(time), dtype=dtype))
    table.detach()
    assert torch.equal(wanted[0], nets.run(net, time=float(TIMES.to(dtype)[0]), dtype=dtype))


def test_the_times_of_a_schedule_are_the_times_the_network_is_told(tmp_path):
    """Every step of the loop is prepared beforehand: nothing is read while it runs."""
    net = nets.transformer().to(torch.bfloat16)
    checkpoint, reads = nets.saved(net, tmp_path), []
    table = ModulationTable(net, lambda names: reads.append(names) or checkpoint.read(names))
    sigmas = Schedule(use_dynamic_shifting=True, shift_terminal=0.02).sigmas(20, 300)
    table.prepare(model_timestep(sigmas[:-1], torch.bfloat16))
    before = len(reads)
    for sigma in sigmas[:-1]:
        told = model_timestep(sigma, torch.bfloat16)
        nets.run(net, time=float(told), dtype=torch.bfloat16)
    assert len(reads) == before == 10


def test_another_schedule_is_read_anew_and_the_past_leaves_no_trace(tmp_path):
    net = nets.transformer()
    checkpoint, reads = nets.saved(net, tmp_path), []
    table = ModulationTable(net, lambda names: reads.extend(names) or checkpoint.read(names))
    table.prepare(TIMES)
    first = nets.run(net, time=1.0)
    count = len(reads)
    table.prepare(TIMES)
    assert len(reads) == count
    table.prepare(torch.tensor([1.0, 0.5]))
    assert len(reads) == 2 * count and len(table.times) == 2
    nets.run(net, time=0.3)  # nobody announced it
    assert len(reads) == 3 * count
    table.prepare(TIMES)
    assert torch.equal(first, nets.run(net, time=1.0))


def test_without_a_file_the_weights_stay():
    net = nets.transformer()
    wanted, size = nets.run(net, time=0.9), nets.bytes_of(net)
    table = ModulationTable(net, together=False)
    table.prepare(TIMES)
    assert torch.equal(wanted, nets.run(net, time=0.9)) and nets.bytes_of(net) == size
    table.detach()
    assert torch.equal(wanted, nets.run(net, time=0.9))


def test_controlnet(tmp_path):
    net = nets.controlnet()
    read = nets.saved(net, tmp_path).read
    latents, time, text, mask, grids, _ = nets.inputs(net)
    ask = lambda: net(latents[:, :12], latents[:, :12].flip(1), time, text, mask, grids[:1])  # noqa: E731
    wanted = ask()
    table = ModulationTable(net, read, together=False)
    table.prepare(time)
    assert all(torch.equal(a, b) for a, b in zip(wanted, ask(), strict=True))
    assert in_blocks(net) == 0


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("quantize", [False, True])
def test_loras_on_the_modulation_count(after, quantize, tmp_path):
    net = nets.transformer()
    net = nets.int4(net) if quantize else net
    read = nets.saved(net, tmp_path).read
    plain = nets.run(net, time=0.9)
    torch.manual_seed(5)
    paths = ["transformer_blocks.0.img_mod.1", "transformer_blocks.3.txt_mod.1"]
    parts = {path: [Factors(torch.randn(2, 64), torch.randn(384, 2), 0.3)] for path in paths}
    put = attach if not quantize else lambda net, parts: wrap(net, parts)
    if not after:
        put(net, parts)
        wanted = nets.run(net, time=0.9)
    table = ModulationTable(net, read, together=False)
    table.prepare(TIMES)
    if after:
        put(net, parts)
        table.forget()
        table.prepare(TIMES)
        reference = nets.transformer()
        reference = nets.int4(reference) if quantize else reference
        nets.saved(reference, tmp_path / "again")
        put(reference, parts)
        wanted = nets.run(reference, time=0.9)
    assert not torch.equal(plain, wanted)
    assert torch.equal(wanted, nets.run(net, time=0.9)) and in_blocks(net) == 2 * 4 * 2 * (64 + 384)
    detach(net)
    table.forget()
    table.prepare(TIMES)
    assert torch.equal(plain, nets.run(net, time=0.9))


def wrap(net, parts):
    """LoRAs around packed Linears."""
    for path, factors in parts.items():
        parent, _, name = path.rpartition(".")
        setattr(net.get_submodule(parent), name, LoraLinear(net.get_submodule(path), factors))
