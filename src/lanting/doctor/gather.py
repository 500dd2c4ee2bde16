"""The facts themselves: asked of this machine, each within a bounded time, and nothing is changed by asking."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from lanting.core.errors import LantingError
from lanting.core.lang import explain
from lanting.doctor.hardware import Kernels
from lanting.doctor.software import EXTRAS, Cards, Interpreter, Torch
from lanting.doctor.storage import WANTED, Begun, Disk, Held

PATIENCE = 90  # seconds that torch gets to answer: the first import after a start of the machine is slow
PROBE = """
import json, sys
try:
    import torch
    place = sys.argv[1]
    left = torch.ones(64, 64, device=place)
    print(json.dumps({"ok": float((left @ left).sum().item()) == 64.0**3}))
except Exception as error:
    print(json.dumps({"error": (str(error).strip().splitlines() or [type(error).__name__])[0][:200]}))
"""


def ask(*command: str, seconds: float = 10) -> tuple[int | None, str]:
    """(exit code, what a program said); (None, "") where there is none or it takes longer."""
    try:
        done = subprocess.run(
            command, capture_output=True, encoding="utf-8", errors="replace", check=False, timeout=seconds
        )
    except (OSError, subprocess.TimeoutExpired):
        return None, ""
    return done.returncode, done.stdout.strip() or done.stderr.strip()


def interpreter() -> Interpreter:
    translated = sys.platform == "darwin" and ask("sysctl", "-n", "sysctl.proc_translated") == (0, "1")
    bits = 64 if sys.maxsize > 2**32 else 32
    return Interpreter(sys.version_info[:3], bits, platform.machine(), translated)


def torch() -> Torch | None:
    """From the package's own file; its metadata does not always name the build."""
    found = find_spec("torch")
    if found is None or found.origin is None:
        return None
    try:
        text = Path(found.origin).with_name("version.py").read_text(encoding="utf-8")
    except OSError:
        text = ""
    said = dict(re.findall(r"^(\w+)[^=\n]*= ['\"]([^'\"]+)['\"]", text, re.MULTILINE))
    try:
        number, _, build = said.get("__version__", version("torch")).partition("+")
    except PackageNotFoundError:
        return None
    if not build and "cuda" in said:
        build = "cu" + "".join(said["cuda"].split(".")[:2])
    return Torch(number, build or (f"rocm{said['hip']}" if "hip" in said else "cpu"))


def cards() -> Cards:
    """GPUs, whether CUDA_VISIBLE_DEVICES hides them or not."""
    from lanting.plan.cards import amd_cards, large

    amd = next((device.title for device in large(amd_cards()) if device is not None), "")
    apple = f"{ask('sysctl', '-n', 'machdep.cpu.brand_string')[1]} GPU" if on_apple() else ""
    code, rows = ask("nvidia-smi", "--query-gpu=name,driver_version,compute_cap", "--format=csv,noheader")
    found = [line.split(", ") for line in rows.splitlines() if line.count(", ") >= 2] if code == 0 else []
    if not found:
        failed = (rows.splitlines() or ["?"])[0] if code is not None and shutil.which("nvidia-smi") else ""
        return Cards(failed=failed, silent=not failed and code is None and in_slots(), amd=amd, apple=apple)
    speaks = re.search(r"CUDA (?:\w+ )?Version: (\d+\.\d+)", ask("nvidia-smi")[1])
    abilities = [tuple(map(int, row[-1].split("."))) for row in found if re.fullmatch(r"\d+\.\d+", row[-1].strip())]
    lowest = min(abilities, default=(0, 0))
    return Cards(
        tuple(", ".join(row[:-2]) for row in found), found[0][-2], speaks[1] if speaks else "", (lowest[0], lowest[1]),
        amd=amd, apple=apple,
    )  # fmt: skip


def on_apple() -> bool:
    return sys.platform == "darwin" and platform.machine() == "arm64"


def in_slots(root: Path = Path("/sys/bus/pci/devices")) -> bool:
    """Whether a graphics device of NVIDIA's is in the machine, as the kernel lists them."""
    for folder in root.glob("*"):
        try:
            maker, kind = ((folder / name).read_text(encoding="ascii").strip() for name in ("vendor", "class"))
        except OSError:
            continue
        if maker == "0x10de" and kind.startswith("0x03"):
            return True
    return False


