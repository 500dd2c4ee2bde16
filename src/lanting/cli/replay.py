"""`lanting replay PICTURE`: draw a picture again from the recipe it carries, and say what differs."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lanting.cli import options as o
from lanting.cli.draw import Drawn, Weights, Wish, draw
from lanting.cli.fit import Limits
from lanting.cli.screen import Screen
from lanting.core.errors import ModelError, PictureError
from lanting.core.layered import kind_in, unpack
from lanting.core.pictures import decode_picture, open_mask, open_picture, read_bytes
from lanting.core.recipe import describe_picture, read_recipe, restore_request
from lanting.core.save import name_beside
from lanting.core.stack import Stack, spread, stack_of
from lanting.core.types import Recipe
from lanting.specs import spec_names

if TYPE_CHECKING:
    from PIL import Image


def replay(
    picture: Annotated[str, typer.Argument(metavar="PICTURE", help="A picture that lanting drew.")],
    images: Annotated[
        list[str] | None, typer.Option("--image", help="An input picture that has moved; repeat in order.")
    ] = None,
    mask: o.Mask = None,
    lora: Annotated[
        list[str] | None, typer.Option("--lora", help="A LoRA that has moved, in the recipe's order; more are added.")
    ] = None,
    controlnet: o.MovedControlNets = None,
    model: Annotated[str | None, typer.Option("--model", "-m", help="Default: the recipe's.")] = None,
    device: o.Device = None,
    dtype: o.DtypeFlag = None,
    text_encoder: o.TextEncoder = None,
    vae: o.Vae = None,
    quant: Annotated[str | None, typer.Option("--quant", help="Default: the recipe's.")] = None,
    vram: o.Vram = None,
    ram: o.Ram = None,
    output: o.ReplayOutput = None,
    force: o.Force = False,
    preview: o.Preview = False,
    json: o.Json = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:
    """Draw a picture again from the recipe inside it: the same bits on the same machine and versions."""
    recipe = read_recipe(picture)
    screen = Screen(quiet, json)
    asked = recipe.request
    request = restore_request(asked, *inputs_of(recipe, images or [], mask, Path(picture).parent, screen))
    request = replace(request, choices=request.choices or {})  # nothing was decided then, and nothing is now
    ending = kind_in(read_bytes(Path(picture))) or ".png"
    again = output or str(name_beside(Path(picture), "replay", ending, force))
    number = dtype if dtype else recipe.versions.get("dtype") if device is None else None
    name = model or model_of(recipe)
    loras = loras_of(recipe, lora or [], name, Path(picture).parent, screen)
    weights = Weights(quant or recipe.versions.get("quant", "auto"), text_encoder, vae)
    wish = Wish(name, None, device, number, again, force, preview, Path(picture).stem, loras=loras, weights=weights)
    nets = controlnets_of(recipe, controlnet or [], Path(picture).parent, screen)
    wish = replace(wish, limits=Limits(vram, ram), controlnets=nets)
    drawn = draw(request, wish, screen, lambda drawn: compared(Path(picture), recipe, drawn))
    if not json:
        tell(compared(Path(picture), recipe, drawn), screen)


def model_of(recipe: Recipe) -> str:
    """The recipe's release. Raises ModelError where it names none."""
    if recipe.model not in spec_names():
        raise ModelError(
            "this picture was drawn with {model}, which is no release: give its folder with --model",
            model=recipe.model,
        )
    return recipe.model


def inputs_of(
    recipe: Recipe, images: list[str], mask: str | None, beside: Path, screen: Screen
) -> tuple[list[Image.Image], Image.Image | None]:
    """The recipe's input pictures and its mask: as given now, or where they were, or beside the picture."""
    records, masks = recipe.request.get("images") or [], [recipe.request.get("mask")]
    opened = _inputs(records, images, beside, screen, masks=False)
    masked = _inputs([one for one in masks if one], [mask] if mask else [], beside, screen, masks=True)
    return opened, masked[0] if masked else None


def _inputs(
    records: list[Mapping[str, Any]], given: list[str], beside: Path, screen: Screen, masks: bool
) -> list[Image.Image]:
    """The recipe's input pictures: as given now, or where they were; told when their pixels have changed."""
    found: list[Image.Image] = []
    if len(given) > len(records):
        raise PictureError(
            "{flag} is given {given} times and the recipe has {count} such inputs: leave out what is too many",
            **{"flag": "--mask" if masks else "--image", "given": len(given), "count": len(records)},
        )
    for index, record in enumerate(records):
        path = given[index] if index < len(given) else str(record.get("path") or "")
        if path and index >= len(given) and not Path(path).exists():
            path = str(beside / Path(path).name)
        if not path or not Path(path).exists():
            raise PictureError(
                "the input picture {path} is not here any more: give it with {flag}",
                **{"path": record.get("path") or index + 1, "flag": "--mask" if masks else "--image"},
            )
        image = open_mask(path) if masks else open_picture(path)
        if describe_picture(image)["sha256"] != record["sha256"]:
            screen.note("{path} is not the picture the recipe was made with; the result will differ", path=path)
        found.append(image)
    return found


