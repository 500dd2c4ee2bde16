"""`lanting finish PICTURE`: a draft drawn again by the whole model, from the same noise and in every step."""

from __future__ import annotations

from dataclasses import replace
from itertools import filterfalse
from pathlib import Path
from typing import Annotated

import typer

from lanting.cli import options as o
from lanting.cli.drafts import few_step
from lanting.cli.draw import Weights, Wish, draw
from lanting.cli.fit import Limits
from lanting.cli.replay import controlnets_of, inputs_of, loras_of, model_of
from lanting.cli.screen import Screen
from lanting.core.errors import RequestError
from lanting.core.pictures import open_picture
from lanting.core.recipe import read_recipe, restore_request
from lanting.core.save import name_beside
from lanting.core.types import Recipe, Request
from lanting.specs import get_spec, settle, spec_names, whole_release


def finish(
    picture: Annotated[str, typer.Argument(metavar="PICTURE", help="A picture that lanting drew, such as a draft.")],
    strength: Annotated[
        float | None,
        typer.Option("--strength", help="Begin at the draft itself, not at its noise; how far from it, above 0 to 1."),
    ] = None,
    steps: o.Steps = None,
    guidance: o.Guidance = None,
    quality: o.Quality = "exact",
    images: Annotated[
        list[str] | None, typer.Option("--image", help="An input picture that has moved; repeat in order.")
    ] = None,
    mask: o.Mask = None,
    controlnet: o.MovedControlNets = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Default: the one that the draft's was distilled from.")
    ] = None,
    device: o.Device = None,
    dtype: o.DtypeFlag = None,
    text_encoder: o.TextEncoder = None,
    vae: o.Vae = None,
    quant: o.Quant = "auto",
    vram: o.Vram = None,
    ram: o.Ram = None,
    output: o.FinishOutput = None,
    force: o.Force = False,
    preview: o.Preview = False,
    json: o.Json = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:
    """Draw a draft again with the whole model, every step.

    Words, seed, size and inputs are the draft's, so it begins at the same noise and comes out alike.
    """
    screen, recipe, path = Screen(quiet, json), read_recipe(picture), Path(picture)
    request = restore_request(recipe.request, *inputs_of(recipe, images or [], mask, path.parent, screen))
    asked = {name: value for name, value in request.options.items() if name != "sigmas"}  # the draft's few
    request = replace(
        request, steps=steps, guidance_scale=guidance, quality=quality, choices=None, options=asked, count=1
    )
    name = model or whole_release(model_of(recipe))
    if strength is not None:
        request = from_picture(request, recipe, picture, strength)
    loras = loras_of(recipe, [], name, path.parent, screen)
    loras = tuple(filterfalse(few_step(name), loras)) if loras else ()
    refuse_finished(request, recipe, name, picture)
    again = output or str(name_beside(path, "finished", ".png", force))
    wish = Wish(name, None, device, dtype, again, force, preview, path.stem, loras=loras)
    wish = replace(wish, controlnets=controlnets_of(recipe, controlnet or [], path.parent, screen))
    draw(request, replace(wish, weights=Weights(quant, text_encoder, vae), limits=Limits(vram, ram)), screen)


def from_picture(request: Request, recipe: Recipe, picture: str, strength: float) -> Request:
    """The same request, begun at the draft instead of its noise."""
    if recipe.task != "text_to_image":
        raise RequestError(
            "{picture} was made from other pictures ({task}), and only what was drawn from words alone can begin at "
            "the draft: leave --strength out",
            picture=picture,
            task=recipe.task,
        )
    return replace(request, task="image_to_image", images=(open_picture(picture, picture),), strength=strength)


def refuse_finished(request: Request, recipe: Recipe, model: str, picture: str) -> None:
    """Raises RequestError where the same would be drawn again, as the picture has all of its steps."""
    if request.task != recipe.task or model != recipe.model or model not in spec_names():
        return
    settled = settle(request, get_spec(model))
    told = recipe.request
    if (settled.steps, settled.guidance_scale) == (told.get("steps"), told.get("guidance_scale")) and not told.get(
        "choices"
    ):
        raise RequestError(
            "{picture} was drawn in all of its {steps} steps: 'lanting replay' draws it again, --strength begins at it",
            picture=picture,
            steps=settled.steps,
        )
