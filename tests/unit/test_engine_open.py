"""What `Engine.open` refuses before it looks at a weight."""

from __future__ import annotations

from pathlib import Path

import pytest

from lanting import Engine, ModelError
from lanting.specs import get_spec
from lanting.weights.find import ModelFolder


def test_a_release_that_needs_a_lora_is_refused_rather_than_drawn_without(monkeypatch):
    spec = get_spec("qwen-image-lightning-4")
    monkeypatch.setattr("lanting.engine.engine.locate", lambda model: ModelFolder(model, Path(), spec, {}))
    with pytest.raises(ModelError, match="LoRAs can't be loaded yet") as caught:
        Engine.open("qwen-image-lightning-4")
    assert "Qwen/Qwen-Image" in str(caught.value)
