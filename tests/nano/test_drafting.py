"""Drafts of nano: fewer passes, the same place for everything, and a finish that is bit for bit the whole model's."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from lanting.cli.main import main
from lanting.core.recipe import read_recipe


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LANTING_LANG", "en")
    return tmp_path


def test_a_finished_draft_is_the_whole_models_picture(here):
    words = ["generate", 'a sign that says "OPEN"', "--size", "128x64", "--seed", "11"]
    assert main([*words, "--draft", "-o", "draft.png"]) == 0
    assert main(["finish", "draft.png", "-o", "finished.png"]) == 0
    assert main([*words, "-o", "whole.png"]) == 0
    draft, finished, whole = (Image.open(here / f"{name}.png") for name in ("draft", "finished", "whole"))
    assert finished.tobytes() == whole.tobytes()
    assert np.abs(np.asarray(draft, np.int16) - np.asarray(whole, np.int16)).max() > 0
    told, kept = read_recipe("draft.png"), read_recipe("finished.png")
    assert (told.request["steps"], told.request["guidance_scale"], len(told.loras)) == (4, 1.0, 1)
    assert (kept.request["steps"], kept.request["guidance_scale"], kept.loras) == (6, 2.0, ())
