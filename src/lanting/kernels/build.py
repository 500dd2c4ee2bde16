"""Compile the kernels: `python src/lanting/kernels/build.py`. Called by installing, by `make`, or by hand.

Needs nothing but Python and a C++ compiler (`CXX`, g++ or clang++). The same sources are compiled once for every
instruction set that this compiler knows; which one runs is decided when they are loaded. Where there is no compiler
nothing is built, and everything runs on torch's own operations. On Windows the compiler is Zig's, which pip installs
(`pip install ziglang`): GCC puts vectors of 32 bytes on stacks that are aligned to 16 there, and programs crash; that
of Visual Studio takes neither these flags nor these sources.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

HERE = Path(__file__).parent
SOURCES = HERE / "csrc"
LIBRARY = HERE / "libkernels.so"  # with what it was built from beside it, in libkernels.txt
SIMPLE = ("-O3", "-std=c++17", "-fPIC", "-fno-math-errno", "-fno-trapping-math", "-fopenmp-simd", "-ffp-contract=fast")
WARNINGS = ("-Wall", "-Wextra", "-fvisibility=hidden", "-Wno-ignored-attributes", "-Wno-psabi")
AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni", "-mfma", "-mprefer-vector-width=512")
SETS = {  # the best first: what each instruction set is compiled with
    "x86_64": (
        ("amx", (*AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-int8", "-mamx-bf16")),
        ("avx512_bf16", (*AVX512, "-mavx512bf16")),
        ("avx512_vnni", AVX512),
        ("avx_vnni", ("-mavx2", "-mfma", "-mf16c", "-mavxvnni")),
        ("avx2", ("-mavx2", "-mfma", "-mf16c")),
        ("plain", ()),
    ),
    "aarch64": (("dotprod", ("-march=armv8.2-a+dotprod",)), ("plain", ())),
}
MACHINES = {"amd64": "x86_64", "x64": "x86_64", "arm64": "aarch64"}
Flags = Sequence[str]


def compiler() -> list[str] | None:
    """The command of a C++ compiler, or None."""
    asked = os.environ.get("CXX", "").split()
    windows = sys.platform == "win32"
    for command in (asked,) if windows else (asked, ["g++"], ["clang++"], ["c++"]):
        if command and shutil.which(command[0]):
            return command
    if windows and importlib.util.find_spec("ziglang"):  # for any processor of its kind, not for this one alone
        return [sys.executable, "-m", "ziglang", "c++", "-target", f"{machine()}-windows-gnu"]
    return None


def machine() -> str:
    name = platform.machine().lower()
    return MACHINES.get(name, name)


def call(command: Sequence[str]) -> None:
    """Raises RuntimeError with what the compiler says."""
    done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace")
    if done.returncode:
        raise RuntimeError(done.stderr.strip()[-2000:] or f"{command[0]} failed")


def knows(command: Sequence[str], flags: Flags, folder: Path) -> bool:
    """Whether the compiler knows these instructions."""
    if not flags:
        return True
    probe = folder / "probe.cpp"
    probe.write_text("int main() { return 0; }\n", encoding="ascii")
    try:
        call([*command, *flags, "-c", str(probe), "-o", str(folder / "probe.o")])
    except RuntimeError:
        return False
    return True


def build(out: Path = LIBRARY, extra: Flags = (), sets: Sequence[str] = ()) -> tuple[str, ...]:
    """Compile into `out`, whole or not at all, and say so in a file beside it; returns the instruction sets in it.

    `extra` are more flags (`-fsanitize=address`, say), `sets` the only ones to be built. Raises RuntimeError where no
    compiler is found or it fails.
    """
    command = compiler()
    if command is None:
        known = "pip install ziglang" if sys.platform == "win32" else "g++ or clang++"
        raise RuntimeError(f"no C++ compiler was found ({known}, or name one in CXX)")
    known, sources = SETS.get(machine(), (("plain", ()),)), digest()  # of now: they may change while this runs
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        chosen = [(s, f) for s, f in known if (not sets or s in sets) and knows(command, f, folder)]
        each = "-DLT_EACH(X)=" + " ".join(f"X({s})" for s, _ in chosen)
        jobs = [("pool", "pool.cpp", ()), ("block", "block.cpp", ()), ("dispatch", "dispatch.cpp", (each,))]
        jobs += [(s, "kernels.cpp", (*f, f"-DLT_NAME={s}")) for s, f in chosen]
        common, objects = (*command, *SIMPLE, *WARNINGS, *extra, "-c"), [str(folder / f"{job[0]}.o") for job in jobs]
        commands = [
            (*common, *flags, str(SOURCES / source), "-o", to)
            for (_, source, flags), to in zip(jobs, objects, strict=True)
        ]
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            list(threads.map(call, commands))
        call([*command, "-shared", *extra, *objects, "-o", str(folder / "made.dll"), "-pthread"])
        put(folder / "made.dll", out)
    names = tuple(s for s, _ in chosen)
    stamp(out).write_text(f"{sources} {out.stat().st_size} {' '.join(names)}\n", encoding="ascii")
    return names


def put(made: Path, out: Path) -> None:
    """Copy beside `out`, then rename: whoever has the old library mapped keeps it, and two builds don't meet."""
    part = out.with_name(f"{out.name}.{os.getpid()}.part")
    try:
        shutil.copyfile(made, part)
        os.replace(part, out)
    finally:
        part.unlink(missing_ok=True)


def digest() -> str:
    """Of what a library is built from: sources, this file and the machine."""
    found = hashlib.sha256(machine().encode())
    for path in (*sorted(SOURCES.glob("*.*")), Path(__file__)):
        found.update(path.read_bytes())
    return found.hexdigest()


def stamp(library: Path) -> Path:
    return library.with_suffix(".txt")


def whole(library: Path = LIBRARY) -> bool:
    """Whether a library is as long as its build made it: loading half a one kills the process."""
    try:
        return int(stamp(library).read_text(encoding="ascii").split()[1]) == library.stat().st_size
    except (OSError, ValueError, IndexError):
        return False


def fresh(library: Path = LIBRARY) -> bool:
    """Whether what lies there is built from what lies here."""
    return whole(library) and stamp(library).read_text(encoding="ascii").split()[0] == digest()


def main(library: Path = LIBRARY) -> int:
    """Build where needed. Never fails an installation: without kernels everything is only slower."""
    if fresh(library):
        return 0
    try:
        made = build(library)
    except (RuntimeError, OSError) as error:
        with suppress(OSError):  # Windows keeps one that is in use
            for path in (library, stamp(library)):  # of other sources, and perhaps of another interface
                path.unlink(missing_ok=True)
        print(f"lanting's kernels are not built, torch does their work: {error}", file=sys.stderr)
        return 0
    print(f"lanting's kernels are built: {', '.join(made)}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
