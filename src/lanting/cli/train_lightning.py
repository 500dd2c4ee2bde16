"""`lanting train lightning`: a LoRA with which a model draws in a few steps."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lanting.cli import options as o
from lanting.cli import train_options as t
from lanting.cli.screen import Screen

if TYPE_CHECKING:
    from lanting.specs import ModelSpec
    from lanting.train.walks import Prompts

Model = Annotated[str, typer.Option("--model", "-m", help="The model to distil: a name or a folder.")]
Out = Annotated[Path, typer.Option("--out", "-o", help="The LoRA to write.")]
Minutes = Annotated[float, typer.Option("--minutes", help="Minutes in all, over resumed runs.")]
Steps = Annotated[int, typer.Option("--steps", min=1, max=50, help="Steps the LoRA is to draw in.")]
Rank = Annotated[int, typer.Option("--rank", min=1, max=256, help="Rank of the LoRA.")]
Guidance = Annotated[float, typer.Option("--guidance", help="Guidance of the teacher; the LoRA then needs none.")]
TeacherSteps = Annotated[int, typer.Option("--teacher-steps", min=1, max=200, help="Steps of the teacher.")]
PromptFile = Annotated[
    Path | None, typer.Option("--prompts", help="A text file, one prompt a line; left out: designs as nano knows them.")
]
Size = Annotated[str | None, typer.Option("--size", help="Size of the pictures with --prompts, WIDTHxHEIGHT.")]


def lightning(
    model: Model = "nano",
    out: Out = Path("lightning.safetensors"),
    minutes: Minutes = 12.0,
    steps: Steps = 4,
    rank: Rank = 16,
    guidance: Guidance = 1.0,
    teacher_steps: TeacherSteps = 20,
    prompts: PromptFile = None,
    size: Size = None,
    device: t.Device = "auto",
    seed: t.Seed = 0,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:
    """Distil a model into a LoRA that draws in --steps steps without guidance what the model draws in many.

    The model teaches itself: it walks from noise to pictures, and the LoRA learns to take its steps in few. Progress
    goes to stderr. A killed run goes on where it was (OUT with the ending .checkpoint): run the same command again.
    Draw with it: lanting generate PROMPT --model MODEL --lora OUT.
    """
    from lanting.cli.train_lora import check
    from lanting.specs.numbers import number
    from lanting.train.lightning import distil
    from lanting.train.presets import pick_device
    from lanting.train.walks import LightningRun
    from lanting.weights.find import locate

    check(out, seed)
    minutes, guidance = number("--minutes", minutes, 0, 1e6), number("--guidance", guidance, 0, 100)
    found, chosen = locate(model), pick_device(device)
    asked = designs() if prompts is None else from_file(prompts, size, found.spec)
    values = {"teacher_steps": teacher_steps, "guidance_scale": guidance, "seed": seed, "device": chosen}
    run = LightningRun(steps=steps, **values)
    screen = Screen(quiet)
    screen.note(
        "about {minutes:.0f} minutes on {device}, beside the model 1 GB of memory", minutes=minutes, device=chosen
    )
    screen.raw(str(distil(found.path, asked, out, minutes, rank, run, log=tell(quiet))))


def tell(quiet: bool) -> Callable[[str], None]:
    """Progress as lines of JSON on stderr."""
    return lambda line: None if quiet else print(line, file=sys.stderr, flush=True)


def designs() -> Prompts:
    """Prompts of nano's own training: text, pictograms and colours on all canvases but the strip."""
    from lanting.train.design import SQUARE, WIDE
    from lanting.train.designs import DesignMaker

    maker = DesignMaker()

    def draw(rng: random.Random) -> tuple[str, tuple[int, int]]:
        size = rng.choice((WIDE, SQUARE))
        return maker.sample(rng, size).prompt, size

    return draw


def from_file(path: Path, size: str | None, spec: ModelSpec) -> Prompts:
    """Lines of a file at one size. Raises RequestError."""
    from lanting.core.errors import RequestError
    from lanting.specs import parse_size

    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError):
        lines = []
    if not lines:
        raise RequestError("{path} holds no prompts: give a UTF-8 text file with one prompt a line", path=path)
    if size is None:
        raise RequestError("with --prompts say the pictures' --size too, such as 1024x1024")
    measured = parse_size(size, spec)
    return lambda rng: (rng.choice(lines), measured)