def computing(gpus: Cards, found: Torch | None, hidden: bool, seconds: int = PATIENCE) -> Mapping[str, object] | None:
    """What torch says in a process of its own; None where there is nothing to ask it."""
    built = found is not None and found.build.startswith(("cu", "rocm")) and bool(gpus.names or gpus.amd)
    apple = found is not None and bool(gpus.apple)
    if hidden or not (built or apple):
        return None
    code, said = ask(sys.executable, "-c", PROBE, "mps" if apple else "cuda", seconds=seconds)
    if code is None:
        return {"silent": True}
    try:
        told = json.loads(said.splitlines()[-1])
        return told if isinstance(told, dict) else {"error": said[:200]}
    except (ValueError, IndexError):
        return {"error": (said.splitlines() or [f"exit code {code}"])[-1][:200]}


def kernels() -> Kernels:
    from lanting.kernels import build
    from lanting.kernels.library import OFF, instruction_set, known_sets

    asked = os.environ.get("LANTING_KERNELS", "").lower()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a set that does not run here: there is a finding for that
        used, known = instruction_set(), known_sets()
    compiler = " ".join(build.compiler() or [])
    return Kernels(used, known, asked in OFF, compiler, build.fresh(), sys.platform, asked)


def missing() -> dict[str, list[str]]:
    """For every extra, what is not installed of it."""
    return {extra: [name for name in names if not installed(name)] for extra, names in EXTRAS.items()}


def installed(distribution: str) -> bool:
    try:
        return bool(version(distribution))
    except PackageNotFoundError:
        return False


def disk() -> Disk:
    from lanting.plan import release
    from lanting.plan.sizes import parameters
    from lanting.specs import get_spec
    from lanting.weights.home import downloaded, models_folder

    folder = models_folder()
    above = next(path for path in (folder, *folder.parents, Path.cwd()) if path.exists())
    writable = above.is_dir() and os.access(above, os.W_OK | os.X_OK)
    free = shutil.disk_usage(above).free
    needs = 0 if downloaded(WANTED) else 2 * sum(parameters(release(get_spec(WANTED)).geometry).values())
    return Disk(folder, above, free, writable, needs)


def begun() -> list[Begun]:
    """Downloads that stopped."""
    from lanting.weights.home import STAGING, folder_size, models_folder, read_marker, unfinished

    found = []
    for folder in sorted(models_folder().glob("*/")):
        if not (folder / STAGING).is_dir() or read_marker(folder) is not None:
            continue
        state = unfinished(folder)
        have, total = (state.have, state.total) if state else (folder_size(folder), 0)
        found.append(Begun(name_of(folder), have, total))
    return found


def name_of(folder: Path) -> str:
    """What a person pulls to get what is in a folder of ours."""
    from lanting.specs import spec_names

    return folder.name if folder.name in spec_names() else folder.name.replace("--", "/", 1)


def held() -> Iterator[Held]:
    """Models that are here: nano, pulled ones, and releases in Hugging Face's cache. Headers are read, weights not."""
    from lanting.specs import get_spec, spec_names
    from lanting.weights.home import downloaded, hub_cache, missing_files, models_folder, read_marker

    yield Held("nano", Path(), wrong_with("nano"), pulled=False)
    for folder in sorted(models_folder().glob("*/")):
        if read_marker(folder) is None:
            continue
        gone, name = missing_files(folder), name_of(folder)
        yield Held(name, folder, gone[0] if gone else wrong_with(str(folder)))
    seen: set[Path] = set()
    for name in spec_names():
        folder = downloaded(name) if name != "nano" and not get_spec(name).lora else None
        if folder is not None and folder not in seen and folder.is_relative_to(hub_cache()):
            seen.add(folder)
            yield Held(name, folder, wrong_with(str(folder)), pulled=False)


def wrong_with(model: str) -> str:
    """What its configs and headers say is wrong; "" where nothing is."""
    from lanting.weights.find import locate
    from lanting.weights.sized import planned_model

    try:
        planned_model(locate(model))
    except LantingError as error:
        return explain(error)
    except (OSError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return ""
