"""The dial from the command line to the recipe and back, with nano."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lanting import Engine, Request
from lanting.cli.main import main
from lanting.core.checkpoint import Checkpoint
from lanting.core.errors import RequestError
from lanting.core.quality import LEVELS, Quality
from lanting.core.recipe import from_json, infotext, read_recipe, restore_request, to_json
from lanting.core.types import Progress, Result
from lanting.engine import drawing
from lanting.flow.loop import denoise, velocity
from lanting.specs import get_spec, settle

ASKED = Request('a red sign with white text "Fresh Bread"', seed=3, steps=12, guidance_scale=2.0)


@pytest.fixture(scope="module")
def nano():
    with Engine.open("nano", device="cpu") as engine:
        yield engine


def bits(result):
    return [image.tobytes() for image in result.images]


def words(result):
    return result.recipes[0].request["choices"]["steps"].split()


def test_exact_is_the_plain_loop(nano, monkeypatch):
    plain, exact = nano.run(ASKED), nano.run(replace(ASKED, quality="exact"))
    monkeypatch.setattr("lanting.engine.drawing.denoise", lambda model, canvas, _: denoise(model, canvas, velocity))
    assert bits(plain) == bits(exact) == bits(nano.run(ASKED))
    assert plain.recipes[0].request["quality"] == "exact" and "choices" not in plain.recipes[0].request


def test_less_is_computed_and_told(nano):
    events = list(nano.stream(replace(ASKED, quality="fast")))
    result = events[-1]
    assert isinstance(result, Result) and bits(result) != bits(nano.run(ASKED))
    steps = [event.choice for event in events if isinstance(event, Progress) and event.phase == "denoise"]
    assert steps == words(result) and len(steps) == 12 and set(steps) - {"FF"}
    assert "Quality: fast" in infotext(result.recipes[0])


def test_a_recipe_makes_the_same_choices(nano, monkeypatch):
    first = nano.run(replace(ASKED, quality="fast"))
    recipe = from_json(to_json(first.recipes[0]))
    monkeypatch.setattr("lanting.flow.budget.Forecast.expected", lambda *_: 1 / 0)  # nothing is decided anew
    again = nano.run(restore_request(recipe.request))
    assert bits(again) == bits(first) and again.recipes[0].request == recipe.request


def test_the_recipe_of_one_of_a_batch_follows_the_batch(nano):
    both = nano.run(replace(ASKED, quality="balanced", count=2))
    alone = nano.run(restore_request(both.recipes[1].request))
    assert words(alone) == words(both)
    difference = [abs(a - b) for a, b in zip(*(one.images[0].tobytes() for one in (alone, both)), strict=False)]
    assert difference and alone.recipes[0].request["seed"] == 4


@pytest.fixture(scope="module")
def editor(tmp_path_factory):
    """A release with `zero_cond_t` whose weights are random."""
    import tiny

    folder = tiny.save_folder(tmp_path_factory.mktemp("models") / "edit", "qwen-image-edit-2511")
    with Engine.open(str(folder), device="cpu", dtype="float32") as engine:
        small = replace(engine.spec.defaults, vl_area=64 * 64, vae_area=64 * 64)
        engine.models.spec = replace(engine.spec, defaults=small)
        yield engine


@pytest.mark.parametrize("kept", [True, False])
def test_an_edit_keeps_its_references_where_they_fit(editor, monkeypatch, kept):
    from PIL import Image

    if not kept:
        monkeypatch.setattr(drawing, "free_bytes", lambda device: 1000)
    monkeypatch.setitem(LEVELS, "fast", Quality(step=2.0, mean=2.0, age=3))  # random weights forecast badly
    monkeypatch.setattr("lanting.flow.frugal.Frugal._guess", lambda self: None)
    picture = Image.linear_gradient("L").resize((64, 64)).convert("RGB")
    asked = Request("make it green", images=(picture,), seed=1, steps=10, quality="fast", guidance_scale=2.0)
    result = editor.run(asked)
    assert any(letter.islower() for word in words(result) for letter in word) is kept
    monkeypatch.undo()
    again = editor.run(restore_request(result.recipes[0].request, asked.images))
    assert bits(again) == bits(result)
    assert bits(editor.run(replace(asked, quality=None))) != bits(result)


def test_a_drawing_can_be_interrupted(nano):
    asked, events = replace(ASKED, quality="fast"), []
    for event in nano.stream_resumable(asked, every=5):
        events.append(event)
        if isinstance(event, Checkpoint):
            break
    kept = Checkpoint.from_bytes(events[-1].to_bytes())
    *_, result = nano.stream_resumable(asked, resume=kept)
    assert words(result)[:5] == kept.choices["steps"].split() and len(words(result)) == 12
    assert bits(nano.run(restore_request(result.recipes[0].request))) == bits(result)  # in one go


def test_settling_twice_changes_nothing():
    settled = settle(Request("x", quality="fast", choices={"steps": "FF FF"}, steps=2), get_spec("qwen-image"))
    assert settle(settled, get_spec("qwen-image")) == settled
    assert settle(Request("x"), get_spec("nano")).quality == "exact"


@pytest.mark.parametrize("choices", [{"steps": "FF"}, {"steps": 7}, {"steps": "FF FX FF"}, ["FF"], "FF"])
def test_choices_that_are_none_are_refused(choices):
    with pytest.raises(RequestError, match="choices"):
        settle(Request("x", steps=3, choices=choices), get_spec("nano"))


def test_a_level_that_is_none(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    picture = tmp_path / "sign.png"
    from PIL import Image

    Image.fromarray(torch.zeros(96, 96, 3, dtype=torch.uint8).numpy()).save(picture)
    for verb in (["generate", "x"], ["edit", str(picture), "x"], ["layers", str(picture)]):
        assert main([*verb, "--model", "nano", "--quality", "best"]) == 2
        told = capsys.readouterr().err.strip().splitlines()
        assert len(told) == 1
    assert main(["generate", "x", "--quality", "best"]) == 2
    assert "there is no quality best; choose exact, high, balanced, fast" in capsys.readouterr().err


def test_replay_on_the_command_line(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LANTING_LANG", "en")
    asked = ["generate", ASKED.prompt, "--steps", "12", "--seed", "3", "--quality", "fast", "-o", "a.png"]
    assert main(asked) == 0
    assert "quality fast: " in capsys.readouterr().out
    assert read_recipe("a.png").request["quality"] == "fast"
    assert main(["replay", "a.png"]) == 0
    assert "identical, pixel for pixel" in capsys.readouterr().out
