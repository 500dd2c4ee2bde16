"""`lanting generate PROMPT`: pictures from words."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Annotated, Any

import typer

from lanting.cli import options as o
from lanting.cli.draw import Weights, Wish, draw
from lanting.cli.fit import Limits
from lanting.cli.many import draw_many, read_lines
from lanting.cli.screen import Screen
from lanting.core.errors import RequestError
from lanting.core.pictures import open_mask, open_picture
from lanting.core.types import Request
from lanting.specs.regions import parse_region


def generate(
    prompt: Annotated[str | None, typer.Argument(help="What to draw; - reads it from stdin.")] = None,
    prompts: Annotated[
        str | None,
        typer.Option("--prompts", metavar="FILE", help="Draw every line of a text file instead; - is stdin."),
    ] = None,
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
    controlnet: o.ControlNets = None,
    control: o.Control = None,
    control_scale: o.ControlScales = None,
    in_context: o.InContext = False,
    mask: o.Mask = None,
    region: o.Regions = None,
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
    """Draw pictures from words. Without --model, the small nano model that ships with lanting draws signs."""
    if (prompt is None) == (prompts is None):
        raise RequestError("say what to draw: a prompt, or --prompts FILE, and not both")
    words = piped() if prompt == "-" else prompt or ""
    request = Request(words, negative_prompt=negative, steps=steps, guidance_scale=guidance, seed=seed, count=count)
    request = replace(request, quality=quality, rewrite=rewrite, tries=tries)
    if control or controlnet or mask or in_context or control_scale:
        request = controlled(request, control or [], mask, control_scale or [], in_context)
    if region:
        request = replace(request, options={**request.options, "regions": [parse_region(one) for one in region]})
    loras = tuple(lora or ())
    weights = Weights(quant, text_encoder, vae)
    wish = Wish(model, size, device, dtype, output, force, preview, loras=loras, weights=weights)
    wish = replace(wish, controlnets=tuple(controlnet or ()), limits=Limits(vram, ram), draft=draft)
    screen = Screen(quiet, json)
    if prompts is not None:
        draw_many(prompts, read_lines(prompts, request, size), wish, screen)
        return
    draw(request, wish, screen)
    if model == "nano":
        words = "'a red sign with white text \"Fresh Bread\"'"
        screen.line("other words: lanting generate {words}", words=words)


def piped() -> str:
    """The prompt from stdin, without the mark that some editors put in front. Raises RequestError."""
    try:
        return sys.stdin.read().removeprefix("\ufeff").strip()
    except UnicodeDecodeError:
        raise RequestError("the prompt holds bytes that are not UTF-8: retype it") from None


def controlled(request: Request, control: list[str], mask: str | None, scales: list[float], aside: bool) -> Request:
    """The request with control pictures; with a mask a net that repaints gets its picture with a hole. `scales`: one
    for all pictures, or one for each. `aside`: a LoRA follows the picture in context."""
    if mask and not control:
        raise RequestError("--mask needs --control pictures here: 'lanting edit PICTURE --mask' repaints a picture")
    if scales and not control:
        raise RequestError("--control-scale needs --control pictures")
    options: dict[str, Any] = {"control_scale": scales[0] if len(scales) == 1 else tuple(scales)} if scales else {}
    return replace(
        request,
        task="controlnet_inpaint" if mask else "controlnet",
        images=tuple(open_picture(path, path) for path in control),
        mask=open_mask(mask, mask) if mask else None,
        options=options | ({"in_context": True} if aside else {}),
    )
