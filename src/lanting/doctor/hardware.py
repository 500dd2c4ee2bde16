"""The processor's kernels, and memory: how much there is, and what that means for the releases."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lanting.doctor.finding import Finding, advice, fine, problem, remark

if TYPE_CHECKING:
    from lanting.plan import Machine

BUILD = "python -m lanting.kernels.build"
LARGEST_FIRST = ("qwen-image-2512", "qwen-image-2.1", "nano")
TAKEN = 0.3  # of a GPU's memory: if other programs hold more, that is told
SCARCE = 2 * 10**9  # bytes of free memory below which even small models are tight


@dataclass(frozen=True, slots=True)
class Kernels:
    """`used`: the instruction set, "" for none; `known`: all that run here; `off`: by LANTING_KERNELS; `compiler`: its
    command, "" for none; `fresh`: built from the sources that are here."""

    used: str = ""
    known: tuple[str, ...] = ()
    off: bool = False
    compiler: str = ""
    fresh: bool = True
    system: str = "linux"  # sys.platform
    asked: str = ""  # by LANTING_KERNELS


def kernels(found: Kernels) -> Iterator[Finding]:
    if found.off:
        back = advice("to have them back: unset LANTING_KERNELS")
        yield remark("kernels for the processor are switched off by LANTING_KERNELS", "kernels", back)
    elif found.used and found.asked not in ("", found.used):
        known = advice("there are {known}; or leave the choice: unset LANTING_KERNELS", known=", ".join(found.known))
        yield remark(
            "LANTING_KERNELS names {name}, which does not run here: {used} does", "kernels", known,
            name=found.asked, used=found.used,
        )  # fmt: skip
    elif found.used and not found.fresh:
        anew = advice("build them anew: {command}", command=BUILD)
        yield remark(
            "kernels for the processor ({name}) are of other sources than these", "kernels", anew, name=found.used
        )
    elif found.used:
        known = ", ".join(found.known)
        yield fine("kernels for the processor: {name}, of {known}", "kernels", name=found.used, known=known)
    elif found.compiler:
        build = advice("build them: {command}", command=BUILD)
        yield remark(
            "kernels for the processor are not built, torch does their work more slowly ({compiler} is here)",
            "kernels", build, compiler=found.compiler,
        )  # fmt: skip
    else:
        get = {"darwin": "xcode-select --install", "win32": "pip install ziglang"}
        install = get.get(found.system, "sudo apt install g++")
        build = advice("get a compiler ({install}), then build them: {command}", install=install, command=BUILD)
        yield remark("kernels for the processor are not built, and there is no C++ compiler", "kernels", build)


def memory(machine: Machine) -> Iterator[Finding]:
    """Of the computer and of every GPU."""
    from lanting.plan.words import size

    values = {"total": size(machine.ram), "free": size(machine.ram_free)}
    if not machine.ram:
        yield remark(
            "how much memory there is can't be told", "memory",
            advice("say how much may be taken: lanting config ram 16G"),
        )  # fmt: skip
    elif machine.ram_free < SCARCE:
        close = advice("close other programs, or give the container more, and look again: lanting doctor")
        yield remark("memory: {total}, only {free} of it free", "memory", close, **values)
    else:
        yield fine("memory: {total}, {free} free", "memory", **values)
    for device in machine.devices:
        if not device.own_memory:
            continue
        values = {"gpu": device.title, "total": size(device.memory), "free": size(device.free)}
        if device.memory - device.free > TAKEN * device.memory:
            see = advice("see which programs hold the rest: nvidia-smi")
            yield remark("{gpu}: {total}, only {free} of it free", "memory", see, **values)
        else:
            yield fine("{gpu}: {total}, {free} free", "memory", **values)


def fitting(machine: Machine) -> Iterator[Finding]:
    """The largest release that this machine can draw with, and how."""
    from lanting.plan import RefusalError, plan, release, usual_job
    from lanting.specs import get_spec
    from lanting.weights.find import locate
    from lanting.weights.sized import planned_model

    for name in LARGEST_FIRST:
        model = planned_model(locate(name)) if name == "nano" else release(get_spec(name))
        try:
            chosen = plan(model, usual_job(model, None), machine)
        except RefusalError:
            continue
        values = {"model": name, "plan": chosen.sentence()}
        if name == LARGEST_FIRST[0] and (chosen.streamed != "disk"):
            yield fine("{model} fits; {plan}", "fits", **values)
        elif name == LARGEST_FIRST[0]:
            see = advice("see what else is possible: lanting plan {model}", model=name)
            yield remark(
                "{model} fits only by reading its blocks from the disk at every step; {plan}", "fits", see, **values
            )
        else:
            see = advice("see how much memory more would need: lanting plan {largest}", largest=LARGEST_FIRST[0])
            yield remark("the largest that fits is {model}; {plan}", "fits", see, **values)
        return
    free = advice("close other programs, then see what is missing: lanting plan nano")
    yield problem("there is not even memory for nano", "fits", free)