def loras_of(recipe: Recipe, given: list[str], model: str, beside: Path, screen: Screen) -> tuple[str, ...]:
    """The recipe's LoRAs as FILE:STRENGTH: as given now, or where they were, or beside the picture; told when a file
    has changed. What is given beyond them is new."""
    if not recipe.loras:
        return tuple(given)
    from lanting.weights.find import locate
    from lanting.weights.lora_file import find_again, split_strength

    folder = locate(model).path
    found: list[str] = []
    for index, record in enumerate(recipe.loras):
        name, strength = split_strength(given[index]) if index < len(given) else ("", 1.0)
        moved = bool(name)
        file, same = find_again(folder, [name] if moved else [record["path"], str(beside / record["name"])], record)
        if not same:
            screen.note("{path} is not the LoRA the recipe was made with; the result will differ", path=file)
        found.append(f"{file}:{strength if moved and name != given[index] else record['strength']}")
    return (*found, *given[len(found) :])


def controlnets_of(recipe: Recipe, given: list[str], beside: Path, screen: Screen) -> tuple[str, ...]:
    """The recipe's ControlNets: as given now, or where they were, or beside the picture; told when weights have
    changed. Recipes of before they were recorded know of none. Raises ModelError when one is nowhere."""
    records = recipe.controlnets
    if not records:
        return tuple(given)
    if len(given) > len(records):
        raise ModelError(
            "{flag} is given {given} times and the recipe has {count} such inputs: leave out what is too many",
            **{"flag": "--controlnet", "given": len(given), "count": len(records)},
        )
    places = [[place] for place in given]
    places += [[str(one["path"]), str(beside / str(one["name"]))] for one in records[len(given) :]]
    return tuple(_controlnet(*pair, screen) for pair in zip(records, places, strict=True))


def _controlnet(record: Mapping[str, Any], places: list[str], screen: Screen) -> str:
    from lanting.weights.controls import open_controlnet

    here = [place for place in places if os.path.exists(Path(place).expanduser())]
    if not here:
        raise ModelError("the ControlNet {name} is not here any more: give it with --controlnet", name=places[0])
    prints = {place: open_controlnet(place).checkpoint.fingerprint() for place in here}
    same = [place for place in here if prints[place] == record["weights"]]
    if not same:
        screen.note("{path} is not the ControlNet the recipe was made with; the result will differ", path=here[0])
    return (same or here)[0]


def compared(picture: Path, before: Recipe, drawn: Drawn) -> dict[str, Any]:
    """Whether the new picture is the old one, and if not, what may be why: grey levels by which they differ at most,
    None where the file lost pixels, and what has changed since."""
    after = drawn.result.recipes[0]
    worst = _difference(picture, drawn.result.images)
    reasons = [
        f"{name} {before.versions.get(name, '-')} → {after.versions.get(name, '-')}"
        for name in sorted({*before.versions, *after.versions})
        if before.versions.get(name) != after.versions.get(name)
    ]
    if before.weights != after.weights:
        reasons.append(f"weights {before.weights[:10]} → {after.weights[:10]}")
    return {"identical": None if worst is None else worst == 0, "difference": worst, "changed": reasons}


def tell(found: Mapping[str, Any], screen: Screen) -> None:
    """The same in words."""
    if found["identical"]:
        screen.line("identical, pixel for pixel")
    elif found["difference"] is not None:
        screen.line("different by up to {levels} of 255 grey levels", levels=found["difference"])
    else:
        screen.line("the file was saved with losses or changed since, so its pixels are not compared")
    if found["changed"]:
        screen.line("drawn under other conditions: {reasons}", reasons=", ".join(found["changed"]))


def _difference(picture: Path, new: Sequence[Image.Image]) -> int | None:
    """Between a file and what was drawn now, in grey levels; None where the file lost pixels or can't be compared."""
    data = read_bytes(picture)
    if kind_in(data):
        try:
            stack = unpack(data, str(picture))
        except PictureError:  # another program has saved it in its own way
            return None
        old, now = _seen(stack), _seen(stack_of(new, [""] * len(new)))
        found = [_apart(*pair) for pair in zip(old, now, strict=True)] if len(old) == len(now) else [None]
        return None if None in found else max(level for level in found if level is not None)
    if picture.suffix.lower() not in (".png", ".webp"):
        return None
    old = decode_picture(data, str(picture))
    found = [_apart(old, one) for one in new]  # of layers it is one, and doesn't say which
    return min((level for level in found if level is not None), default=None)


def _seen(stack: Stack) -> list[Image.Image]:
    """Each layer on the whole canvas, without what a file gives up."""
    return [spread(layer, stack.size) for layer in stack.layers]


def _apart(old: Image.Image, new: Image.Image) -> int | None:
    from PIL import ImageChops

    if old.size != new.size or old.mode != new.mode:
        return None
    return max(high for _, high in _extrema(ImageChops.difference(old, new)))


def _extrema(image: Image.Image) -> list[tuple[int, int]]:
    return [band.getextrema() for band in image.split()]  # type: ignore[misc]
