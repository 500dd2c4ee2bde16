"""One run of `lanting train nano`: what is asked for, what it will cost, and whether it can be.

Known before anything is trained, so that a person reads the cost first.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

from lanting.core.errors import RequestError
from lanting.core.lang import say
from lanting.specs.numbers import whole
from lanting.specs.settle import LARGEST_SEED
from lanting.train.assets import concepts
from lanting.train.model import NanoConfig, language_config, transformer_config
from lanting.train.presets import GIB_PER_TIMES, Preset, pick_device, preset, processes
from lanting.train.progress import Scorer
from lanting.train.vocabulary import VOCAB_SIZE

CLOSING = 25.0  # seconds of a slice kept for its checkpoint, sheets and export


@dataclass(frozen=True)
class NanoRun:
    """One run: where, how long, how wide. Minutes are wall-clock time of training."""

    folder: Path
    vae_minutes: float = 17.0
    decoder_minutes: float = 0.0  # sharpens further; the shipped checkpoint did without
    minutes: float = 94.0
    workers: int = 0  # processes for stage 2; 0: one per core or GPU
    seed: int = 0
    capacity: int = 0  # encoded designs kept per course and process; 0: what suits the device
    warm: str = ""  # model folder whose weights are continued
    compiled: bool | None = None  # compile the blocks; None: on a GPU only
    concepts: int = 256
    device: str = "auto"  # auto, cpu or cuda
    watch_minutes: float = 8.0  # between two sheets of samples; 0: none
    width: int = 128  # of the transformer, a multiple of 32
    layers: int = 6
    large: bool = False  # canvases of 256 x 256 too
    slice_minutes: float = 0.0  # end cleanly after so much time in all; 0: when the budget is spent
    resume_from: str = ""  # folder a slice wrote, for a machine that has nothing yet
    anew: bool = False  # what was brought begins a new schedule instead of going on with its own
    vae_anew: bool = False  # its autoencoder is trained on first
    recode: bool = False  # names of pictograms get their codes again before what was brought is trained on
    feeders: int = -1  # processes per trainer that make up designs; -1: what suits the device
    batch_times: int = 0  # batches as multiples of a core's; 0: what suits the device
    lr: float = 0.0  # highest learning rate; 0: what suits the device
    scorer: Scorer | None = None  # share of lines that an optical reader finds in pictures
    until: float = float("inf")  # time.monotonic() at which the slice ends; set by `settled`
    meeting: str = ""  # file in which several processes meet; set by `train_transformer`
    quiet: bool = False

    @property
    def vae(self) -> Path:
        return self.folder / "vae"

    @property
    def tokenizer(self) -> Path:
        return self.folder / "tokenizer"

    @property
    def portable(self) -> Path:
        return self.folder / "portable"

    def preset(self, world: int) -> Preset:
        """How each of `world` processes uses its device, with what was asked for instead."""
        chosen = preset(self.device, world, self.width, self.layers)
        if self.batch_times:
            chosen = replace(chosen, times=self.batch_times)
        if self.lr:
            chosen = replace(chosen, lr=self.lr)
        if self.feeders >= 0:
            chosen = replace(chosen, feeders=self.feeders)
        if self.anew:  # what is known already needs no small canvases and no long plateau
            chosen = replace(chosen, turn=(0.0, 0.1), decay_share=0.8)
        return replace(chosen, capacity=self.capacity) if self.capacity else chosen

    def say(self, words: str, **values: object) -> None:
        """Progress goes to stderr, as everywhere, in the person's language."""
        if not self.quiet:
            print(say(words, **values), file=sys.stderr, flush=True)

    def config(self) -> NanoConfig:
        shape = transformer_config(self.width, self.layers)
        return NanoConfig(transformer=shape, language=language_config(VOCAB_SIZE))


@dataclass(frozen=True)
class Cost:
    """What a run will take. Memory and disk in GB; memory is that of the GPU where one trains."""

    minutes: float
    processes: int
    memory: float
    disk: float
    device: str


def settled(run: NanoRun) -> NanoRun:
    """The run on a device that is there. Raises RequestError for values that can't be trained with."""
    whole("--seed", run.seed, 0, LARGEST_SEED)
    amounts = (run.minutes, run.vae_minutes, run.decoder_minutes, run.slice_minutes, run.watch_minutes, run.lr)
    if not all(0 <= amount < float("inf") for amount in amounts):
        raise RequestError(
            "Minutes and rates of training are numbers from 0 on; give 0 minutes to only continue to the next stage."
        )
    most = len(concepts())
    if min(run.workers, run.batch_times, run.feeders + 1) < 0 or not 1 <= run.concepts <= most:
        raise RequestError(
            "--workers and --batch-times begin at 0, --feeders at -1, and there are --concepts from 1 to {most}",
            most=most,
        )
    if run.warm and not (Path(run.warm) / "vae" / "diffusion_pytorch_model.safetensors").is_file():
        raise RequestError("{path} holds no nano; give --warm the folder of a model that was trained", path=run.warm)
    if run.width < 64 or run.width % 32 or not 1 <= run.layers <= 48:
        raise RequestError("The transformer's --width is a multiple of 32 from 64 on, its --layers are 1 to 48.")
    until = run.until
    if run.slice_minutes and until == float("inf"):
        until = time.monotonic() + max(1.0, 60 * run.slice_minutes - CLOSING)
    return replace(run, device=pick_device(run.device), until=until)


def cost(run: NanoRun) -> Cost:
    """What the run will take, to be said before it starts."""
    run = settled(run)
    world = processes(run.device, run.workers)
    total = run.vae_minutes + run.decoder_minutes + run.minutes
    size = run.width * run.layers / 768
    chosen = run.preset(world)
    if run.device == "cuda":
        memory = 4 + chosen.capacity * 5e-5 + GIB_PER_TIMES * chosen.times * size
    else:
        memory = world * (1.3 + 0.4 * size + chosen.capacity * 1.5e-4)
    return Cost(min(total, run.slice_minutes or total), world, memory, 0.1 + 0.2 * size, run.device)
