"""What a run does on which machine: the kinds of batches, how large they are, and how hard the optimizers push.

On CPU cores small batches cost no speed, and more steps learn more. A GPU is only busy with batches about thirty times
as large. They get a larger rate, more kinds a step (a batch holds one kind and one length of prompt only), and fewer
new designs, since encoding pictures with thin layers is what a GPU does worst. Rates and sizes for GPUs are estimates:
memory was counted on a CPU (8 MB for a picture of 224 x 96), speed was measured once, when the host was the limit.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from lanting.core.errors import RequestError
from lanting.train.course import Budget
from lanting.train.design import LARGE, SQUARE, STRIP, WIDE


@dataclass(frozen=True)
class Kind:
    """One kind of batch: its canvas, the pictures an edit refers to, how often it comes, its size, new designs, and how
    often it comes at the beginning of a run."""

    name: str
    size: tuple[int, int]
    pictures: int
    share: float
    batch: int
    fresh: int
    early: float


KINDS = (  # sizes are chosen so that each costs about the same
    Kind("strip", STRIP, 0, 0.04, 42, 8, 0.55),
    Kind("wide", WIDE, 0, 0.21, 20, 4, 0.20),
    Kind("square", SQUARE, 0, 0.23, 12, 3, 0.12),
    Kind("edit", WIDE, 1, 0.27, 10, 2, 0.08),
    Kind("edit2", WIDE, 2, 0.08, 6, 1, 0.02),
    Kind("editsquare", SQUARE, 1, 0.17, 6, 1, 0.03),
)
GIB_PER_TIMES = 0.2  # what one batch of a core's size keeps for its backward pass at width 128 and 6 layers
BIG = (Kind("editlarge", LARGE, 1, 0.04, 3, 1, 0.01), Kind("large", LARGE, 0, 0.18, 8, 2, 0.06))


@dataclass(frozen=True)
class Preset:
    """How a device is used. `times` multiplies the batches of `KINDS`, `reuse` is how often a design is met."""

    times: int = 1
    reuse: float = 0.0  # 0: as the kinds say
    capacity: int = 12000
    lr: float = 3e-3
    warmup_steps: int = 100
    ema: float = 0.998
    picks: int = 2  # batches a step and process
    turn: tuple[float, float] = (0.2, 0.5)  # see `course.Budget`
    decay_share: float = 0.35
    feeders: int = 0  # processes that make up designs; 0: the trainer does it itself

    def budget(self, minutes: float) -> Budget:
        return Budget(
            minutes=minutes,
            lr=self.lr,
            warmup_steps=self.warmup_steps,
            ema=self.ema,
            picks=self.picks,
            turn=self.turn,
            decay_share=self.decay_share,
        )


def pick_device(asked: str) -> str:
    """ "cpu" or "cuda" for "auto", "cpu" or "cuda". Raises RequestError where it can't be had."""
    if asked not in ("auto", "cpu", "cuda"):
        raise RequestError("nothing can be trained on {device}; use auto, cpu or cuda", device=repr(asked))
    present = torch.cuda.is_available()
    if asked == "cuda" and not present:
        raise RequestError("torch sees no CUDA device here; use --device cpu, or install a torch built for your GPU")
    return "cuda" if present and asked != "cpu" else "cpu"


def processes(device: str, asked: int) -> int:
    """How many train: as asked, else one per GPU or core. Raises RequestError for more than there are GPUs."""
    most = torch.cuda.device_count() if device == "cuda" else os.cpu_count() or 1
    if device == "cuda" and asked > most:
        raise RequestError("there are {most} GPUs; ask for at most as many --workers", most=most)
    return asked or most


def preset(device: str, world: int, width: int = 128, layers: int = 6) -> Preset:
    """What suits one process of `world` on this machine."""
    if device != "cuda":
        return Preset()
    memory = torch.cuda.get_device_properties(0).total_memory / 2**30
    cores = (os.cpu_count() or 2) // world
    return on_gpu(memory, cores, width * layers)


def on_gpu(memory: float, cores: int, size: int = 768) -> Preset:
    """For a GPU with `memory` GiB beside `cores` cores; `size` is width times layers of the network.

    What a batch keeps for its backward pass grows with `size` and may fill a quarter of the memory; recorded steps keep
    as much again (`graphs`).
    """
    times = max(2, min(24, int((memory / 4 - 1) / (GIB_PER_TIMES * size / 768))))
    return Preset(
        times=times,
        reuse=8.0,
        capacity=int(min(200_000, 2500 * memory)),
        lr=3e-3,
        warmup_steps=300,
        ema=0.999,
        picks=3,
        turn=(0.1, 0.35),
        feeders=max(1, cores - 2),
    )


def kinds(preset: Preset, large: bool = False) -> tuple[Kind, ...]:
    """The kinds of batches at a preset's size; `large` adds canvases of 256 x 256."""
    chosen: Sequence[Kind] = KINDS
    if large:
        share, early = (1 - sum(big) for big in zip(*((k.share, k.early) for k in BIG), strict=True))
        chosen = (*(replace(k, share=k.share * share, early=k.early * early) for k in KINDS), *BIG)
    return tuple(replace(k, batch=k.batch * preset.times, fresh=_fresh(k, preset)) for k in chosen)


def _fresh(kind: Kind, preset: Preset) -> int:
    return kind.fresh if not preset.reuse else max(1, round(kind.batch * preset.times / preset.reuse))


def room(kind: Kind, preset: Preset) -> int:
    """Examples of a kind that are kept: edits carry more, so fewer; on a GPU fewer of rare kinds too."""
    most = preset.capacity // 3 if kind.pictures else preset.capacity
    return most if not preset.reuse else max(1, int(most * min(1.0, 3 * kind.share)))
