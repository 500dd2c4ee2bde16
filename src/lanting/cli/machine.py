"""`lanting show --machine`: what this computer has, and which kernels run on it. No torch, so it answers at once."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from itertools import chain, repeat
from typing import TYPE_CHECKING, Any

from lanting.cli.screen import Screen
from lanting.core.lang import say
from lanting.doctor.gather import ask
from lanting.doctor.hardware import BUILD

if TYPE_CHECKING:
    from lanting.plan import Device


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
        "attention": "lanting" if instruction_set() else "torch",
        "gpus": [
            {"name": each.name, "title": each.title, "memory": each.memory, "free": each.free} | computes(each, found)
            for each, found in zip(gpus(), capabilities(), strict=False)
        ],
    }


def capabilities() -> Iterator[tuple[int, int]]:
    """Compute capabilities of NVIDIA's cards, in the order of `gpus`; (0, 0) for what is none."""
    from lanting.plan.cards import Card, cut_into_slices, shown_by_cuda, slices
    from lanting.plan.machine import CAPABILITIES

    told = ask("nvidia-smi", "--query-gpu=compute_cap,uuid", "--format=csv,noheader")[1].splitlines()
    rows = [line.partition(", ") for line in told]
    rows = [(*word.strip().partition("."), uuid.strip()) for word, _, uuid in rows]
    rows = [(int(a), int(b), uuid) for a, dot, b, uuid in rows if dot and (a + b).isdigit()]
    listing = ask("nvidia-smi", "-L")[1] if cut_into_slices("\n".join(told), os.environ, CAPABILITIES) else ""
    parts = slices(listing, "", [""] * len(rows))
    cards = [Card(uuid, None, cut) for (*_, uuid), cut in zip(rows, parts, strict=True)]
    return chain((rows[index][:2] for index, _ in shown_by_cuda(cards, os.environ)), repeat((0, 0)))


def computes(device: Device, capability: tuple[int, int]) -> dict[str, Any]:
    """What computes on a GPU: "triton" and its version, or why not; whether steps are recorded; attentions that are
    tried there, the first right one being taken."""
    from lanting.kernels.gpu.names import OLDEST, candidates, triton
    from lanting.kernels.library import OFF

    nvidia = device.name.startswith("cuda") and capability > (0, 0)
    why = "off" if switched_off() else "other" if not nvidia else "old" if capability < OLDEST else ""
    why = why or ("" if triton() else "missing")
    return {
        "capability": ".".join(map(str, capability)) if nvidia else "",
        "kernels": why or f"triton {triton()}",
        "recorded": nvidia and why != "off" and os.environ.get("LANTING_GRAPHS", "").strip().lower() not in OFF,
        "compiled": os.environ.get("LANTING_COMPILE", "").strip().lower() or "off",
        "attention": list(candidates(capability)) if nvidia and why != "off" else ["torch"],
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
        tell_computing(screen, gpu)
    if not told["gpus"]:
        screen.line("GPU: none")


def tell_computing(screen: Screen, gpu: Mapping[str, Any]) -> None:
    """Kernels, attention and recording of one GPU."""
    if gpu["kernels"] == "off":
        screen.line("  kernels: switched off by LANTING_KERNELS; torch does their work")
    elif gpu["kernels"] == "other":
        screen.line("  kernels: none for this GPU; torch does their work")
    elif gpu["kernels"] == "old":
        screen.line("  kernels: none for GPUs before Ampere; torch does their work")
    elif gpu["kernels"] == "missing":
        screen.line("  kernels: Triton is not installed; torch does their work")
    else:
        screen.line("  kernels: {name}", name=gpu["kernels"])
    screen.line("  attention: the first of {known} that is right", known=", ".join(gpu["attention"]))
    if gpu["recorded"]:
        screen.line("  steps are recorded")
    else:
        screen.line("  steps are not recorded")
