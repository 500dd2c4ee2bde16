"""A small C++ program calls every kernel (driver.cpp): under ThreadSanitizer, and compiled for ARM.

ARM is emulated where qemu is installed; where only the cross compiler is, compiling has to do.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from kernel_cases import SETS, sanitizer
from lanting.kernels import build

DRIVER = Path(__file__).parent / "driver.cpp"
ARM, QEMU = "aarch64-linux-gnu-g++", "qemu-aarch64"
HERE = platform.machine() == "x86_64" and SETS


def compiled(out: Path, *flags: str) -> Path:
    """The driver as a program."""
    command = build.compiler()
    assert command is not None
    include = f"-I{build.SOURCES}"
    build.call([*command, "-std=c++17", "-O1", *flags, include, str(DRIVER), "-o", str(out), "-ldl", "-pthread"])
    return out


def printed(command: list[str], library: Path, isa: str, threads: int) -> dict[str, np.ndarray]:
    """What the driver says, as numbers by name."""
    done = subprocess.run([*command, str(library), isa, str(threads)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    lines = (line.split() for line in done.stdout.splitlines())
    return {name: np.array(numbers, float) for name, *numbers in lines}


def assert_agree(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> None:
    """Codes may differ by one beside ties, and products by what follows from that."""
    assert found.keys() == wanted.keys()
    for name, numbers in wanted.items():
        apart = np.abs(found[name] - numbers)
        if name.startswith("codes"):
            assert apart.max() <= 1, name
            assert (apart > 0).mean() < 0.05, name
        else:
            allowed = 0.005 if name.startswith("product") else 1e-6
            assert np.linalg.norm(apart) <= allowed * np.linalg.norm(numbers), name


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, np.ndarray]]:
    """What every instruction set says here."""
    driver = compiled(tmp_path_factory.mktemp("driver") / "driver")
    return {isa: printed([str(driver)], build.LIBRARY, isa, 2) for isa in SETS}


@pytest.mark.parametrize("isa", SETS)
def test_instruction_sets_agree(here, isa):
    assert_agree(here[isa], here["plain"])


@pytest.mark.skipif(not sanitizer("libtsan.so"), reason="the compiler has no ThreadSanitizer")
def test_threads_do_not_race(tmp_path, here):
    """Three threads of the pool and two callers; any two accesses without order end the program with an error."""
    flags = ("-fsanitize=thread", "-O1", "-g1")
    build.build(tmp_path / "kernels.so", flags, ("plain",))
    driver = compiled(tmp_path / "driver", *flags)
    assert_agree(printed([str(driver)], tmp_path / "kernels.so", "plain", 3), here["plain"])


@pytest.fixture(scope="module")
def arm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the library and the driver for 64-bit ARM."""
    if not shutil.which(ARM):
        pytest.skip(f"there is no {ARM}")
    folder = tmp_path_factory.mktemp("arm")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CXX", ARM)
        patch.setattr(build, "machine", lambda: "aarch64")
        assert build.build(folder / "kernels.so") == ("dotprod", "plain")
        compiled(folder / "driver")
    return folder


def test_they_compile_for_arm(arm):
    assert (arm / "kernels.so").read_bytes()[18:20] == b"\xb7\x00"  # ELF's number for it


def emulated(folder: Path, processor: str) -> list[str]:
    if not shutil.which(QEMU):
        pytest.skip(f"there is no {QEMU}")
    root = os.environ.get("QEMU_LD_PREFIX", "/usr/aarch64-linux-gnu")
    return [QEMU, "-cpu", processor, "-L", root, str(folder / "driver")]


@pytest.mark.skipif(not HERE, reason="nothing to compare with")
@pytest.mark.parametrize("isa", ["dotprod", "plain"])
def test_arm_computes_the_same(arm, here, isa):
    assert_agree(printed(emulated(arm, "max"), arm / "kernels.so", isa, 2), here["plain"])


def test_arm_without_dot_products_does_not_try_them(arm):
    """A Raspberry Pi 4, say."""
    command = emulated(arm, "cortex-a53")
    done = subprocess.run([*command, str(arm / "kernels.so"), "dotprod", "1"], capture_output=True, text=True)
    assert done.returncode == 1
    assert "lt_use failed" in done.stderr
    assert printed(command, arm / "kernels.so", "plain", 1)
