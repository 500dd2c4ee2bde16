"""The other tests of this folder once more, with a library that stops at any access out of bounds and anything that C++
leaves undefined. Tensors are as long as their numbers, so that one byte too far is noticed.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kernel_cases import SETS, sanitizer
from lanting.kernels import build

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
FLAGS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-O1", "-g1")  # lines in its reports
NAMES = ("weights", "products", "dense", "rows", "attention", "conv", "threads")
FILES = [str(HERE / f"test_kernel_{name}.py") for name in NAMES]
BUT = "not forked and not more_rows and not largest_sums and not threads_of_python and not 27000 and not 800"  # long
ALONE = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # their imports take seconds, and no test of kernels needs one
LOAD = """
import sys
from pathlib import Path
from lanting.kernels import library as lib
found = lib.library(Path(sys.argv[1]))
assert found is not None
lib.library = lambda: found
"""
RUN = f"""{LOAD}
import pytest
sys.exit(pytest.main(["-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", "-k", sys.argv[2], *sys.argv[3:]]))
"""
OVERRUN = f"""{LOAD}
from ctypes import byref, c_float
weight = lib.Weight(None, None, None, 8, 0, 0, 1, 0, 0)
print("ready", flush=True)
found.lt_bounds(byref(weight), byref((c_float * 7)()))
"""


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library with the best instruction set and the plain one."""
    if not sanitizer("libasan.so"):
        pytest.skip("the compiler has no sanitizers that could be loaded")
    path = tmp_path_factory.mktemp("sanitized") / "kernels.so"
    build.build(path, FLAGS, (SETS[0], "plain"))
    return path


def python(code: str, library: Path, *given: str, **more: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {
        "LD_PRELOAD": sanitizer("libasan.so"),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python and torch keep what they have
        "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests")]),
        "OMP_NUM_THREADS": "1",
        **ALONE,
        **more,
    }
    command = [sys.executable, "-c", code, str(library), *given]
    return subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_nothing_is_read_or_written_out_of_bounds(sanitized):
    done = python(RUN, sanitized, BUT, *FILES)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert "[100%]" in done.stdout
    assert "runtime error" not in done.stderr


def test_a_byte_too_far_would_be_noticed(sanitized):
    """Eight bounds do not fit where there is room for seven."""
    done = python(OVERRUN, sanitized, PYTHONMALLOC="malloc")
    assert done.stdout.strip() == "ready"
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr
