"""What this computer has, found without torch: memory and its limits, cores, GPUs.

Containers are told from machines by their cgroup: what is free is what may still be taken, not what the host has.
Everything unknown is left out rather than guessed; the speed of the disk is unknown and plans say what they assume.
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lanting.core.errors import RequestError
from lanting.plan.cards import (
    Card,
    Device,
    amd_cards,
    cut_into_slices,
    large,
    number_in,
    numbered,
    nvidia_cards,
    read,
    shown_by_cuda,
    shown_by_hip,
)
from lanting.plan.devices import names_of

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
CAPABILITIES = Path("/proc/driver/nvidia/capabilities")  # where NVIDIA's driver shows the slices of cards
APPLE_SHARE = 0.7  # of a Mac's memory that its GPU may hold: the system's own limit is 2/3 to 3/4


@dataclass(frozen=True, slots=True)
class Machine:
    """`ram` bytes in all and `ram_free` that may still be taken; `devices` with the fastest first."""

    ram: int
    ram_free: int
    cores: int
    devices: tuple[Device, ...]
    disk_rate: float | None = None  # bytes a second; None: not known

    def device(self, name: str | None) -> Device:
        """The device of that name, the first one for None; of several the one with least memory free. A RequestError
        names those there are."""
        names = self.several(name)
        if len(names) > 1:
            return min(map(self.device, names), key=lambda device: device.free)
        if not names:
            return self.devices[0]
        (name,) = names
        for device in self.devices:
            if name in (device.name, f"{device.name}:0"):
                return device
        raise RequestError(
            "there is no device {name} here; there is {known}",
            **{"name": name, "known": ", ".join(device.name for device in self.devices)},
        )

    def several(self, name: str | None) -> tuple[str, ...]:
        """The names of the devices that one picture is to be drawn on, see `plan.devices`."""
        return names_of(name, sum(device.own_memory for device in self.devices))


def parse_bytes(text: str) -> int:
    """Bytes from "12G", "12GB", "12GiB", "800M" or "7.5 GB"; G is 10^9 and Gi 2^30. Raises RequestError."""
    match = re.fullmatch(r"\s*(\d{1,9}(?:\.\d{1,6})?)\s*([KMGT]I?|)B?\s*", text.upper())
    size = int(float(match[1]) * UNITS[match[2]]) if match else 0
    if size < 10**6 or size > 10**15:
        raise RequestError("the amount of memory {text} is not understood: write it as 12G or 800M", text=repr(text))
    return size


def detect(environ: Mapping[str, str] | None = None) -> Machine:
    """This computer, now."""
    env = os.environ if environ is None else environ
    total, free = memory()
    limit, left = cgroup_memory()
    ram, ram_free = min(total, limit or total), min(free, left if left is not None else free)
    cpu = Device("cpu", cpu_title())
    found = (*gpus(env, (ram // 2, ram_free // 2)), *apple(ram, ram_free), cpu)
    ram_free -= ram_free // 2 if any(device.shared for device in found) else 0  # what is planned for it is taken
    return Machine(ram, ram_free, usable_cores(), found)


def usable_cores() -> int:
    """Those this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory() -> tuple[int, int]:
    """(total, available) bytes of the computer; (0, 0) where it can't be told."""
    if sys.platform == "darwin":
        total = int(_run("sysctl", "-n", "hw.memsize") or 0)
        return total, _mac_available(_run("vm_stat")) or total
    if sys.platform == "win32":
        return _windows_memory()
    return parse_meminfo(read(Path("/proc/meminfo")))


def parse_meminfo(text: str) -> tuple[int, int]:
    """(total, available) from /proc/meminfo."""
    found = {key: int(value) * 1024 for key, value in re.findall(r"^(\w+):\s+(\d+) kB", text, re.MULTILINE)}
    total = found.get("MemTotal", 0)
    return total, found.get("MemAvailable", found.get("MemFree", total))


