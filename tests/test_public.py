"""What the package promises: its names, its version, and documents that agree with the code."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import lanting

ROOT = Path(__file__).parents[1]


def test_public_names_exist_and_are_sorted():
    assert lanting.__all__ == sorted(lanting.__all__)
    for name in lanting.__all__:
        assert getattr(lanting, name).__name__ == name
    assert set(lanting.__all__) <= set(dir(lanting))
    assert not hasattr(lanting, "Nonsense")


def test_importing_the_package_is_light():
    code = "import sys, lanting; lanting.Request; print('torch' in sys.modules, 'PIL' in sys.modules)"
    env = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=60)
    assert done.stdout.split() == ["False", "False"], done.stderr


def test_one_version():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["version"] == lanting.__version__
    assert f"## {lanting.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_make_and_ci_are_the_documented_words():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for word in ("run", "test", "check", "fmt"):
        assert f"\n{word}:" in makefile
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
