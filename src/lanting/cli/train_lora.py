"""`lanting train lora`: teach a model what a folder of pictures shows."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lanting.cli import options as o
from lanting.cli import train_options as t
from lanting.cli.screen import Screen

if TYPE_CHECKING:
    from lanting.train.lora.job import LoraTraining
    from lanting.train.lora.run import Report

Pictures = Annotated[
    Path, typer.Argument(metavar="FOLDER", help="Pictures, each with its caption in a .txt beside it.")
]
Model = Annotated[str, typer.Option("--model", "-m", help="The model to teach: a release, a folder or a weights file.")]
Out = Annotated[Path, typer.Option("--out", "-o", help="The LoRA to write.")]
Steps = Annotated[int, typer.Option("--steps", min=1, max=1_000_000, help="Updates in all, over resumed runs.")]
Rank = Annotated[int, typer.Option("--rank", min=1, max=1024, help="Rank of the LoRA.")]
Alpha = Annotated[float | None, typer.Option("--alpha", help="Alpha of the LoRA. Default: its rank.")]
Lr = Annotated[float, typer.Option("--lr", help="Highest learning rate; a small model such as nano takes 1e-3.")]
Batch = Annotated[int, typer.Option("--batch", min=1, max=256, help="Pictures at a time, of one size.")]
Accumulate = Annotated[int, typer.Option("--accumulate", min=1, max=1024, help="Batches to an update.")]
Resolution = Annotated[
    int | None,
    typer.Option("--resolution", min=64, max=4096, help="Side of the square whose area no picture exceeds."),
]
Targets = Annotated[
    str, typer.Option("--targets", help="Which Linears learn: attention, blocks, all, or a pattern over their paths.")
]
Trigger = Annotated[str, typer.Option("--trigger", help="A word that every caption begins with, to call it by.")]
Caption = Annotated[str | None, typer.Option("--caption", help="The caption of pictures that have none.")]
CaptionDropout = Annotated[
    float, typer.Option("--caption-dropout", help="Share of steps that hide the caption, 0 to 1.")
]
Levels = Annotated[str, typer.Option("--noise", help="Noise levels: shift, as the model draws; even, all alike.")]
Sample = Annotated[list[str] | None, typer.Option("--sample", help="Draw this prompt now and then. Repeatable.")]
SampleEvery = Annotated[int, typer.Option("--sample-every", min=1, help="Steps between two samples.")]
SaveEvery = Annotated[int, typer.Option("--save-every", min=1, help="Steps between two checkpoints.")]


def lora(
    folder: Pictures,
    model: Model = "nano",
    out: Out = Path("lora.safetensors"),
    steps: Steps = 1000,
    rank: Rank = 16,
    alpha: Alpha = None,
    lr: Lr = 1e-4,
    batch: Batch = 1,
    accumulate: Accumulate = 1,
    resolution: Resolution = None,
    targets: Targets = "blocks",
    trigger: Trigger = "",
    caption: Caption = None,
    caption_dropout: CaptionDropout = 0.05,
    noise: Levels = "shift",
    sample: Sample = None,
    sample_every: SampleEvery = 250,
    save_every: SaveEvery = 100,
    device: o.Device = None,
    dtype: o.DtypeFlag = None,
    quant: o.Quant = "auto",
    vram: o.Vram = None,
    ram: o.Ram = None,
    seed: t.Seed = 0,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:
    """Teach a model a look, a thing or a kind of edit from a folder of pictures, as a LoRA file.

    For edits put what each picture was made from into FOLDER/references under the same name. What training takes of
    memory is told before anything is read; where that is too much, weights are packed, and what still doesn't fit
    streams through. A killed run goes on from its last checkpoint: run the same command again. Progress goes to stderr
    as JSON; `probe` is the number that should fall. Draw with it: lanting generate PROMPT --model MODEL --lora OUT.
    """
    from lanting.specs.numbers import number
    from lanting.train.lora.dataset import DatasetOptions, read_folder
    from lanting.train.lora.job import LoraJob, LoraTraining
    from lanting.train.lora.run import LoraRun
    from lanting.weights.find import locate

    check(out, seed, noise)
    how: dict[str, Any] = {"batch": batch, "accumulate": accumulate, "targets": targets, "levels": noise, "seed": seed}
    how |= {
        "lr": number("--lr", lr, 1e-8, 1.0),
        "alpha": None if alpha is None else number("--alpha", alpha, 1e-3, 1e5),
    }
    how |= {"caption_dropout": number("--caption-dropout", caption_dropout, 0.0, 1.0), "save_every": save_every}
    found = locate(model)
    examples = read_folder(folder, DatasetOptions(trigger, caption, resolution), found.spec.defaults)
    where: dict[str, Any] = {"device": device, "dtype": dtype, "quant": quant, "vram": vram, "ram": ram}
    where |= {"samples": tuple(sample or ()), "sample_every": sample_every, "trigger": trigger}
    screen = Screen(quiet)
    training = LoraTraining(LoraJob(found, examples, out, LoraRun(steps, rank, **how), **where))
    tell_need(screen, training)
    tell = ProgressLines(quiet, steps)
    for report in training.run(tell.prepared):
        tell.report(report)
    screen.raw(str(out))


def check(out: Path, seed: int, noise: str = "shift") -> None:
    """Raises LantingError for what any training of a LoRA refuses before it looks for a model."""
    from lanting.core.errors import OutputError, RequestError
    from lanting.core.save import check_folder
    from lanting.specs.numbers import whole
    from lanting.specs.settle import LARGEST_SEED

    whole("--seed", seed, 0, LARGEST_SEED)
    if out.suffix != ".safetensors":
        raise OutputError("{path} can't be a LoRA's name: end it with .safetensors", path=out)
    if out.is_dir():
        raise OutputError("{path} is a folder: choose another name", path=out)
    if noise not in ("shift", "even"):
        raise RequestError("--noise takes shift or even, not {word}", word=repr(noise))
    if out.parent.exists():
        check_folder(out.parent)


def tell_need(screen: Screen, training: LoraTraining) -> None:
    """Say what a run takes before it starts."""
    need, job, models = training.need, training.job, training.models
    kind = str(models.dtype).removeprefix("torch.") if need.kind == "none" else need.kind
    values = {"device": models.device, "count": len(job.examples), "memory": need.total / 1e9, "kind": kind}
    values |= {"weights": need.weights / 1e9, "steps": job.run.steps}
    screen.note(
        "{count} pictures, {steps} steps on {device}: {memory:.1f} GB of memory, {weights:.1f} of it weights ({kind})",
        **values,
    )
    if need.resident is not None:
        screen.note("{count} blocks stay in memory, the others stream through", count=need.resident)


class ProgressLines:
    """Progress as lines of JSON on stderr: the first step, then one every ten seconds, and every probe."""

    def __init__(self, quiet: bool, steps: int):
        self.quiet, self.steps = quiet, steps
        self.last, self.recent, self.pace = time.monotonic(), list[float](), 0.0

    def prepared(self, done: int, count: int) -> None:
        if time.monotonic() - self.last > 10 or done == count:
            self.say({"prepared": done, "of": count})

    def report(self, report: Report) -> None:
        if report.step:
            self.recent.append(report.loss)
            self.pace = report.seconds if not self.pace else 0.9 * self.pace + 0.1 * report.seconds
        if report.probe is None and report.step > 1 and time.monotonic() - self.last < 10:
            return
        figures: dict[str, Any] = {"step": report.step, "of": self.steps, "rate": float(f"{report.rate:.3g}")}
        if self.recent:
            figures["loss"] = round(sum(self.recent) / len(self.recent), 4)
            figures["left"] = round(self.pace * (self.steps - report.step))
        if report.probe is not None:
            figures["probe"] = round(report.probe, 4)
        self.recent.clear()
        self.say(figures)

    def say(self, figures: dict[str, Any]) -> None:
        self.last = time.monotonic()
        if not self.quiet:
            print(json.dumps(figures), file=sys.stderr, flush=True)
