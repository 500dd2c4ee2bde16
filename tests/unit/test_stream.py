"""Streaming: the same bits with two blocks in memory, whatever brings them and whatever goes wrong on the way."""

from __future__ import annotations

import gc
import threading
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import nets
from lanting.attach.modulation import MODULATIONS, ModulationTable
from lanting.attach.parts import Part
from lanting.attach.stream import Mapped, Slots, Streamer
from lanting.core.errors import ModelError
from lanting.nn.lora import Factors, LoraLinear, attach, detach
from lanting.nn.qwen_language import LanguageConfig, QwenLanguageModel

CPU = torch.device("cpu")
CARRIERS = {
    "mapped": lambda parts, read, live: Mapped(parts, read),
    "slots from ram": lambda parts, read, live: Slots(parts, read, CPU, "ram", live),
    "slots from disk": lambda parts, read, live: Slots(parts, read, CPU, "disk", live),
}


def stream(net, read, how="mapped", live=2, resident=0, leave=(), stack="transformer_blocks"):
    """Stream the blocks of `net` behind the first `resident`."""
    blocks = list(net.get_submodule(stack))
    whole = [f"{stack}.{i}" for i in range(len(blocks))]
    parts = [
        Part(block, path, [f"{path}.{name}" for name in leave]) for block, path in zip(blocks, whole, strict=True)
    ][resident:]
    return Streamer(blocks[resident:], CARRIERS[how](parts, read, live), live)


def loaded(net, folder, how="mapped"):
    """How to read `net`, which from now on lies in memory as its streamed blocks will: it decides how sums round."""
    read = nets.saved(net, folder).read
    if how != "mapped":
        net.load_state_dict({name: tensor.clone() for name, tensor in net.state_dict().items()}, assign=True)
    return read


def move(old, new):
    old.rename(new)


def in_blocks(net):
    return [nets.bytes_of(block) for block in net.transformer_blocks]


@pytest.mark.parametrize("how", CARRIERS)
@pytest.mark.parametrize("quantize", [False, True])
@pytest.mark.parametrize("live", [1, 2, 3])
@pytest.mark.parametrize("resident", [0, 2, 4])
def test_the_same_bits_with_few_blocks_in_memory(how, quantize, live, resident, tmp_path):
    net = nets.int4(nets.transformer()) if quantize else nets.transformer()
    read = loaded(net, tmp_path, how)
    wanted = [nets.run(net, time=time) for time in (0.9, 0.5, 0.1)]
    each = in_blocks(net)[0]
    streamer = stream(net, read, how, live, resident)
    assert sum(in_blocks(net)) == resident * each
    seen = []
    for block in net.transformer_blocks:
        block.register_forward_pre_hook(lambda *_: seen.append(sum(size > 0 for size in in_blocks(net))))
    found = [nets.run(net, time=time) for time in (0.9, 0.5, 0.1)]
    assert all(torch.equal(a, b) for a, b in zip(wanted, found, strict=True))
    assert streamer.peak == min(live, 5 - resident)
    assert max(seen) <= resident + live and len(seen) == 15
    streamer.rest()
    assert sum(in_blocks(net)) == resident * each
    assert torch.equal(wanted[0], nets.run(net, time=0.9))
    streamer.close()


@pytest.mark.parametrize("how", CARRIERS)
def test_memory_is_really_let_go(how, tmp_path):
    """Every tensor that was read is gone but for those of the live blocks; from RAM, all copies but one."""
    net = nets.transformer()
    checkpoint = nets.saved(net, tmp_path)
    alive: dict[int, int] = {}
    most = [0]

    def gone(key):
        alive.pop(key)

    def read(names):
        tensors = checkpoint.read(names)
        for tensor in tensors.values():
            key = len(alive) + 1 + max(alive, default=0)
            alive[key] = tensor.nbytes
            weakref.finalize(tensor, gone, key)
        most[0] = max(most[0], sum(alive.values()))
        return tensors

    block = in_blocks(net)[0]
    streamer = stream(net, read, how)
    for time in (0.9, 0.4):
        nets.run(net, time=time)
    assert most[0] <= 3 * block  # two live ones, and the one whose place is being taken
    if how != "mapped":  # what was read has been copied into buffers that are used again and again
        assert sum(alive.values()) <= block
    streamer.rest()
    gc.collect()
    assert sum(alive.values()) <= (0 if how == "mapped" else block)
    streamer.close()
    assert not any(thread.name.startswith("lanting-stream") for thread in threading.enumerate())


