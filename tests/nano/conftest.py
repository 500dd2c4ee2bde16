"""The embedded model, opened once for all end-to-end tests."""

from dataclasses import replace

import pytest

from lanting import Engine
from lanting.specs import model_spec


@pytest.fixture(scope="session")
def nano():
    engine = Engine.open("nano", device="cpu")
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def edits_allowed():
    """nano with the tasks and sizes that its recipe now trains; the shipped weights came before that."""
    read, shipped = model_spec.read_spec, model_spec.get_spec("nano")
    sizes = {"strip": (128, 64), **shipped.defaults.sizes, "large": (256, 256)}
    defaults = replace(shipped.defaults, sizes=sizes)
    able = replace(shipped, tasks=(*shipped.tasks, "edit", "edit_inpaint"), defaults=defaults)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model_spec, "read_spec", lambda path: able if path.stem == "nano" else read(path))
        model_spec.get_spec.cache_clear()
        yield able
    model_spec.get_spec.cache_clear()


@pytest.fixture(scope="module")
def editor(edits_allowed):
    """The embedded model as one that edits."""
    engine = Engine.open("nano", device="cpu")
    yield engine
    engine.close()
