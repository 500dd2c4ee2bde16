"""`lanting train`: a LoRA from pictures, a few-step LoRA, or the embedded model from nothing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from lanting.cli import options as o
from lanting.cli import train_options as t
from lanting.cli.screen import Screen
from lanting.cli.train_lightning import lightning
from lanting.cli.train_lora import lora

if TYPE_CHECKING:
    import numpy as np

    from lanting.train.nano_run import NanoRun

train = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Train models. What a run costs is told before it starts; by default nano takes about two hours of all cores.",
)


@train.callback()
def _verbs() -> None:
    """Train models. What a run costs is told before it starts; by default nano takes about two hours of all cores."""


train.command("lora")(lora)
train.command("lightning")(lightning)


@train.command("nano")
def nano(
    folder: t.Folder = Path("runs/nano"),
    minutes: t.Minutes = 94.0,
    vae_minutes: t.VaeMinutes = 17.0,
    decoder_minutes: t.DecoderMinutes = 0.0,
    device: t.Device = "auto",
    workers: t.Workers = 0,
    slice_minutes: t.SliceMinutes = 0.0,
    resume_from: t.ResumeFrom = None,
    anew: t.Anew = False,
    vae_anew: t.VaeAnew = False,
    warm: t.Warm = None,
    width: t.Width = 128,
    layers: t.Layers = 6,
    large: t.Large = False,
    batch_times: t.BatchTimes = 0,
    lr: t.Lr = 0.0,
    feeders: t.Feeders = -1,
    compiled: t.Compile = "auto",
    concepts: t.Concepts = 256,
    sheet_minutes: t.SheetMinutes = 8.0,
    read: t.Read = False,
    seed: t.Seed = 0,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:
    """Train nano, the model that ships with lanting, from nothing but fonts, words and pictograms in the package.

    A killed run goes on where it was: run the same command again. At most two minutes are lost.

    On a CPU one process per core trains: about two hours, 3.5 GB of memory each, 0.3 GB of disk. On GPUs one process
    per GPU trains, while the CPU's cores make up designs; say fewer --minutes there (--vae-minutes 3 --minutes 24).

    With --slice-minutes a run ends early and leaves FOLDER/portable, files below 16 MB that --resume-from takes up on
    another machine. Samples go to FOLDER/sheets, figures to FOLDER/log.jsonl, the model to FOLDER/nano.
    """
    from lanting.train.nano import main
    from lanting.train.nano_run import NanoRun

    values = {"vae_minutes": vae_minutes, "decoder_minutes": decoder_minutes, "minutes": minutes, "lr": lr}
    shape = {"width": width, "layers": layers, "large": large, "concepts": concepts, "batch_times": batch_times}
    brought = {"resume_from": str(resume_from or ""), "anew": anew, "vae_anew": vae_anew}
    run = NanoRun(
        folder,
        **values,
        **shape,
        **brought,
        workers=workers,
        seed=seed,
        warm=str(warm or ""),
        compiled=_choice(compiled),
        device=device,
        watch_minutes=sheet_minutes,
        slice_minutes=slice_minutes,
        feeders=feeders,
        scorer=share_read if read else None,
        quiet=quiet,
    )
    tell_cost(screen := Screen(quiet), run)
    screen.raw(str(main(run)))


def _choice(word: str) -> bool | None:
    from lanting.core.errors import RequestError

    if word not in ("auto", "yes", "no"):
        raise RequestError("--compile takes auto, yes or no, not {word}", word=repr(word))
    return None if word == "auto" else word == "yes"


def tell_cost(screen: Screen, run: NanoRun) -> None:
    """Say what a run takes before it starts."""
    from lanting.train.nano_run import cost

    told = cost(run)
    values = {"minutes": told.minutes, "count": told.processes, "memory": told.memory, "disk": told.disk}
    if told.device == "cuda":
        screen.note(
            "about {minutes:.0f} minutes on {count} GPU(s), {memory:.0f} GB of memory on each, {disk:.1f} GB of disk "
            "in {folder}",
            **values,
            folder=run.folder,
        )
    else:
        screen.note(
            "about {minutes:.0f} minutes on {count} core(s), {memory:.1f} GB of memory, {disk:.1f} GB of disk in "
            "{folder}",
            **values,
            folder=run.folder,
        )


def share_read(pictures: Sequence[np.ndarray], lines: Sequence[Sequence[str]]) -> float:
    """Share of the asked lines that the optical reader finds; pictures (H, W, 3) uint8."""
    from PIL import Image

    from lanting.core.readings import hits
    from lanting.reading.reader import read_lines

    found = [hits(asked, read_lines(Image.fromarray(p))) for p, asked in zip(pictures, lines, strict=True) if asked]
    return sum(map(sum, found)) / max(1, sum(map(len, found)))
