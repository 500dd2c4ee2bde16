"""What a recipe says of the ControlNet that drew along, and what `replay` makes of it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import tiny

from lanting import Engine, Request
from lanting.cli.main import main
from lanting.cli.replay import _inputs
from lanting.cli.screen import Screen
from lanting.core import PictureError
from lanting.core.recipe import describe_request, from_json, read_recipe, to_json
from lanting.core.types import Recipe, Result
from lanting.serve.worker import published

PLAIN = Recipe(describe_request(Request("a cat", "text_to_image", seed=1)), "nano", "w", "text_to_image", {})
NET = {"name": "union", "weights": "ab", "path": "nets/union"}


def test_it_travels_and_old_recipes_know_none():
    alone = to_json(replace(PLAIN, controlnets=(NET,)))
    assert from_json(alone).controlnets == (NET,) and json.loads(alone)["controlnet"] == NET
    assert from_json(alone).controlnet == NET and "controlnet" not in to_json(PLAIN)
    assert from_json(to_json(PLAIN)).controlnets == () and from_json(to_json(PLAIN)).controlnet is None
    both = replace(PLAIN, controlnets=(NET, NET | {"name": "canny"}))
    assert from_json(to_json(both)) == both and "controlnet" not in json.loads(to_json(both))


def test_a_server_keeps_its_folders_to_itself(tmp_path):
    result = Result((tiny.picture(16, 16),), (replace(PLAIN, controlnets=(NET,)),), {})
    published(result, tmp_path / "job", False)
    assert "nets/union" not in "".join(path.read_text() for path in (tmp_path / "job").glob("*.json"))
    assert read_recipe(next((tmp_path / "job").glob("*.png"))).controlnet == NET | {"path": "union"}


@pytest.fixture
def drawn(tmp_path, monkeypatch) -> Path:
    """A folder with a model, a ControlNet, and a picture drawn with both."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LANTING_LANG", "en")
    tiny.save_folder(tmp_path / "model", shard="100KB")
    tiny.save_controlnet(tmp_path / "union")
    tiny.picture(64, 48).save("edges.png")
    words = ["generate", "a cat", "--model", "model", "--controlnet", "union", "--control", "edges.png", "-o", "a.png"]
    assert main([*words, "--steps", "2", "--size", "64x48", "--device", "cpu", "--seed", "3"]) == 0
    return tmp_path


def replayed(*words: str) -> list[str]:
    return ["replay", "a.png", "--model", "model", "--device", "cpu", "--force", *words]


def test_replay_finds_it_and_says_when_it_differs(drawn, capsys):
    told = read_recipe("a.png").controlnet
    assert told is not None and (told["name"], told["path"], len(told["weights"])) == ("union", "union", 64)
    capsys.readouterr()
    assert main(replayed()) == 0
    out = capsys.readouterr()
    assert "identical, pixel for pixel" in out.out and "ControlNet" not in out.err

    (drawn / "union").rename(drawn / "moved")
    assert main(replayed()) == 2
    assert "the ControlNet union is not here any more" in capsys.readouterr().err
    assert main(replayed("--controlnet", "moved")) == 0
    assert "identical, pixel for pixel" in capsys.readouterr().out

    tiny.save_controlnet(drawn / "union", layers=2)
    assert main(replayed()) == 0
    assert "union is not the ControlNet the recipe was made with" in capsys.readouterr().err


def test_a_picture_without_one_has_none(drawn):
    with Engine.open("model", device="cpu", controlnet="union") as engine:
        recipe = engine.run(Request("a cat", size=(64, 48), steps=1)).recipes[0]
    assert recipe.controlnet is None


@pytest.mark.parametrize("masks", [False, True])
def test_inputs_that_the_recipe_has_not_got_are_refused(masks, tmp_path):
    with pytest.raises(PictureError, match="--mask is given 1 times" if masks else "--image is given 1 times"):
        _inputs([], ["cat.png"], tmp_path, Screen(), masks=masks)
