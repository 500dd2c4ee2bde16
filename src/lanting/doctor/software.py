"""Python, torch and what its build can compute on, Triton, and the optional libraries."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from lanting.core.lang import say
from lanting.doctor.finding import Advice, Finding, advice, fine, problem, remark

PYTHON = (3, 11)
TORCH = ((2, 8), (2, 14))  # from, and below what: a test compares them with pyproject.toml
WANTED = '"torch>=2.8,<2.14"'  # in marks that every shell knows
TURING = (7, 5)
OLDEST = (8, 0)  # compute capability that Triton's kernels need
EXTRAS = {  # the distributions whose absence is told; a test compares them with pyproject.toml
    "serve": ("fastapi", "uvicorn", "python-multipart", "prometheus-client", "mcp", "gradio"),
    "scale": ("ray",),
    "eval": ("rapidocr", "onnxruntime", "ssimulacra2"),
    "layers": ("python-pptx",),
}


@dataclass(frozen=True, slots=True)
class Interpreter:
    """The Python that runs: `machine` as platform names it, `translated`: by Rosetta, on Apple's own processor."""

    version: tuple[int, int, int]
    bits: int = 64
    machine: str = "x86_64"
    translated: bool = False


@dataclass(frozen=True, slots=True)
class Torch:
    """An installed torch, from its files: `version` without the build; `build`: cpu, cu128, rocm6.4, xpu."""

    version: str
    build: str = "cpu"


@dataclass(frozen=True, slots=True)
class Cards:
    """GPUs as their makers' tools tell them.

    names       NVIDIA's, by nvidia-smi
    driver      its version; `cuda`: the newest CUDA that it speaks, "12.8"
    capability  the lowest compute capability among them
    failed      what nvidia-smi says where it is there and finds nothing
    silent      an NVIDIA GPU is in the machine, and no nvidia-smi
    amd, apple  names of such GPUs, "" for none
    """

    names: tuple[str, ...] = ()
    driver: str = ""
    cuda: str = ""
    capability: tuple[int, int] = (0, 0)
    failed: str = ""
    silent: bool = False
    amd: str = ""
    apple: str = ""


def python(found: Interpreter) -> Iterator[Finding]:
    shown = ".".join(map(str, found.version))
    if found.version[:2] < PYTHON:
        newer = advice(
            "install Python 3.11 or newer, make an environment with it (python3 -m venv .venv), install again"
        )
        yield problem("Python {version} is too old", "python", newer, version=shown)
    elif found.bits < 64:
        newer = advice("install the 64-bit Python of your system from python.org, and lanting with it")
        yield problem(
            "Python {version} is a 32-bit program, for which there is no torch", "python", newer, version=shown
        )
    elif found.translated:
        arm = advice("install Python for arm64 (brew install python, or from python.org), and lanting with it")
        yield problem(
            "Python {version} is an x86 program on Apple silicon: no GPU, and everything translated",
            "python",
            arm,
            version=shown,
        )
    else:
        yield fine("Python {version}, {machine}", "python", version=shown, machine=found.machine)


def torch(found: Torch | None, cards: Cards) -> Iterator[Finding]:
    """Whether it is there, in range, and of a build that fits the GPU."""
    if found is None:
        yield problem("torch is not installed", "torch", advice("run pip install {wanted}", wanted=WANTED))
        return
    shown = f"{found.version}+{found.build}"
    release = tuple(int(part) for part in re.findall(r"\d+", found.version)[:2])
    if not TORCH[0] <= release < TORCH[1]:
        wanted = advice("run pip install {wanted}", wanted=WANTED)
        yield problem("torch {version} is none that lanting is made for", "torch", wanted, version=shown)
    elif cards.names:
        yield from nvidia(found, shown, cards)
    elif cards.amd and not found.build.startswith("rocm"):
        rocm = advice("choose ROCm on https://pytorch.org/get-started/locally and run the command it shows")
        yield remark("torch {version} can't use the {gpu}", "torch", rocm, version=shown, gpu=cards.amd)
    else:
        yield fine("torch {version}", "torch", version=shown)


