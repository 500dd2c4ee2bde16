"""The engine under a Plan: the same pictures with less in memory, and an engine that survives whatever happens."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import save_file

import nets
import plans
from lanting import Engine, ModelError, Request, RequestError
from lanting.attach.vae_graphs import attach_vae_graphs
from lanting.core.checkpoint import Checkpoint
from lanting.engine.placement import Placed
from lanting.weights.build import store_transformer
from lanting.weights.checkpoint import open_component, read_json
from lanting.weights.sized import beside
from lanting.weights.stored import Placing

ASKED = {"prompt": "a sign", "size": (64, 48), "seed": 5, "steps": 3, "guidance_scale": 3.0, "negative_prompt": "x"}
STREAMED = {"streamed": "disk", "resident_blocks": 0}
TURNS = {"encoder": "unload"}
TABLE = {"modulation_table": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny.save_folder(tmp_path_factory.mktemp("placement") / "qwen-image", layers=4, shard="100KB")


def open_engine(folder: Path, **changes) -> Engine:
    options = {name: changes.pop(name) for name in ("loras", "quant", "controlnet") if name in changes}
    return Engine.open(str(folder), plan=plans.plan(blocks=4, **changes), **options)


def pixels(engine: Engine, **asked) -> bytes:
    return engine.run(Request(**{**ASKED, **asked})).images[0].tobytes()


def weights(placed: Placed) -> int:
    return nets.bytes_of(placed.net)


@pytest.fixture(scope="module")
def plain(folder) -> bytes:
    with Engine.open(str(folder), device="cpu", dtype="float32") as engine:
        return pixels(engine)


@pytest.mark.parametrize(
    "changes",
    [{}, STREAMED, STREAMED | {"resident_blocks": 2}, TURNS, TURNS | STREAMED, {"encoder": "cpu"}],
    ids=["resident", "streamed", "half streamed", "turns", "turns and streamed", "encoder on the CPU"],
)
def test_every_placement_draws_the_same_picture(folder, plain, changes):
    with open_engine(folder, **changes) as engine:
        assert pixels(engine) == plain
        assert pixels(engine, prompt="another") != plain
        assert pixels(engine) == plain


@pytest.mark.parametrize("changes", [TABLE, TABLE | STREAMED | TURNS], ids=["resident", "streamed"])
def test_the_table_changes_rounding_at_most(folder, plain, changes):
    with open_engine(folder, **changes) as engine:
        found = pixels(engine)
        assert max(abs(a - b) for a, b in zip(found, plain, strict=True)) <= 1
        assert pixels(engine, steps=2, size=(48, 48)) and pixels(engine) == found  # whatever was drawn in between


def test_text_encoder_and_transformer_take_turns(folder):
    with open_engine(folder, **TURNS) as engine:
        models = engine.models
        pixels(engine)
        body, reader = models.placed_transformer, models.placed_encoder
        assert weights(body) > 0 and weights(reader) == 0
        seen = []
        reader.net.register_forward_pre_hook(lambda *_: seen.append((weights(body), weights(reader))))
        pixels(engine, prompt="another")
        assert len(seen) == 1 and seen[0][0] == 0 and seen[0][1] > 0  # the negative prompt was known
        pixels(engine)
        assert len(seen) == 1  # so were both


def test_streaming_leaves_nothing_behind(folder):
    with open_engine(folder, **STREAMED, **TURNS, **TABLE) as engine:
        pixels(engine)
        body, reader = engine.models.placed_transformer, engine.models.placed_encoder
        blocks = body.net.transformer_blocks
        assert sum(nets.bytes_of(block) for block in blocks) == 0 and weights(reader) == 0
        assert body.streamer.peak == 2 and reader.streamer.peak == 2
        assert body.table.bytes == 4 * 2 * 3 * 6 * 32 * 4
    gc.collect()
    assert weights(body) == 0


def test_closing_the_generator_half_way_leaves_a_usable_engine(folder, plain):
    with open_engine(folder, **STREAMED, **TURNS) as engine:
        for stop in (1, 3, 5):
            events = engine.stream(Request(**ASKED))
            for _ in range(stop):
                next(events)
            events.close()
            blocks = engine.models.transformer.transformer_blocks
            assert sum(nets.bytes_of(block) for block in blocks) == 0
        assert pixels(engine) == plain


def test_a_shard_that_vanishes_while_drawing_is_a_sentence(folder, tmp_path):
    made = tiny.save_folder(tmp_path / "qwen-image", layers=4, shard="100KB")
    with open_engine(made, **STREAMED) as engine:
        before = pixels(engine)
        events = engine.stream(Request(**ASKED))
        while next(events).phase != "denoise":
            pass
        shards = sorted((made / "transformer").glob("*.safetensors"))
        for shard in shards:
            shard.rename(shard.with_suffix(".away"))
        with pytest.raises(ModelError, match="can't be read"):
            list(events)
        with pytest.raises(ModelError, match="can't be read"):
            pixels(engine)
        for shard in shards:
            shard.with_suffix(".away").rename(shard)
        assert pixels(engine) == before


def test_the_plan_says_kinds_and_tiles(folder):
    with open_engine(folder, transformer="int8", text_encoder="int8", vae_tile=256) as engine:
        pixels(engine)
        assert nets.packed_linears(engine.models.transformer) == 4 * 14
        assert nets.packed_linears(engine.models.placed_encoder.net.model) == 2 * 7
        assert engine.models.codec.tile is True


def test_what_is_closed_is_let_go_at_once(folder):
    """Whatever hangs on a module knows it, so weights and recordings would stay until Python looks for circles."""
    engine = Engine.open(str(folder), device="cpu", dtype="float32")
    pixels(engine)
    models = engine.models
    attach_vae_graphs(models.codec.vae)
    seen = [models.codec.vae.decoder.conv_in.weight, models.placed_encoder.net.model.layers[0].self_attn.q_proj.weight]
    kept = [weakref.ref(weight) for weight in [*seen, models.transformer.proj_out.weight]]
    del seen, models
    gc.collect()
    gc.disable()
    try:
        engine.close()
        assert [weight() for weight in kept] == [None] * 3
    finally:
        gc.enable()


def test_a_checkpoint_is_not_gone_on_with_where_weights_are_packed_otherwise_or_another_net_steers(folder, tmp_path):
    """Half the steps of one picture, and half of another."""
    controls = [str(tiny.save_controlnet(tmp_path / str(layers), layers=layers)) for layers in (1, 2)]
    steered = {"task": "controlnet", "images": (tiny.picture(64, 48),)}
    cases = (({"quant": "int8"}, {}, {}), ({"controlnet": controls[0]}, {"controlnet": controls[1]}, steered))
    for one, two, more in cases:
        request = Request(**{**ASKED, **more})
        opened = [Engine.open(str(folder), device="cpu", dtype="float32", **options) for options in (one, two)]
        events = opened[0].stream_resumable(request, every=1)
        kept = next(event for event in events if isinstance(event, Checkpoint))
        events.close()
        with pytest.raises(RequestError, match="another drawing"):
            list(opened[1].stream_resumable(request, resume=kept))
        assert list(opened[0].stream_resumable(request, resume=kept))
        for engine in opened:
            engine.close()


def test_controlnet_with_the_table(folder, tmp_path):
    net = tiny.save_controlnet(tmp_path / "controlnet")
    asked = {"task": "controlnet", "images": (tiny.picture(64, 48),)}
    with Engine.open(str(folder), device="cpu", dtype="float32", controlnet=str(net)) as engine:
        wanted = pixels(engine, **asked)
    with open_engine(folder, controlnet=str(net), **TABLE, **STREAMED) as engine:
        found = pixels(engine, **asked)
        (placed,) = engine.models.placed_controlnets.values()
        assert placed.table.times == engine.models.placed_transformer.table.times
    assert max(abs(a - b) for a, b in zip(found, wanted, strict=True)) <= 1


def test_parked_in_ram_comes_back_the_same(folder):
    """On a device with memory of its own; the meta device stands in for one, so only the copy can be compared."""
    files = folder / "transformer"
    config = read_json(files / "config.json")
    stored = store_transformer(open_component(files), config, Placing(torch.float32, torch.device("cpu")))
    placed = Placed(stored, "transformer_blocks")
    before = {name: tensor.clone() for name, tensor in placed.net.state_dict().items()}
    placed.device = torch.device("meta")
    placed.unload("ram")
    assert weights(placed) == 0 and placed.copy is not None and placed.copy.keys() == before.keys()
    placed.device = torch.device("cpu")
    placed.load()
    assert all(torch.equal(tensor, before[name]) for name, tensor in placed.net.state_dict().items())


def test_a_budget_in_place_of_a_plan(folder, plain):
    with Engine.open(str(folder), device="cpu", dtype="float32", ram="64G") as engine:
        assert engine.models.plan is not None and pixels(engine) == plain
    with pytest.raises(RequestError, match="needs at least"):
        Engine.open(str(folder), device="cpu", ram="20M")
    with pytest.raises(RequestError):
        Engine.open(str(folder), device="cpu", ram="much")


def test_files_beside_the_model_are_counted(tmp_path):
    """LoRAs by their files, ControlNets by their tensors, and each once."""
    nets = [str(tiny.save_controlnet(tmp_path / name, layers=layers)) for name, layers in (("a", 1), ("b", 2))]
    (tmp_path / "a" / "other.safetensors").write_bytes(b"12345")
    sizes = [4 * sum(weight.numel() for weight in tiny.controlnet(layers=layers).parameters()) for layers in (1, 2)]
    assert beside((), nets) == sum(sizes) and beside((), [nets[0]] * 2) == sizes[0]
    (tmp_path / "ink.safetensors").write_bytes(b"123")
    assert beside([f"{tmp_path}/ink.safetensors:0.5"], ()) == beside([f"{tmp_path}/ink.safetensors"], ()) == 3
    assert beside(["lightning", "lightning:0.5"], ()) == 0
    with pytest.raises(ModelError, match="there is no ControlNet"):
        beside((), [str(tmp_path / "gone")])


def test_loras_over_streamed_blocks_and_the_table(folder, tmp_path, plain):
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for i in range(4):
        for name, out in (("attn.to_q", 32), ("img_mod.1", 192)):
            path = f"transformer_blocks.{i}.{name}"
            tensors[f"{path}.lora_A.weight"] = torch.randn(2, 32, generator=generator) * 0.3
            tensors[f"{path}.lora_B.weight"] = torch.randn(out, 2, generator=generator) * 0.3
    save_file(tensors, str(tmp_path / "ink.safetensors"))
    ink = (str(tmp_path / "ink.safetensors"),)
    with Engine.open(str(folder), device="cpu", dtype="float32", loras=ink) as engine:
        wanted = pixels(engine)
        engine.set_strengths(0.5)
        half = pixels(engine)
    assert len({plain, wanted, half}) == 3
    with open_engine(folder, **STREAMED, **TURNS, loras=ink) as engine:
        assert pixels(engine) == wanted
    with open_engine(folder, **STREAMED, **TABLE, loras=ink) as engine:
        assert max(abs(a - b) for a, b in zip(pixels(engine), wanted, strict=True)) <= 1
        engine.set_strengths(0.5)
        assert max(abs(a - b) for a, b in zip(pixels(engine), half, strict=True)) <= 1
        engine.set_strengths(0.0)
        assert max(abs(a - b) for a, b in zip(pixels(engine), plain, strict=True)) <= 1


def test_placing_imports_no_compiler():
    """`empty_like` on the meta device did: 15 MB and most of a second for shapes without memory."""
    program = """
import sys, torch
from lanting.attach.parts import Part
for tensor in (torch.zeros(2, 3), torch.zeros(2, 3, device="meta")):
    net = torch.nn.Linear(3, 2, device="meta")
    net.weight = torch.nn.Parameter(tensor)
    Part(net, "a").empty()
print("sympy" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "False", done.stderr
