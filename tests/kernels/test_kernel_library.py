"""What is done where the library is missing, of another version or broken, and what LANTING_KERNELS says."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernel_cases import SETS
from lanting.kernels import build, calls
from lanting.kernels import library as lib

ROOT = Path(__file__).parents[2]


def ask(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Python in a process of its own, with the library's module as `lib`."""
    code = f"from lanting.kernels import library as lib\n{code}"
    given = os.environ | {"PYTHONPATH": str(ROOT / "src")} | env
    return subprocess.run([sys.executable, "-c", code], env=given, capture_output=True, text=True, timeout=60)


def test_they_are_built_where_there_is_a_compiler():
    """Else all other tests of this folder would be left out unnoticed."""
    assert build.compiler() is None or SETS
    assert not SETS or SETS[-1] == "plain"


@pytest.mark.parametrize("name", [*SETS, ""])
def test_the_environment_names_an_instruction_set(name):
    done = ask("print(lib.instruction_set())", LANTING_KERNELS=name.upper())
    assert done.stdout.strip() == (name or lib.known_sets()[0])
    assert done.stderr == ""


@pytest.mark.parametrize("word", ["off", "OFF", "0", "no"])
def test_the_environment_turns_them_off(word):
    code = "print(lib.ready(), repr(lib.instruction_set()), lib.known_sets()); lib.use_threads(2)"
    done = ask(code, LANTING_KERNELS=word)
    assert done.stdout.strip() == "False '' ()"
    assert done.stderr == ""


def test_an_unknown_instruction_set_is_told():
    done = ask("print(lib.instruction_set())", LANTING_KERNELS="avx9")
    assert done.stdout.strip() == lib.known_sets()[0]
    assert "no avx9 runs here" in done.stderr


REFUSED = """
import ctypes, os, struct
code = [(0x20, 0, 0, 0), (0x15, 0, 3, 158), (0x20, 0, 0, 16), (0x15, 0, 1, 0x1023)]  # arch_prctl, asking for a state
code += [(0x06, 0, 0, 0x50001), (0x06, 0, 0, 0x7FFF0000)]  # fails, or goes on
text = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *each) for each in code))
class Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("at", ctypes.c_void_p)]
system = ctypes.CDLL(None, use_errno=True)
assert not system.prctl(38, 1, 0, 0, 0)
if system.prctl(22, 2, ctypes.byref(Program(len(code), ctypes.addressof(text))), 0, 0):
    print("no filter")
else:
    print(*lib.known_sets(), lib.instruction_set())
"""


@pytest.mark.skipif("amx" not in SETS, reason="the processor or the compiler has no AMX")
def test_a_system_that_refuses_tiles_gets_the_next_set():
    """A filter of system calls lets asking for them fail, as an old Linux or a sandbox does."""
    done = ask(REFUSED, LANTING_KERNELS="amx")
    assert done.returncode == 0, done.stderr
    if "no filter" in done.stdout:
        pytest.skip("this system lets nobody filter system calls")
    assert done.stdout.split() == [*SETS[1:], SETS[1]]
    assert "no amx runs here" in done.stderr


def test_asking_imports_nothing_heavy():
    done = ask("import sys; print(lib.ready(), 'torch' in sys.modules, 'numpy' in sys.modules)")
    assert done.stdout.split()[1:] == ["False", "False"]


def test_calling_what_is_not_there_is_an_error(monkeypatch):
    monkeypatch.setattr(lib, "library", lambda: None)
    with pytest.raises(RuntimeError, match="not built"):
        calls.quantize(torch.ones(2, 64))


def test_another_set_can_be_used_but_not_any():
    with pytest.raises(ValueError, match="no kernels for avx9"):
        lib.use("avx9")


def put(path: Path, data: bytes, size: int | None = None) -> Path:
    """A file beside which its build says how long it is."""
    path.write_bytes(data)
    build.stamp(path).write_text(f"digest {len(data) if size is None else size} plain\n")
    return path


def test_broken_libraries_are_not_loaded(tmp_path):
    """None of them ends the process, as the system's loader does when half a library is loaded."""
    good = build.LIBRARY.read_bytes()
    assert lib.library(put(tmp_path / "good.so", good)) is not None
    assert lib.library(put(tmp_path / "half.so", good[: len(good) // 2], len(good))) is None
    assert lib.library(put(tmp_path / "empty.so", b"")) is None
    assert lib.library(put(tmp_path / "noise.so", b"noise" * 1000)) is None
    assert lib.library(tmp_path / "missing.so") is None
    (tmp_path / "alone.so").write_bytes(good)
    assert lib.library(tmp_path / "alone.so") is None


@pytest.mark.parametrize("code", ['extern "C" int lt_abi() { return 99; }', 'extern "C" int other() { return 1; }'])
def test_libraries_of_another_version_are_not_used(tmp_path, code):
    command = build.compiler()
    assert command is not None
    (tmp_path / "other.cpp").write_text(code)
    build.call([*command, "-shared", "-fPIC", str(tmp_path / "other.cpp"), "-o", str(tmp_path / "made.so")])
    assert lib.library(put(tmp_path / "other.so", (tmp_path / "made.so").read_bytes())) is None


def test_python_and_c_agree_on_the_version():
    assert f"enum {{ ABI = {lib.ABI} }};" in (build.SOURCES / "abi.h").read_text()
