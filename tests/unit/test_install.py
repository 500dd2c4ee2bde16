"""The installer that `make` calls: uv with pip's settings, and pip where uv fails. No network is asked."""

import runpy
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = r"""
:env:.find-links='/wheels'
global.extra-index-url='https://one.example/simple\nfile:///two/simple'
global.find-links='/others'
global.timeout='60'
install.constraint='/constraints.txt'
"""


@pytest.fixture
def installer(monkeypatch):
    """Its names, and the commands it would run; those with a word of `fails` in them fail."""
    ran, environments, fails = [], [], set()

    def run(command, **how):
        ran.append(" ".join(command[1:]))
        environments.append(how.get("env") or {})
        code = int(any(word in ran[-1] for word in fails))
        return subprocess.CompletedProcess(command, code, SETTINGS if command[-1] == "list" else "")

    monkeypatch.setattr(subprocess, "run", run)
    return runpy.run_path(str(ROOT / "tools" / "install.py")), ran, environments, fails


def test_uv_is_told_what_pip_is_told(installer):
    names, _, _, _ = installer
    assert names["translated"](names["configured"]()) == {
        "UV_FIND_LINKS": "/wheels",
        "UV_INDEX": "https://one.example/simple file:///two/simple",
        "UV_CONSTRAINT": "/constraints.txt",
    }


def test_what_is_set_for_uv_itself_wins(installer, monkeypatch):
    names, ran, environments, _ = installer
    monkeypatch.setenv("UV_FIND_LINKS", "/mine")
    assert names["by_uv"](".[dev]") is True
    assert ran[-1].startswith("-m uv pip install") and ran[-1].endswith("--editable .[dev]")
    assert environments[-1]["UV_FIND_LINKS"] == "/mine"


@pytest.mark.parametrize("failing", ["uv>=", "-m uv"])
def test_pip_installs_where_uv_does_not(installer, monkeypatch, failing):
    names, ran, _, fails = installer
    fails.add(failing)
    monkeypatch.setattr("sys.argv", ["install.py"])
    assert names["main"]() == 0
    assert ran[-1] == "-m pip --disable-pip-version-check install --quiet --editable ."


def test_a_failing_pip_is_told(installer, monkeypatch):
    names, _, _, fails = installer
    fails |= {"uv", "--editable"}
    monkeypatch.setattr("sys.argv", ["install.py", "test"])
    assert names["main"]() == 1
