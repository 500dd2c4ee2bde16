"""A browser, a server over nano with its studio, and a folder of screenshots that a run leaves behind."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SERVE = ROOT / "tests" / "serve"
sys.path.insert(0, str(SERVE))
from fakeserve import told_in, wait_for  # noqa: E402
from nursery import Nurse  # noqa: E402

SHOTS = Path(os.environ.get("LANTING_SHOTS", ROOT / "build" / "screenshots"))
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FURTHER = {"qwen-image-layered": {}, "qwen-image": {"loras": ["ink", "fox"]}}
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
QUIET += ["--disable-component-update", "--disable-sync"]


@cache
def nurse() -> Nurse:
    """Knows Gradio already, which a server of its own takes seconds to import."""
    return Nurse("studioserving", "gradio", paths=(HERE,))


@contextmanager
def serving(folder: Path, **settings) -> Iterator[str]:
    """The address of a server whose studio is open."""
    folder.mkdir(parents=True, exist_ok=True)
    said, log = folder / "server.port", folder / "server.log"
    log.touch()
    said.touch()
    path = ":".join(map(str, (ROOT / "src", HERE, SERVE)))
    env = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "LANTING_LANG": "en"}
    process = nurse().bear(json.dumps({"data": str(folder / "data"), **settings}), env, said, log)
    try:
        port = wait_for(lambda: told_in(said, process), 120)
        assert port.isdigit(), log.read_text()
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()
    lines = log.read_text().splitlines()
    assert not [line for line in lines if line.startswith("Traceback")], "a handler of the page has failed"


@pytest.fixture(scope="module")
def browser():
    """Chromium of the system; without one nothing here can be seen, and the tests say so.

    For one file only: while its driver runs, no test in this process can start an event loop of its own.
    """
    found = os.environ.get("LANTING_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    if not found:
        pytest.skip(f"no browser: none of {', '.join(NAMES)} is installed, and LANTING_CHROMIUM names none")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as driver:
        one = driver.chromium.launch(executable_path=found, args=QUIET)
        yield one
        one.close()


@pytest.fixture(scope="module")
def server(browser, tmp_path_factory) -> Iterator[str]:
    """Asks for the browser first, so that none is started where there is nothing to see it with."""
    with serving(tmp_path_factory.mktemp("studio"), further=FURTHER) as url:
        yield url


@pytest.fixture(scope="module")
def guarded(browser, tmp_path_factory) -> Iterator[tuple[str, str, str]]:
    """(address, key, another's key) of a server that asks for keys."""
    from lanting.serve.keys import create

    folder = tmp_path_factory.mktemp("guarded")
    (folder / "data").mkdir()
    keys = [create(folder / "data", name) for name in ("Anna", "Ben")]
    with serving(folder, keys=True) as url:
        yield url, keys[0], keys[1]


@pytest.fixture
def visit(browser):
    """Open a page as somebody; afterwards nothing was asked of another host, and no script has failed."""
    contexts, strange, broken = [], [], []

    def watch(request) -> None:
        parts = urlsplit(request.url)
        if parts.scheme in ("http", "https", "ws", "wss") and parts.hostname != "127.0.0.1":
            strange.append(request.url)

    def go(url: str, language: str = "en-US", phone: bool = False, dark: bool = False, path: str = "/"):
        size = {"width": 390, "height": 844} if phone else {"width": 1280, "height": 800}
        context = browser.new_context(
            viewport=size, locale=language, color_scheme="dark" if dark else "light", is_mobile=phone, has_touch=phone
        )
        contexts.append(context)
        context.on("request", watch)
        page = context.new_page()
        page.set_default_timeout(120_000)  # the machine may be busy with other tests
        page.on("pageerror", lambda error: broken.append(str(error)))
        page.goto(url + path)
        return page

    yield go
    for context in contexts:
        context.close()
    assert strange == [] and broken == []


@pytest.fixture
def shot():
    """Keep what a page looks like."""

    def keep(page, name: str, whole: bool = False) -> None:
        SHOTS.mkdir(parents=True, exist_ok=True)
        page.screenshot(path=SHOTS / f"{name}.png", full_page=whole)

    return keep


@pytest.fixture
def ask():
    """GET an address, as JSON."""
    return lambda url, **how: httpx.get(url, timeout=20, **how).json()
