"""Faults put into nano: the picture comes all the same, its recipe draws it again, and the next run starts safe."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from lanting import Engine, Request
from lanting.attach.safe_vae import SafeVae
from lanting.cli.main import main
from lanting.core.errors import NotFiniteError
from lanting.core.recipe import from_json, restore_request, to_json
from lanting.core.types import Result
from lanting.engine import remembered
from lanting.engine.remembered import Remembered
from lanting.kernels.library import ready

ASKED = Request('a red sign with white text "Bread"', seed=3, steps=4, size=(128, 64), guidance_scale=2.0)
HALF = "transformer=float16,vae=float32,text_encoder=float32"


@pytest.fixture(autouse=True)
def own_home(tmp_path, monkeypatch):
    monkeypatch.setenv("LANTING_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("LANTING_LANG", "en")
    return tmp_path / "home"


def pixels(result):
    return np.asarray(result.images[0], np.int16)


def told(events):
    return [notice.sentence.format(**notice.values) for event in events[:-1] for notice in event.notices]


def narrow_mlp(net, index=2):
    """Hidden numbers beyond float16, from weights that just fit, and the next Linear brings them back."""
    up, down = net.transformer_blocks[index].img_mlp.net[0].proj, net.transformer_blocks[index].img_mlp.net[2]
    with torch.no_grad():
        up.weight.mul_(60000 / up.weight.abs().max().float())
        down.weight.mul_(1e-3)


def test_a_watched_picture_is_the_unwatched_one(monkeypatch):
    with Engine.open("nano", device="cpu") as engine:
        watched = engine.run(ASKED)
        monkeypatch.setattr("lanting.attach.sentinel.Sentinel.__call__", lambda self, ask, again: ask())
        monkeypatch.setattr(SafeVae, "__enter__", lambda self: self)
        assert pixels(engine.run(ASKED)).tobytes() == pixels(watched).tobytes()
        assert "choices" not in watched.recipes[0].request


def test_float16_overflows_and_the_next_run_starts_safe(own_home):
    with Engine.open("nano", device="cpu", dtype=HALF) as engine:
        narrow_mlp(engine.models.transformer)
        *events, result = engine.stream(ASKED)
        assert isinstance(result, Result)
        (sentence,) = told([*events, result])
        assert "transformer.transformer_blocks.2 (and 0 more) left the range of float16 in step 1: bfloat16" in sentence
        safe = result.recipes[0].request["choices"]["safe"]
        assert [entry[1:] for entry in safe if entry[2] != "plain"] == [
            ["transformer.transformer_blocks.2", "bfloat16"]
        ]
        *events, again = engine.stream(ASKED)
        assert told([*events, again]) == [] and pixels(again).tobytes() == pixels(result).tobytes()
    table = json.loads((own_home / "safe.json").read_text())["models"]
    assert list(table.values()) == [{"transformer.transformer_blocks.2": "bfloat16"}]
    with Engine.open("nano", device="cpu", dtype=HALF) as engine:
        narrow_mlp(engine.models.transformer)
        *events, later = engine.stream(ASKED)
        assert told([*events, later]) == [] and pixels(later).tobytes() == pixels(result).tobytes()
    with Engine.open("nano", device="cpu", dtype="float32") as engine:
        narrow_mlp(engine.models.transformer)
        assert np.abs(pixels(engine.run(ASKED)) - pixels(result)).mean() < 2


@pytest.mark.skipif(not ready(), reason="the kernels are not built here")
def test_a_rescue_in_the_middle_is_drawn_again_by_the_recipe(monkeypatch):
    """A fused block that breaks from the third step on, also with a file that would have the run start safe."""
    from lanting.attach import compute

    engine = Engine.open("nano", device="cpu")
    victim, calls, fused = engine.models.transformer.transformer_blocks[1], [0], compute.fused_block

    def breaks(block, img, txt, ctx):
        calls[0] += 1
        img, txt = fused(block, img, txt, ctx)
        return (img * torch.nan if calls[0] > 5 else img), txt

    victim.__dict__["forward"] = lambda *args: breaks(victim, *args)
    first = engine.run(replace(ASKED, quality="fast"))
    recipe = from_json(to_json(first.recipes[0]))
    assert recipe.request["choices"]["safe"] == [[2, "transformer.transformer_blocks.1", "plain"]]
    calls[0] = 0
    again = engine.run(restore_request(recipe.request))
    assert pixels(again).tobytes() == pixels(first).tobytes() and again.recipes[0].request == recipe.request
    calls[0] = 0
    other = engine.run(replace(ASKED, quality="fast"))  # this one starts safe
    assert calls[0] == 0 and other.recipes[0].request["choices"]["safe"][0][0] == 0
    engine.close()


def test_the_vae_overflows(own_home):
    with Engine.open("nano", device="cpu", dtype="float32,vae=float16") as engine:
        vae = engine.models.codec.vae
        with torch.no_grad():  # what a norm reads next: its length doesn't matter until it is infinite
            conv = next(module for name, module in vae.decoder.named_modules() if name.endswith("resnets.0.conv1"))
            conv.weight.mul_(60000 / conv.weight.abs().max().float())
        *events, result = engine.stream(ASKED)
        assert told([*events, result]) == ["the VAE left the range of float16: in float32 from now on"]
        assert result.recipes[0].request["choices"] == {"safe": [[0, "vae.decode", "float32"]]}
        replayed = engine.run(restore_request(result.recipes[0].request))
        assert pixels(replayed).tobytes() == pixels(result).tobytes()
        assert next(vae.parameters()).dtype == torch.float16
        vae.float()
        right = engine.run(ASKED)
        assert np.abs(pixels(right) - pixels(result)).max() <= 1 and pixels(result).std() > 10
    assert "vae.decode" in (own_home / "safe.json").read_text()


def test_a_vae_that_nothing_rescues(monkeypatch):
    with Engine.open("nano", device="cpu", dtype="float16") as engine:
        watch, tried = SafeVae(engine.models.codec.vae, {}), []
        monkeypatch.setattr(watch, "run", lambda way, method, x: tried.append(way) or x * torch.nan)
        with pytest.raises(NotFiniteError, match="in every dtype: its weights are damaged"):
            watch.watched("vae.decode", "reconstruct", torch.ones(1, 3, 2, 2))
        assert tried[0] is None and tried[-2:] == ["float32", "bfloat16"]


READER = "transformer=float32,vae=float32,text_encoder="


def narrow_reader(engine, path="layers.1"):
    """A layer of the text encoder whose MLP leaves the range of float16 inside, and comes back."""
    mlp = engine.models.placed_encoder.net.model.get_submodule(path).mlp
    with torch.no_grad():
        for linear, factor in ((mlp.up_proj, 3e4), (mlp.gate_proj, 3e4)):
            linear.weight.mul_(factor / linear.weight.abs().max().float())
        mlp.down_proj.weight.mul_(1e-7)


def test_the_text_encoder_overflows(own_home):
    """It is read again with one layer wider, told, remembered for the next run, and drawn again by the recipe."""
    path = "layers.0"
    with Engine.open("nano", device="cpu", dtype=READER + "float16") as engine:
        narrow_reader(engine, path=path)
        *events, result = engine.stream(ASKED)
        (sentence,) = told([*events, result])
        assert sentence == f"{path} (and 0 more) of the text encoder left the range of float16: bfloat16 from now on"
        part = [0, f"text_encoder.{path}", "bfloat16"]
        assert part in result.recipes[0].request["choices"]["safe"]
        assert next(engine.models.encoder.model.parameters()).dtype == torch.float16
        assert not any("forward" in layer.__dict__ for layer in engine.models.encoder.model.model.layers)
        engine.models.prompts.clear()
        recipe = from_json(to_json(result.recipes[0]))
        *events, again = engine.stream(restore_request(recipe.request))
        assert told([*events, again]) == [] and pixels(again).tobytes() == pixels(result).tobytes()
        engine.models.placed_encoder.net.float()
        engine.models.prompts.clear()
        assert np.abs(pixels(engine.run(ASKED)) - pixels(result)).mean() < 2
    assert f'"text_encoder.{path}": "bfloat16"' in (own_home / "safe.json").read_text()
    with Engine.open("nano", device="cpu", dtype=READER + "float16") as engine:
        narrow_reader(engine, path=path)
        *events, later = engine.stream(ASKED)
        assert told([*events, later]) == [] and pixels(later).tobytes() == pixels(result).tobytes()


def test_the_text_encoder_s_stream_overflows():
    """Every layer behind the one whose stream leaves the range takes it wide, and the norm at the end is not fooled."""
    with Engine.open("nano", device="cpu", dtype=READER + "float16") as engine:
        first = engine.models.placed_encoder.net.model.layers[0].mlp.down_proj
        with torch.no_grad():
            first.weight.mul_(60000 / first.weight.abs().max().float())
        states = engine.models.encoder.encode(["a sign"])[0]
        assert not bool(torch.isfinite(states).all())
        *events, result = engine.stream(ASKED)
        assert len(told([*events, result])) == 1
        safe = {path: way for _, path, way in result.recipes[0].request["choices"]["safe"]}
        assert set(safe) >= {"text_encoder.layers.0", "text_encoder.layers.1"}
        engine.models.placed_encoder.net.float()
        engine.models.dtypes["text_encoder"] = torch.float32
        engine.models.prompts.clear()
        assert np.abs(pixels(engine.run(ASKED)) - pixels(result)).mean() < 2


def test_a_text_encoder_that_nothing_rescues_and_one_whose_weights_are_read_again():
    with Engine.open("nano", device="cpu", dtype=READER + "float32") as engine:
        clean = engine.run(ASKED)
        engine.models.prompts.clear()
        layer = engine.models.placed_encoder.net.model.layers[0]
        layer.mlp.up_proj.weight = torch.nn.Parameter(layer.mlp.up_proj.weight * torch.nan, requires_grad=False)
        *events, result = engine.stream(ASKED)
        assert told([*events, result]) == [
            "the weights of text_encoder.layers.0 were damaged in memory: they were read again"
        ]
        assert pixels(result).tobytes() == pixels(clean).tobytes()
        engine.models.prompts.clear()
        hook = layer.register_forward_hook(lambda module, args, out: (out[0] * torch.nan, out[1]))
        with pytest.raises(NotFiniteError, match=r"text_encoder.layers.0 gives numbers that are not finite"):
            engine.run(ASKED)
        hook.remove()


def test_the_vision_tower_overflows(tmp_path):
    from PIL import Image

    picture = Image.radial_gradient("L").resize((128, 64)).convert("RGB")
    asked = Request("make the background blue", images=(picture,), seed=2, steps=2)
    with Engine.open("nano", device="cpu", dtype=READER + "float16") as engine:
        engine.models.see_pictures()
        block = engine.models.placed_encoder.net.visual.blocks[0]
        with torch.no_grad():
            for linear in (block.mlp.up_proj, block.mlp.gate_proj):
                linear.weight.mul_(3e4 / linear.weight.abs().max().float())
            block.mlp.down_proj.weight.mul_(1e-7)
        *events, result = engine.stream(asked)
        assert told([*events, result]) == [
            "blocks.0 (and 0 more) of the text encoder left the range of float16: bfloat16 from now on"
        ]


def test_notices_are_told_once_whoever_has_them():
    from lanting.core.types import note
    from lanting.engine.drawing import Drawing

    class Watch:
        def __init__(self):
            self.notices = []

    with Engine.open("nano", device="cpu") as engine:
        drawing = Drawing(engine.models, ASKED, Remembered("key"))
        drawing.vae, drawing.sentinel = Watch(), Watch()  # type: ignore[assignment]
        drawing.sentinel.notices.append(note("a"))
        assert [one.sentence for one in drawing.notices()] == ["a"]
        drawing.vae.notices.append(note("b"))
        assert [one.sentence for one in drawing.notices()] == ["b"] and drawing.notices() == ()


def test_weights_damaged_in_memory_are_read_from_the_file():
    with Engine.open("nano", device="cpu", dtype="float32") as engine:
        clean = engine.run(ASKED)
        block = engine.models.transformer.transformer_blocks[3]
        block.attn.to_v.weight = torch.nn.Parameter(block.attn.to_v.weight * torch.nan, requires_grad=False)
        *events, result = engine.stream(ASKED)
        assert told([*events, result]) == [
            "the weights of transformer.transformer_blocks.3 were damaged in memory: they were read again"
        ]
        assert pixels(result).tobytes() == pixels(clean).tobytes()


def test_the_command_line_says_it_in_one_sentence(capsys, tmp_path, monkeypatch):
    from lanting.cli import draw

    monkeypatch.chdir(tmp_path)
    opened = draw.open_engine

    def narrow(*args, **more):
        engine = opened(*args, **more)
        narrow_mlp(engine.models.transformer)
        return engine

    monkeypatch.setattr(draw, "open_engine", narrow)
    words = ["generate", "x", "--steps", "2", "--size", "128x64", "--dtype", HALF, "-o", "x.png"]
    assert main(words) == 0
    assert capsys.readouterr().err.count("left the range of float16 in step 1: bfloat16 from now on") == 1
    monkeypatch.setenv("LANTING_LANG", "zh")
    monkeypatch.setenv("LANTING_HOME", str(tmp_path / "other"))
    assert main([*words, "--force"]) == 0
    assert "超出了 float16 的范围" in capsys.readouterr().err


# ---------------------------------------------------------------- the file
def test_a_file_that_is_bad_is_ignored(tmp_path):
    path = tmp_path / "deep" / "safe.json"
    kept = Remembered("model", path)
    assert kept.ways == {}
    kept.add({"a": "plain"})
    kept.add({"b": "float32"})
    assert Remembered("model", path).ways == {"a": "plain", "b": "float32"} and Remembered("other", path).ways == {}
    for text in ("", "{", "[]", '{"lanting": 2, "models": {}}', '{"lanting": 1, "models": 3}', "[" * 100_000, "\x00"):
        path.write_text(text)
        assert Remembered("model", path).ways == {}
        Remembered("model", path).add({"a": "plain"})
        assert Remembered("model", path).ways == {"a": "plain"}
    path.write_bytes(b" " * (remembered.LARGEST + 1))
    assert Remembered("model", path).ways == {}


def test_it_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "safe.json"
    for index in range(70):
        Remembered(f"model {index}", path).add({"a": "plain"})
    models = json.loads(path.read_text())["models"]
    assert len(models) == remembered.MOST and "model 69" in models and "model 0" not in models
    before = path.read_bytes()

    def fails(*args, **more):
        raise OSError("the disk is full")

    monkeypatch.setattr("os.replace", fails)
    Remembered("new", path).add({"a": "plain"})  # nothing to complain about
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