def nvidia(found: Torch, shown: str, cards: Cards) -> Iterator[Finding]:
    """The classic: the card is there, and torch was built without, or for a newer driver."""
    gpu, built = cards.names[0], re.fullmatch(r"cu(\d+)(\d)", found.build)
    if built is None:
        yield problem(
            "torch {version} is a build without CUDA, so the {gpu} is not used", "torch", right_torch(cards),
            version=shown, gpu=gpu,
        )  # fmt: skip
    elif cards.cuda and int(built[1]) > int(cards.cuda.partition(".")[0]):
        values = {"version": shown, "needs": f"{built[1]}.{built[2]}", "driver": cards.driver, "speaks": cards.cuda}
        yield problem(
            "torch {version} is built for CUDA {needs}, and driver {driver} speaks {speaks} at most", "torch",
            right_torch(cards), **values,
        )  # fmt: skip
    else:
        yield fine("torch {version}, for the {gpu}", "torch", version=shown, gpu=gpu)


def right_torch(cards: Cards) -> Advice:
    """For a driver and a card: wheels for CUDA 12.6 run wherever CUDA 12 does, and newer ones have no code for cards
    before Turing."""
    number = float(cards.cuda or 0)
    if cards.cuda and number < 12:
        return advice(
            "install NVIDIA's newest driver from https://www.nvidia.com/drivers, then look again: lanting doctor"
        )
    old = (0, 0) < cards.capability < TURING
    build = "cu126" if old or number < 12.8 else "cu128" if number < 13 else "cu130"
    command = f"pip install --force-reinstall {WANTED} --index-url https://download.pytorch.org/whl/{build}"
    return advice("run {command}", command=command)


def driver(cards: Cards) -> Iterator[Finding]:
    """GPUs that are there and can't be reached."""
    if cards.failed:
        again = advice("restart the machine; if it stays so, install NVIDIA's driver anew and check with: nvidia-smi")
        yield problem("NVIDIA's driver does not answer: {reason}", "driver", again, reason=cards.failed)
    elif cards.silent:
        install = advice("install NVIDIA's driver (https://www.nvidia.com/drivers), and check with: nvidia-smi")
        yield problem("there is an NVIDIA GPU, and no driver for it", "driver", install)


def answers(cards: Cards, found: Torch | None, told: Mapping[str, object] | None, seconds: int) -> Iterator[Finding]:
    """What torch itself said of the GPU, in a process of its own; None: it was not asked.

    told  {"ok": True}; {"error": words}; {"silent": True} where it gave no answer in so many seconds
    """
    gpu = cards.names[0] if cards.names else cards.amd or cards.apple
    if told is None or found is None:
        return
    if told.get("ok"):
        yield fine("the {gpu} computes", "gpu", gpu=gpu)
    elif told.get("silent"):
        see = advice("see which programs hold it (nvidia-smi), and restart the machine if none does")
        yield problem("the {gpu} gave torch no answer in {seconds} seconds", "gpu", see, gpu=gpu, seconds=seconds)
    elif "kernel image" in str(told.get("error")):
        yield problem(
            "torch {version} has no code for the {gpu}", "gpu", right_torch(cards), version=found.version, gpu=gpu
        )
    else:
        yield problem(
            "torch can't use the {gpu}: {reason}",
            "gpu",
            advice("see what it says: {command}", command='python -c "import torch; torch.ones(1).cuda()"'),
            gpu=gpu,
            reason=told.get("error", ""),
        )


def triton(version: str, cards: Cards, windows: bool = False) -> Iterator[Finding]:
    """Of NVIDIA's GPUs alone; `version` "" where it is not installed."""
    if not cards.names or cards.capability == (0, 0):
        return
    if cards.capability < OLDEST:
        shown = ".".join(map(str, cards.capability))
        yield fine(
            "the GPU is older than Ampere ({capability}): torch does the kernels' work", "triton", capability=shown
        )
    elif version:
        yield fine("Triton {version}", "triton", version=version)
    else:
        command = f"pip install {'triton-windows' if windows else 'triton'}"
        yield remark(
            "Triton is not installed: torch does the kernels' work", "triton", advice("run {command}", command=command)
        )


def extras(missing: Mapping[str, Sequence[str]]) -> Iterator[Finding]:
    """`missing`: for every extra its distributions that are not installed."""
    uses = {
        "serve": say("lanting serve and its studio"),
        "scale": say("workers on other machines"),
        "eval": say("reading pictures back, and the judges of lanting eval"),
        "layers": say("PowerPoint files of layers"),
    }
    here = [name for name in EXTRAS if not missing.get(name)]
    if here:
        yield fine("extras here: {names}", "extras", names=", ".join(here))
    for name in EXTRAS:
        if lacking := missing.get(name):
            yield remark(
                "the extra {extra} is not here in full ({lacking} is missing): it is for {use}",
                "extras",
                advice('run pip install "lanting[{extra}]" if you want that', extra=name),
                **{"extra": name, "lacking": ", ".join(lacking), "use": uses[name]},
            )
