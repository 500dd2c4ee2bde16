"""The kernels compile for real GPUs: Triton brings the assembler, so none has to be here."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
SHARED = {86: 101_376, 90: 227_000}  # bytes that a program may share; 80 has 163,000


def test_for_ampere_and_hopper(tmp_path):
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    env |= {"PYTHONPATH": str(HERE.parents[1] / "src"), "TRITON_CACHE_DIR": str(tmp_path)}
    program = [sys.executable, str(HERE / "compile_kernels.py"), *map(str, SHARED)]
    done = subprocess.run(program, capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line.split() for line in done.stdout.splitlines()]
    for capability, most in SHARED.items():
        mine = [line[1:] for line in lines if line[0] == str(capability)]
        assert len(mine) >= (15 if capability == 90 else 6)
        assert all(int(shared) <= most and int(size) > 1000 for _, shared, size in mine)
