"""The embedded model, opened once for all end-to-end tests."""

import pytest

from lanting import Engine


@pytest.fixture(scope="session")
def nano():
    engine = Engine.open("nano", device="cpu", dtype="float32")  # beside references in float32
    yield engine
    engine.close()


@pytest.fixture(scope="session")
def as_usual():
    """With the dtype that this machine's users get."""
    engine = Engine.open("nano", device="cpu")
    yield engine
    engine.close()
