"""What several tests share; helpers of this folder (`fakes`, ...) are imported by their plain names."""

from __future__ import annotations

import atexit
import gc
import os
import sys
from collections.abc import Generator
from pathlib import Path

import pytest

# what takes a quarter of a minute and more, the longest first: all of a file, since it shares servers and models
SLOW = ("studio", "cluster", "bars", "kernel_sanitized", "train_bench", "gpu_compile", "batch", "train_processes")
SLOW += ("steady", "gpu_rehearsal", "lightning", "control_files", "lightning_cli", "single", "faults", "train")
SLOW += ("workers", "kernel_vnni", "vae_fast", "parallel", "docs", "lora_engine", "train_graphs", "from_the_shell")
MANY = 20_000  # objects that are worth leaving out

os.environ["LANTING_CONFIG"] = os.devnull  # nobody's own defaults, here and in child processes
os.environ.pop("LANTING_MODEL", None)
sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent / "parity"))  # tiny: whole checkpoints with random weights


@pytest.fixture(scope="session")
def tokenizer_folder(request: pytest.FixtureRequest) -> Path:
    """The real Qwen2.5 tokenizer as Qwen-Image publishes it; built once and kept in pytest's cache."""
    from real_tokenizer import real_tokenizer_folder

    return real_tokenizer_folder(Path(request.config.cache.mkdir("qwen2.5-tokenizer")))


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """No garbage is looked for while files are imported, nor later among what they brought: that is none, but so much
    that looking takes as long as importing, and then a second whenever all of it is looked through.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow files begin, so that processes end together: at the end there are only short tests left to share."""
    order = {f"test_{name}.py": index for index, name in enumerate(SLOW)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> Generator[None, object, object]:
    """What a file imported while it ran (compilers are three hundred thousand objects) is no garbage for later files
    either: closing an engine looks through all there is, and there are a thousand of them.
    """
    try:
        return (yield)
    finally:
        if nextitem is not None and nextitem.path != item.path and len(gc.get_objects()) > MANY:
            gc.collect()
            gc.freeze()


def pytest_unconfigure() -> None:
    """Libraries complain of what is still there at the end; but pytest looks through all of it five times before."""
    atexit.register(gc.unfreeze)


def pytest_collection_finish() -> None:
    """One thread of torch a process, whatever a file asked for while it was imported (workers import all files): tests
    already share the processors, and two threads of each that wait for one another by spinning take ten times as long.
    """
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(1)
