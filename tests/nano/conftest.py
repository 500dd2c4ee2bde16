"""The embedded model, opened once for all end-to-end tests."""

import pytest

from lanting import Engine


@pytest.fixture(scope="session")
def nano():
    engine = Engine.open("nano", device="cpu")
    yield engine
    engine.close()
