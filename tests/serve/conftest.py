"""One server over fake engines for most tests of this folder."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from fakeserve import running


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """With two LoRAs, checkpoints at every other step."""
    folder = tmp_path_factory.mktemp("serve")
    options = {"loras": ["ink", "fox"], "journal": str(folder / "journal")}
    with running(folder, options=options, every=2, timeout=20.0) as one:
        yield one
