"""Kernels are tested for every instruction set that runs here, and left as they were found."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from kernel_cases import SETS, using
from lanting.kernels import library as lib


@pytest.fixture(params=SETS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """The instruction set in use."""
    with using(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def usual_threads() -> Iterator[None]:
    yield
    lib.use_threads(lib.thread_count())
