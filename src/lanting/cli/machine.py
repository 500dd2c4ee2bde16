"""`lanting show --machine`: what this computer has, and which kernels run on it. No torch, so it answers at once."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from lanting.cli.screen import Screen
from lanting.core.lang import say

if TYPE_CHECKING:
    from lanting.plan import Device

BUILD = "python -m lanting.kernels.build"


def facts() -> dict[str, Any]:
    """For programs. `kernels.set` is the instruction set in use, "" where there are none."""
    from lanting.kernels.library import instruction_set, known_sets, ready, thread_count
    from lanting.plan import detect

    machine = detect()
    return {
        "processor": machine.device("cpu").title,
        "cores": machine.cores,
        "threads": thread_count(),
        "ram": machine.ram,
        "ram_free": machine.ram_free,
        "kernels": {
            "set": instruction_set(),
            "known": list(known_sets()),
            "off": switched_off(),
            "build": "" if ready() else BUILD,
        },
        "gpus": [{"name": each.name, "title": each.title, "memory": each.memory, "free": each.free} for each in gpus()],
    }


def gpus() -> tuple[Device, ...]:
    from lanting.plan import detect

    return tuple(device for device in detect().devices if device.name != "cpu")


def switched_off() -> bool:
    """A person wants no kernels."""
    from lanting.kernels.library import OFF

    return os.environ.get("LANTING_KERNELS", "").lower() in OFF


def tell(screen: Screen) -> None:
    """The same for people."""
    from lanting.plan.words import size

    told = facts()
    screen.line("processor: {title}", title=told["processor"])
    screen.line("cores: {cores}; threads: {threads}", cores=told["cores"], threads=told["threads"])
    screen.line("memory: {ram}, {free} free", ram=size(told["ram"]), free=size(told["ram_free"]))
    kernels = told["kernels"]
    if kernels["set"]:
        screen.line("kernels: {name}, of {known}", name=kernels["set"], known=", ".join(kernels["known"]))
    elif kernels["off"]:
        screen.line("kernels: switched off by LANTING_KERNELS; torch does their work")
    else:
        screen.line("kernels: not built, torch does their work; to build them: {command}", command=BUILD)
    for gpu in told["gpus"]:
        memory = say("{size} VRAM", size=size(gpu["memory"]))
        screen.line("GPU: {title}, {memory}, {free} free", title=gpu["title"], memory=memory, free=size(gpu["free"]))
    if not told["gpus"]:
        screen.line("GPU: none")
