"""`lanting edit PICTURE... PROMPT`: change pictures by words, repaint a masked part, or vary a picture."""

from __future__ import annotations

from dataclasses import replace
from os.path import isfile
from pathlib import Path
from typing import Annotated

import typer

from lanting.cli import options as o
from lanting.cli.draw import Weights, Wish, draw
from lanting.cli.fit import Limits
from lanting.cli.screen import Screen
from lanting.core.errors import RequestError
from lanting.core.pictures import open_mask, open_picture
from lanting.core.types import Request


def edit(
    pictures: Annotated[
        list[str], typer.Argument(metavar="PICTURE... PROMPT", help="One or more pictures, then what to do.")
    ],
    mask: o.Mask = None,
    strength: o.Strength = None,
    keep: o.Keep = None,
    model: o.Model = "nano",
    size: o.Size = None,
    steps: o.Steps = None,
    guidance: o.Guidance = None,
    quality: o.Quality = "exact",
    negative: o.Negative = None,
    seed: o.Seed = None,
    count: o.Count = 1,
    tries: o.Tries = None,
    rewrite: o.Rewrite = False,
    draft: o.Draft = False,
    lora: o.Lora = None,
    device: o.Device = None,
    dtype: o.DtypeFlag = None,
    text_encoder: o.TextEncoder = None,
    vae: o.Vae = None,
    quant: o.Quant = "auto",
    vram: o.Vram = None,
    ram: o.Ram = None,
    output: o.Output = None,
    force: o.Force = False,
    preview: o.Preview = False,
    json: o.Json = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:
    """Change pictures by words.

    An edit release follows the instruction; other models draw a variation of the picture. With --mask only the
    white part is drawn anew.
    """
    *paths, prompt = pictures
    if not paths or isfile(prompt):  # pathlib raises for words that are too long to be a name
        raise RequestError("say what to do after the pictures: lanting edit PICTURE... PROMPT")
    request = Request(
        prompt,
        options=kept(keep, mask),
        images=tuple(open_picture(path) for path in paths),
        mask=open_mask(mask) if mask else None,
        strength=strength,
        negative_prompt=negative,
        steps=steps,
        guidance_scale=guidance,
        seed=seed,
        count=count,
        quality=quality,
        rewrite=rewrite,
        tries=tries,
    )
    title = Path(paths[0]).stem
    weights, loras = Weights(quant, text_encoder, vae), tuple(lora or ())
    wish = Wish(model, size, device, dtype, output, force, preview, title, loras=loras, weights=weights)
    draw(request, replace(wish, limits=Limits(vram, ram), draft=draft), Screen(quiet, json))


def kept(keep: bool | None, mask: str | None) -> dict[str, bool]:
    """The edit's option, where somebody said something. Raises RequestError."""
    if mask and keep is not None:
        raise RequestError("--keep is for edits without --mask: what a mask leaves is kept anyway")
    return {} if keep is None else {"keep": keep}