def cgroup_memory(root: Path = Path("/sys/fs/cgroup"), own: str | None = None) -> tuple[int | None, int | None]:
    """(limit, what is left of it) of the tightest cgroup this process is in; None without a limit.

    Pages of files count as used there but can be taken back, so inactive ones count as left.
    """
    lines = (read(Path("/proc/self/cgroup")) if own is None else own).splitlines()
    path = next((line.split(":", 2)[2] for line in lines if line.startswith("0::")), "/")
    folder = root / path.strip("/")
    best: tuple[int | None, int | None] = (None, None)
    for place in (folder, *folder.parents):
        if not place.is_relative_to(root):
            break
        limit = number_in(place / "memory.max") or number_in(place / "memory/memory.limit_in_bytes")
        if limit is None or limit >= 2**60:
            continue
        used = number_in(place / "memory.current") or number_in(place / "memory/memory.usage_in_bytes") or 0
        stat = read(place / "memory.stat") or read(place / "memory/memory.stat")  # of version 2, of 1
        files = re.search(r"^total_inactive_file (\d+)", stat, re.MULTILINE)
        files = files or re.search(r"^inactive_file (\d+)", stat, re.MULTILINE)
        left = max(limit - used + (int(files[1]) if files else 0), 0)
        if best[1] is None or left < best[1]:
            best = (min(limit, best[0] or limit), min(left, limit))
    return best


def gpus(environ: Mapping[str, str], share: tuple[int, int] = (0, 0)) -> tuple[Device, ...]:
    """NVIDIA's cards by nvidia-smi, else AMD's by the kernel's own files, as torch shows them. `share`: memory, and
    free memory, of those that use the computer's."""
    if cards := nvidia(environ, share):
        return numbered([card.device for _, card in shown_by_cuda(cards, environ)])
    return numbered(large(shown_by_hip(amd_cards(), environ)))


def nvidia(environ: Mapping[str, str], share: tuple[int, int] = (0, 0)) -> list[Card]:
    """NVIDIA's cards with their slices, shown or not."""
    told = _run("nvidia-smi", "--query-gpu=index,name,memory.total,memory.free,uuid", "--format=csv,noheader,nounits")
    if not cut_into_slices(told, environ, CAPABILITIES):
        return nvidia_cards(told, share)
    return nvidia_cards(told, share, _run("nvidia-smi", "-L"), _run("nvidia-smi", "-q", "-x"))


def apple(ram: int, free: int) -> tuple[Device, ...]:
    """The GPU of an Apple chip, which uses the computer's memory."""
    if sys.platform != "darwin" or platform.machine() != "arm64":
        return ()
    title = _run("sysctl", "-n", "machdep.cpu.brand_string").strip() or "Apple GPU"
    return (Device("mps", title, int(ram * APPLE_SHARE), min(int(ram * APPLE_SHARE), free)),)


def cpu_title() -> str:
    """The processor's own name for itself."""
    if sys.platform == "darwin":
        return _run("sysctl", "-n", "machdep.cpu.brand_string").strip() or "CPU"
    if title := _windows_processor():
        return title
    match = re.search(r"^model name\s*:\s*(.+)$", read(Path("/proc/cpuinfo")), re.MULTILINE)
    return match[1].strip() if match else "CPU"


def _mac_available(text: str) -> int:
    """Free, inactive and speculative pages of vm_stat."""
    page = re.search(r"page size of (\d+) bytes", text)
    pages = re.findall(r"Pages (?:free|inactive|speculative):\s+(\d+)", text)
    return int(page[1]) * sum(map(int, pages)) if page else 0


def _windows_memory() -> tuple[int, int]:
    """(total, available) from GlobalMemoryStatusEx: two 32-bit numbers, then 64-bit ones."""
    status = (ctypes.c_uint64 * 8)()
    ctypes.cast(status, ctypes.POINTER(ctypes.c_uint32))[0] = ctypes.sizeof(status)
    kernel = getattr(ctypes, "windll").kernel32  # noqa: B009  only Windows has it
    return (status[1], status[2]) if kernel.GlobalMemoryStatusEx(status) else (0, 0)


def _windows_processor() -> str:
    """As the registry has it."""
    if sys.platform != "win32":
        return ""
    import winreg

    try:
        place = "HARDWARE\\DESCRIPTION\\System\\CentralProcessor\\0"
        with winreg.OpenKey(winreg.HKEY_LOCAL_MACHINE, place) as key:
            return str(winreg.QueryValueEx(key, "ProcessorNameString")[0]).strip()
    except OSError:
        return ""


def _run(*command: str) -> str:
    """A command's output; empty where it is missing, fails, or takes longer than three seconds."""
    try:
        done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", timeout=3, check=False)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout if done.returncode == 0 else ""
