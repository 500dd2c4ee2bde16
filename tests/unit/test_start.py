"""What a first picture must not cost: imports that nobody asked for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import tiny

from lanting.cli.main import main


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


TORCH = """
import os, signal, time
try:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.3)
except KeyboardInterrupt:
    pass
"""  # what the real one's compiled part does, where it doesn't die
IMPORT = """
import time
from lanting.cli.main import hear_ctrl_c
hear_ctrl_c()
try:
    import torch
    time.sleep(5)
    print("lost")
except KeyboardInterrupt:
    print("heard")
"""


def test_ctrl_c_while_torch_is_imported_is_not_lost(tmp_path):
    (tmp_path / "torch.py").write_text(TORCH)
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(Path(__file__).parents[2] / "src")])}
    done = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, env=env, timeout=60)
    assert done.stdout == "heard\n", done.stderr


def test_ctrl_c_while_a_verb_is_read_is_no_traceback(monkeypatch, capsys):
    def interrupted(verbs):
        raise KeyboardInterrupt

    monkeypatch.setattr("lanting.cli.main.command_line", interrupted)
    assert main(["generate", "x"]) == 130
    assert "cancelled" in capsys.readouterr().err
