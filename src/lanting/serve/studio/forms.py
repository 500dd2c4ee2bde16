"""From what stands in a form to an order for the queue, and from a job back to the form. No Gradio, no HTTP."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from lanting.core.errors import RequestError
from lanting.core.types import Request, edits
from lanting.serve.intake import Order
from lanting.serve.jobs import Job
from lanting.serve.studio.words import Say
from lanting.specs import ModelSpec
from lanting.specs.regions import parse_region, write_region

if TYPE_CHECKING:
    from PIL.Image import Image

DIALECT = "studio"
DRAW, EDIT, LAYERS = "draw", "edit", "layers"
PAINTED = 8  # of 255: how opaque a stroke must be to count


@dataclass(frozen=True, slots=True)
class More:
    """What stands below the fold, in the order of the page's fields. None or empty: as the model recommends."""

    seed: str | float | None = None
    count: str | float | None = None
    steps: str | float | None = None
    guidance: str | float | None = None
    strength: float | None = None
    negative: str = ""
    quality: str | None = None
    lora: Mapping[str, float] | None = None  # None: as the server was started
    rewrite: bool | None = None
    tries: str | float | None = None
    regions: str = ""  # a line each


NAMES = tuple(one.name for one in fields(More) if one.name != "lora")


def number(text: str | float | None) -> float | None:
    """A field's number; None where it is empty. Raises RequestError."""
    if text is None or not str(text).strip():
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise RequestError("{text} is not a number: leave the field empty, or write one", text=repr(str(text)[:40]))
    return value


def whole(text: str | float | None) -> int | None:
    """The same for whole numbers; all digits of a seed are kept."""
    try:
        return int(text)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        value = number(text)
    if value is not None and value != int(value):
        raise RequestError("{value} is not a whole number", value=value)
    return None if value is None else int(value)


def request_of(prompt: str, more: More, **rest: Any) -> Request:
    """The wish; `rest` is what only one tab has: size, images, mask, task, options."""
    if lines := [line for line in (more.regions or "").splitlines() if line.strip()]:
        rest["options"] = {**rest.get("options", {}), "regions": [parse_region(line) for line in lines]}
    return Request(
        prompt=(prompt or "").strip(),
        negative_prompt=more.negative.strip() or None,
        seed=whole(more.seed),
        count=whole(more.count) or 1,
        steps=whole(more.steps),
        guidance_scale=number(more.guidance),
        quality=None if more.quality in (None, "", "exact") else more.quality,
        rewrite=more.rewrite,
        tries=whole(more.tries),
        **rest,
    )


def order_of(request: Request, model: str | None, more: More) -> Order:
    return Order(request, model, DIALECT, more.lora or None)


def lora_of(known: Sequence[str], chosen: Sequence[str], strengths: Sequence[float | None]) -> dict[str, float]:
    """The chosen LoRAs with the strength that stands in each one's own field."""
    pairs = zip(known, strengths, strict=False)
    return {name: 1.0 if value is None else float(value) for name, value in pairs if name in chosen}


def edit_of(prompt: str, more: More, images: tuple[Image, ...], mask: Image | None, spec: ModelSpec) -> Request:
    """An edit as well as the model can: told what to change, or drawn over."""
    if not images:
        raise RequestError("there is no picture yet: drop one on the canvas")
    task = edit_task(spec.tasks, mask is not None)
    if task is None:
        raise RequestError("{model} can't change pictures: choose another model", model=spec.name)
    told = edits(task)
    strength = None if told else more.strength
    return request_of(prompt, more, images=images if told else images[:1], mask=mask, task=task, strength=strength)


def edit_task(tasks: Sequence[str], masked: bool) -> str | None:
    """The best task for a picture with or without a mask; None where a model has none."""
    wanted = ("edit_inpaint", "inpaint") if masked else ("edit", "image_to_image")
    return next((task for task in wanted if task in tasks), None)


def layers_of(prompt: str, more: More, image: Image | None, count: float, fine: bool) -> Request:
    """A picture taken apart."""
    if image is None:
        raise RequestError("there is no picture yet: drop one on the canvas")
    options = {"layers": whole(count), "resolution": 1024 if fine else 640}
    return request_of(prompt, more, images=(image,), task="layered", options=options)


def tabs_of(spec: ModelSpec | None) -> tuple[str, ...]:
    """The tabs that make sense for a model; drawing where nothing is known yet."""
    if spec is None:
        return (DRAW,)
    able = [DRAW] if "text_to_image" in spec.tasks else []
    able += [EDIT] if edit_task(spec.tasks, False) or edit_task(spec.tasks, True) else []
    able += [LAYERS] if "layered" in spec.tasks else []
    return tuple(able)


def tab_of(job: Job) -> str:
    """Where a job belongs."""
    request = job.asked["request"]
    if "layers" in (request.get("options") or {}) or request.get("task") == "layered":
        return LAYERS
    return EDIT if request["images"] else DRAW


def sizes_of(spec: ModelSpec | None, say: Say) -> list[tuple[str, str]]:
    """(what is shown, "WIDTHxHEIGHT") of a release's sizes, its own first."""
    if spec is None:
        return []
    own = spec.defaults
    named = {f"{width}x{height}": name for name, (width, height) in own.sizes.items()}
    first = "{}x{}".format(*own.size)
    named = {first: named.get(first) or "{}×{}".format(*own.size)} | named
    words = {"strip": say("Strip"), "wide": say("Wide"), "large": say("Large")}
    return [(words.get(name, name), size) for size, name in named.items()]


def size_in(text: str | None) -> tuple[int, int] | None:
    """A size as the page's choices have it."""
    if not text:
        return None
    width, _, height = text.partition("x")
    return int(width), int(height)


def mask_of(layers: Sequence[Image], size: tuple[int, int]) -> Image | None:
    """What was painted on any layer, white on black, as large as the picture; None where nothing was."""
    from PIL import Image, ImageChops

    mask = Image.new("L", size, 0)
    for layer in layers:
        if layer.mode == "RGBA":
            alpha = layer.getchannel("A").point([0] * PAINTED + [255] * (256 - PAINTED))
            mask = ImageChops.lighter(mask, alpha if alpha.size == size else alpha.resize(size))
    return mask if mask.getbbox() else None


def written(value: float | None) -> str:
    """A number as a field shows it."""
    return "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def values_of(job: Job) -> tuple[str, str | None, More]:
    """(prompt, size, the fold) that a job was asked with, so that the form looks as it did."""
    request: Mapping[str, Any] = job.asked["request"]
    more = More(
        seed=written(request["seed"]),
        count=written(request["count"] if request["count"] != 1 else None),
        steps=written(request["steps"]),
        guidance=written(request["guidance_scale"]),
        strength=request["strength"],
        negative=(request["negative_prompt"] or "").strip(),
        quality=request.get("quality") or "exact",
        rewrite=bool(request.get("rewrite")),
        tries=written(request.get("tries")),
        regions="\n".join(map(write_region, (request.get("options") or {}).get("regions") or ())),
        lora=job.asked["lora"],
    )
    size = "{}x{}".format(*request["size"]) if request["size"] else None
    return job.prompt, size, more
