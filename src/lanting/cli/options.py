"""The flags that verbs share, spelled once. `--debug` and `--json` also decide how failures are shown."""

from __future__ import annotations

from typing import Annotated

import typer


class Defaulted(str):
    """A model that no flag named, and where it was: "LANTING_MODEL" or "lanting config"."""

    source: str

    def __new__(cls, name: str, source: str) -> Defaulted:
        found = super().__new__(cls, name)
        found.source = source
        return found


def _remember(context: typer.Context, parameter: typer.CallbackParam, value: str) -> str:
    """Where a person's own default decided, that goes along."""
    source = context.get_parameter_source(str(parameter.name))
    choice = context.obj.choice(context.info_name, "model") if source and source.name == "DEFAULT_MAP" else None
    return value if choice is None else Defaulted(value, choice.source)


Model = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        callback=_remember,
        help="A release (see 'lanting list'), a model folder, or a weights file.",
    ),
]
TextEncoder = Annotated[
    str | None,
    typer.Option(
        "--text-encoder", metavar="FILE|FOLDER", help="The text encoder, where the model has none or another is wanted."
    ),
]
Vae = Annotated[
    str | None,
    typer.Option("--vae", metavar="FILE|FOLDER", help="The VAE, where the model has none or another is wanted."),
]
Quant = Annotated[
    str,
    typer.Option(
        "--quant", help="int8, fp8, int4: pack 16-bit weights while loading; none: never; auto: as the plan says."
    ),
]
Size = Annotated[str | None, typer.Option("--size", help="WIDTHxHEIGHT in multiples of 16, or a ratio such as 16:9.")]
Steps = Annotated[int | None, typer.Option("--steps", help="Denoising steps, 1 to 1000.")]
Guidance = Annotated[
    float | None, typer.Option("--guidance", help="How strictly the prompt is followed; 1 is off, twice as fast.")
]
Quality = Annotated[
    str,
    typer.Option(
        "--quality", help="exact, high, balanced, fast: how much work may be left out, within a stated budget of error."
    ),
]
Negative = Annotated[str | None, typer.Option("--negative", help="What should not be there (needs guidance).")]
Seed = Annotated[int | None, typer.Option("--seed", help="Same seed, same picture. Default: chosen, and shown.")]
Count = Annotated[int, typer.Option("--count", help="Pictures to draw, 1 to 64; picture i uses seed + i.")]
Device = Annotated[
    str | None,
    typer.Option(
        "--device",
        help="cpu, cuda, cuda:1, mps; several for one picture: cuda:0,cuda:1 or cuda:all. Default: the fastest.",
    ),
]
Vram = Annotated[
    str | None, typer.Option("--vram", help="Never take more of the device's memory: 12G, 11.5GB, 12GiB, 800M.")
]
Ram = Annotated[str | None, typer.Option("--ram", help="Never take more of the computer's memory, as 32G.")]
DtypeFlag = Annotated[
    str | None,
    typer.Option(
        "--dtype",
        help="bfloat16, float16 or float32, or by component: vae=float32,transformer=bfloat16. "
        "Default: what suits the device.",
    ),
]
Output = Annotated[
    str | None,
    typer.Option("--output", "-o", help="A file (.png, .jpg, .webp) or a folder. Default: named from the prompt."),
]
ReplayOutput = Annotated[
    str | None,
    typer.Option("--output", "-o", help="A file (.png, .jpg, .webp) or a folder. Default: PICTURE-replay.png."),
]
FinishOutput = Annotated[
    str | None,
    typer.Option("--output", "-o", help="A file (.png, .jpg, .webp) or a folder. Default: PICTURE-finished.png."),
]
LayersOutput = Annotated[
    str | None,
    typer.Option(
        "--output",
        "-o",
        help="All layers in one file (.psd, .ora, .pptx), a file for each (.png, .webp), or a folder.",
    ),
]
Force = Annotated[bool, typer.Option("--force", help="Overwrite files that exist.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of words.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print only the paths of the files.")]
Preview = Annotated[bool, typer.Option("--preview", help="Show the growing picture in NAME.preview.png.")]
Keep = Annotated[
    bool | None,
    typer.Option("--keep/--no-keep", help="Edits take what they leave alone from the picture. Default: nano's do."),
]
Draft = Annotated[
    bool,
    typer.Option(
        "--draft",
        help="In few steps by the release's Lightning, to see more sooner; 'lanting finish' draws one in full.",
    ),
]
Rewrite = Annotated[
    bool,
    typer.Option(
        "--rewrite", help="Have the model's own text encoder write the prompt out in detail first, and draw that."
    ),
]
Tries = Annotated[
    int | None,
    typer.Option(
        "--tries",
        help="Read the quoted words back, and draw with up to so many seeds until they are right (needs "
        "lanting[eval]).",
    ),
]
Strength = Annotated[
    float | None,
    typer.Option("--strength", help="How far from the picture, above 0 to 1 (variations and repainting)."),
]
Mask = Annotated[str | None, typer.Option("--mask", help="A picture as large as the first: white is drawn anew.")]
ControlNet = Annotated[
    str | None,
    typer.Option("--controlnet", metavar="FILE|FOLDER", help="A ControlNet, which draws along the --control pictures."),
]
ControlNets = Annotated[
    list[str] | None,
    typer.Option(
        "--controlnet",
        metavar="FILE|FOLDER",
        help="A ControlNet, which draws along the --control pictures. Repeatable, with a picture for each, in order.",
    ),
]
MovedControlNets = Annotated[
    list[str] | None, typer.Option("--controlnet", help="A ControlNet that has moved; repeat in order.")
]
Control = Annotated[
    list[str] | None,
    typer.Option("--control", help="A control picture (edges, depth, pose); with --mask, the picture to repaint."),
]
Regions = Annotated[
    list[str] | None,
    typer.Option(
        "--region",
        metavar="BOX=WORDS",
        help='Words for a part of the picture, like "left=a red fox" or "0,0.5,1,1=a river". Repeatable.',
    ),
]
InContext = Annotated[
    bool,
    typer.Option(
        "--in-context", help="A --lora, made for it (In-Context-Control-Union), follows the --control picture."
    ),
]
ControlScales = Annotated[
    list[float] | None,
    typer.Option(
        "--control-scale",
        help="How strongly the control pictures steer, 0 to 10; default 1. Once for all, or once for each.",
    ),
]
Lora = Annotated[
    list[str] | None,
    typer.Option(
        "--lora",
        metavar="FILE[:STRENGTH]",
        help="A LoRA file, or the name of one the model brings; the strength is 1 unless given. Repeatable.",
    ),
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback when something fails.")]
