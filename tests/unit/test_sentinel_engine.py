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

    monkeypatch.setattr("json.dump", fails)
    Remembered("new", path).add({"a": "plain"})  # nothing to complain about
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
