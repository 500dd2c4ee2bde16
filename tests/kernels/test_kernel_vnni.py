"""AVX-VNNI, which processors without AVX-512 have: where this one lacks it, its one instruction is pretended."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_kernel_sanitized import ALONE, HERE, ROOT, RUN

from kernel_cases import SETS
from lanting.kernels import build

# `plain` is compiled from the same lines with and without, and has its tests where all sets have theirs
WHICH = "not forked and not threads_of_python and not plain"
FILES = [str(HERE / f"test_kernel_{name}.py") for name in ("weights", "products", "rows")]


def test_products_with_the_instruction_pretended(tmp_path: Path):
    """All that is laid out for it, and its unsigned side, are then compiled as for a processor that has it."""
    if "avx2" not in SETS:
        pytest.skip("this processor has no AVX2")
    path = tmp_path / "kernels.so"
    assert build.build(path, ("-DLT_PRETEND_VNNI", "-O1"), ("avx2", "plain")) == ("avx2", "plain")
    env = os.environ | ALONE | {"PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests")])}
    command = [sys.executable, "-c", RUN, str(path), WHICH, *FILES]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert "[100%]" in done.stdout


def test_the_real_one_is_compiled(tmp_path: Path):
    command, flags = build.compiler(), dict(build.SETS["x86_64"])["avx_vnni"]
    if command is None or build.machine() != "x86_64" or not build.knows(command, flags, tmp_path):
        pytest.skip("no compiler here knows this instruction")
    assert "avx_vnni" in build.stamp(build.LIBRARY).read_text().split()
