"""What a first picture must not cost: imports that nobody asked for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import tiny


def test_drawing_imports_no_compiler_and_no_oracle(tmp_path):
    tiny.save_folder(tmp_path / "model")
    code = (
        "import sys; from lanting.cli.main import main; "
        "code = main(['generate', 'a cat', '--model', 'model', '--size', '32x32', '--steps', '2', '--device', 'cpu', "
        "'--preview', '--quiet']); print(code, *sys.modules)"
    )
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2] / "src")}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, env=env, timeout=120
    )
    code, *modules = done.stdout.splitlines()[-1].split()
    assert code == "0", done.stderr
    unwanted = {"torch._dynamo", "sympy", "transformers", "diffusers", "torchvision", "huggingface_hub", "rich"}
    assert unwanted & set(modules) == set()
    assert "torch" in modules
