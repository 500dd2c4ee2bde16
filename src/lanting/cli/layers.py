"""`lanting layers PICTURE`: take a picture apart into transparent layers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from lanting.cli import options as o
from lanting.cli.draw import Weights, Wish, draw
from lanting.cli.fit import Limits
from lanting.cli.screen import Screen
from lanting.core.pictures import open_picture
from lanting.core.types import Request


def layers(
    picture: Annotated[str, typer.Argument(metavar="PICTURE", help="The picture to take apart.")],
    prompt: Annotated[str, typer.Option("--prompt", help="What the picture shows, if you want to say.")] = "",
    number: Annotated[int | None, typer.Option("--layers", help="How many layers, 1 to 20.")] = None,
    resolution: Annotated[int | None, typer.Option("--resolution", help="640 or 1024.")] = None,
    model: o.Model = "qwen-image-layered",
    steps: o.Steps = None,
    guidance: o.Guidance = None,
    quality: o.Quality = "exact",
    negative: o.Negative = None,
    seed: o.Seed = None,
    lora: o.Lora = None,
    device: o.Device = None,
    dtype: o.DtypeFlag = None,
    text_encoder: o.TextEncoder = None,
    vae: o.Vae = None,
    quant: o.Quant = "auto",
    vram: o.Vram = None,
    ram: o.Ram = None,
    output: o.LayersOutput = None,
    force: o.Force = False,
    preview: o.Preview = False,
    json: o.Json = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:
    """Take a picture apart into transparent layers, the lowest first."""
    asked = {"layers": number, "resolution": resolution}
    request = Request(
        prompt,
        task="layered",
        images=(open_picture(picture),),
        negative_prompt=negative,
        steps=steps,
        guidance_scale=guidance,
        seed=seed,
        quality=quality,
        options={name: value for name, value in asked.items() if value is not None},
    )
    title = Path(picture).stem
    weights, loras = Weights(quant, text_encoder, vae), tuple(lora or ())
    wish = Wish(model, None, device, dtype, output, force, preview, title, loras=loras, weights=weights)
    wish = replace(wish, limits=Limits(vram, ram))
    draw(request, wish, Screen(quiet, json))
