"""`--draft` and `lanting finish`: which model drafts, and that the finish is what the whole model would have drawn."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from fakes import FakeEngine
from lanting.cli import drafts, draw
from lanting.cli.main import main
from lanting.core.recipe import read_recipe
from lanting.specs import get_spec


@pytest.fixture
def engine(monkeypatch, tmp_path):
    """A fake engine that remembers what it was opened with, and an empty current folder."""
    fake = FakeEngine()

    def opened(model, device, dtype, controlnet=None, loras=(), **options):
        fake.spec, fake.opened = get_spec(model), loras  # type: ignore[attr-defined]
        return fake

    monkeypatch.setattr(draw, "open_engine", opened)
    monkeypatch.setattr(draw, "fit", lambda *_: {})
    monkeypatch.setenv("LANTING_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("LANTING_LANG", "en")
    monkeypatch.chdir(tmp_path)
    return fake


def test_a_draft_is_drawn_by_the_lightning_of_its_release_and_finished_by_the_release(engine, capsys):
    words = ["a tea house", "--model", "qwen-image-2512", "--size", "16:9", "--seed", "5", "-o", "a.png"]
    assert main(["generate", *words, "--draft"]) == 0
    assert engine.spec.name == "qwen-image-2512-lightning-4"
    assert (engine.requests[0].steps, engine.requests[0].guidance_scale) == (4, 1.0)
    assert "the whole model: lanting finish a.png" in capsys.readouterr().out
    assert main(["finish", "a.png"]) == 0
    assert engine.spec.name == "qwen-image-2512"
    finished = engine.requests[1]
    assert (finished.prompt, finished.seed, finished.size) == ("a tea house", 5, (1664, 928))
    assert (finished.steps, finished.guidance_scale, finished.task) == (50, 4.0, "text_to_image")
    assert read_recipe("a-finished.png").model == "qwen-image-2512"
    assert main(["finish", "a.png"]) == 0 and Path("a-finished-2.png").exists()
    assert main(["finish", "a.png", "--steps", "30", "--guidance", "3", "-o", "b.png"]) == 0
    assert (engine.requests[3].steps, engine.requests[3].guidance_scale) == (30, 3.0)


def test_the_finish_may_begin_at_the_draft(engine, capsys):
    assert main(["generate", "a tea house", "--model", "qwen-image", "--draft", "--seed", "5", "-o", "a.png"]) == 0
    assert main(["finish", "a.png", "--strength", "0.6"]) == 0
    begun = engine.requests[1]
    assert (begun.task, begun.strength, len(begun.images)) == ("image_to_image", 0.6, 1)
    assert begun.images[0].tobytes() == Image.open("a.png").convert("RGB").tobytes()
    Image.new("RGB", (64, 48), "orange").save("cat.png")
    words = ["cat.png", "blue", "--model", "qwen-image-edit-2511", "--draft", "-o", "e.png"]
    assert main(["edit", *words]) == 0 and engine.spec.name == "qwen-image-edit-2511-lightning-4"
    capsys.readouterr()
    assert main(["finish", "e.png", "--strength", "0.6"]) == 2
    assert "only what was drawn from words alone" in capsys.readouterr().err
    assert main(["finish", "e.png"]) == 0 and engine.spec.name == "qwen-image-edit-2511"
    assert engine.requests[-1].images[0].getpixel((0, 0)) == (255, 165, 0)


def test_the_lightning_that_is_here_drafts(engine, monkeypatch):
    monkeypatch.setattr("lanting.weights.home.downloaded", lambda name: name if name.endswith("-8") else None)
    assert drafts.drafting("qwen-image", ()) == ("qwen-image-lightning-8", ())
    assert drafts.drafting("qwen-image-lightning-4", ()) == ("qwen-image-lightning-4", ())


def test_nano_drafts_with_the_lora_it_brings_and_keeps_others(engine, tmp_path):
    assert drafts.drafting("nano", ()) == ("nano", ("lightning",))
    assert drafts.drafting("nano", ("lightning:0.9",)) == ("nano", ("lightning:0.9",)), "one is enough"
    assert main(["generate", "x", "--draft", "--seed", "1", "-o", "x.png"]) == 0
    assert engine.opened == ("lightning",)


def test_models_that_cannot_draft_say_so(engine, capsys):
    assert main(["generate", "x", "--model", "qwen-image-2.1", "--draft"]) == 2
    assert "qwen-image-2.1 has no few-step release to draft with" in capsys.readouterr().err
    assert not engine.requests


def test_what_is_whole_is_not_finished(engine, capsys):
    assert main(["generate", "x", "--model", "qwen-image", "--seed", "1", "-o", "x.png"]) == 0
    capsys.readouterr()
    assert main(["finish", "x.png"]) == 2
    assert "was drawn in all of its 50 steps: 'lanting replay' draws it again" in capsys.readouterr().err
    assert main(["generate", "x", "--model", "qwen-image", "--seed", "1", "--steps", "9", "-o", "y.png"]) == 0
    assert main(["finish", "y.png"]) == 0 and engine.requests[-1].steps == 50, "few steps are a draft, too"
    assert main(["finish", "cat.png"]) == 2
    Image.new("RGB", (8, 8)).save("plain.png")
    assert main(["finish", "plain.png"]) == 2
    assert "Traceback" not in capsys.readouterr().err