@pytest.mark.parametrize("how", CARRIERS)
@pytest.mark.parametrize("quantize", [False, True])
def test_loras_stay_on_streamed_blocks(how, quantize, tmp_path):
    net = nets.int4(nets.transformer()) if quantize else nets.transformer()
    read = loaded(net, tmp_path, how)
    plain = nets.run(net)
    torch.manual_seed(5)
    paths = [f"transformer_blocks.{i}.attn.to_q" for i in range(5)]
    loras = {path: [Factors(torch.randn(2, 64), torch.randn(64, 2), 0.3)] for path in paths}

    def put():
        if not quantize:
            return attach(net, loras)
        for path in paths:
            net.get_submodule(path.rpartition(".")[0]).to_q = LoraLinear(net.get_submodule(path), loras[path])

    put()
    wanted = nets.run(net)
    assert not torch.equal(plain, wanted)
    detach(net)
    before = stream(net, read, how)
    put()
    assert torch.equal(wanted, nets.run(net))
    before.close()
    after = stream(net, read, how)  # the LoRAs were there first
    assert torch.equal(wanted, nets.run(net))
    detach(net)
    assert torch.equal(plain, nets.run(net))
    after.close()


def test_with_the_table_the_modulation_is_not_streamed(tmp_path):
    net = nets.int4(nets.transformer())
    checkpoint, names = nets.saved(net, tmp_path), []
    wanted = nets.run(net)
    table = ModulationTable(net, checkpoint.read, together=False)
    streamer = stream(net, lambda want: names.extend(want) or checkpoint.read(want), leave=MODULATIONS)
    table.prepare(torch.tensor([0.9, 0.7]))
    assert sum(in_blocks(net)) == 0
    assert torch.equal(wanted, nets.run(net, time=0.7))
    assert names and not any("_mod." in name for name in names)
    streamer.close()


@pytest.mark.parametrize("how", ["mapped", "slots from disk"])
def test_a_file_that_vanishes_is_a_sentence_and_can_come_back(how, tmp_path):
    net = nets.transformer()
    read = loaded(net, tmp_path, how)
    wanted = nets.run(net)
    streamer = stream(net, read, how)
    file, away = tmp_path / "model.safetensors", tmp_path / "away"
    blocks = list(net.transformer_blocks)
    hook = blocks[2].register_forward_pre_hook(lambda *_: move(file, away))
    with pytest.raises(ModelError, match=r"model\.safetensors"):
        nets.run(net)
    hook.remove()
    for _ in range(3):
        with pytest.raises(ModelError, match=r"model\.safetensors"):
            nets.run(net)
    move(away, file)
    assert torch.equal(wanted, nets.run(net)) and streamer.peak <= 2
    streamer.close()


@pytest.mark.parametrize("how", CARRIERS)
def test_stopping_half_way_leaves_nothing_to_repair(how, tmp_path):
    net = nets.transformer()
    read = loaded(net, tmp_path, how)
    wanted = nets.run(net)
    streamer = stream(net, read, how)

    def stop(*_):
        raise KeyboardInterrupt

    for block in list(net.transformer_blocks)[1:4]:
        hook = block.attn.register_forward_pre_hook(stop)
        with pytest.raises(KeyboardInterrupt):
            nets.run(net)
        hook.remove()
        assert torch.equal(wanted, nets.run(net))
    assert streamer.peak == 2
    streamer.close()
    streamer.close()


def test_the_readers_layers_stream_too(tmp_path):
    config = LanguageConfig(
        vocab_size=40,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        mrope_section=(4, 6, 6),
    )
    torch.manual_seed(0)
    net = nets.randomise(QwenLanguageModel(config))
    read, ids = loaded(net, tmp_path), torch.arange(9)[None]
    wanted = net(ids)[0]
    streamer = stream(net, read, stack="layers")
    assert torch.equal(wanted, net(ids)[0]) and streamer.peak == 2
    streamer.close()


@pytest.mark.parametrize("how", CARRIERS)
def test_the_next_block_is_read_while_one_computes(how, tmp_path):
    """Block 1 arrives although block 0 has not finished: it waits for it."""
    net = nets.transformer()
    checkpoint, seen = nets.saved(net, tmp_path), threading.Event()

    def read(names):
        if names[0].startswith("transformer_blocks.1."):
            seen.set()
        return checkpoint.read(names)

    streamer = stream(net, read, how)
    if how == "slots from ram":
        seen.clear()
        fetch = streamer.carrier.fetch
        streamer.carrier.fetch = lambda i: (seen.set() if i == 1 else None, fetch(i))[1]
    waited = []
    net.transformer_blocks[0].attn.register_forward_pre_hook(lambda *_: waited.append(seen.wait(60)))
    nets.run(net)
    assert waited == [True]
    streamer.close()


class Copies(TorchDispatchMode):
    """Whether each copy may come back before it is done."""

    def __init__(self):
        super().__init__()
        self.early = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.copy_.default:
            self.early.append(bool(args[2]) if len(args) > 2 else bool((kwargs or {}).get("non_blocking")))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("home", ["ram", "disk"])
def test_where_no_event_tells_that_a_copy_is_done_it_is_waited_for(home, tmp_path):
    """As on Apple's GPUs, which would find the next block's bytes in the buffer."""
    net = nets.transformer()
    parts = [Part(block, f"transformer_blocks.{i}") for i, block in enumerate(net.transformer_blocks)]
    slots = Slots(parts, nets.saved(net, tmp_path).read, CPU, home)
    with Copies() as seen:
        load = slots.fetch(0)
    assert load.arrived is None and seen.early and not any(seen.early)
    slots.close()
