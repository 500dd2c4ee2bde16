"""The words only some tasks know (layers, resolution, control_scale, ...): their ranges and defaults."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any, cast

from lanting.core.errors import RequestError
from lanting.core.quality import NAMES, check_safe, check_words
from lanting.core.types import Request
from lanting.specs.model_spec import ModelSpec
from lanting.specs.numbers import number, whole
from lanting.specs.regions import settle_regions

EVERYWHERE = ("sigmas", "batched_guidance")
CONTROL = ("control_scale", "control_start", "control_end")
OF_TASK = {
    "text_to_image": ("regions",),
    "image_to_image": ("regions",),
    "edit": ("keep",),
    "layered": ("layers", "resolution"),
    "inpaint": ("padding_mask_crop", "regions"),
    "edit_inpaint": ("padding_mask_crop",),
    "controlnet": (*CONTROL, "in_context", "regions"),
    "controlnet_inpaint": (*CONTROL, "regions"),
}


def settle_options(request: Request, task: str, spec: ModelSpec) -> tuple[dict[str, Any], int]:
    """The task's options filled and checked, and the number of steps (given, or the length of `sigmas`)."""
    own = spec.defaults
    known = (*EVERYWHERE, *OF_TASK.get(task, ()))
    given = dict(request.options)
    if strange := sorted(set(given) - set(known)):
        raise RequestError(
            "{task} knows no option {name}; it knows {known}",
            **{"task": task, "name": strange[0], "known": ", ".join(known)},
        )
    if task == "layered":
        given["layers"] = whole("layers", given.get("layers", own.layers), 1, 20)
        given.setdefault("resolution", own.resolution)
        if given["resolution"] not in (640, 1024):
            raise RequestError("the resolution must be 640 or 1024, not {value}", value=given["resolution"])
    if given.get("in_context") is True:
        _settle_in_context(given, len(request.images))
    elif "control_scale" in known:
        _settle_control(given, len(request.images))
    if given.get("padding_mask_crop") is not None:
        given["padding_mask_crop"] = whole("padding_mask_crop", given["padding_mask_crop"], 0, 4096)
    if task == "edit" and own.keep:
        given.setdefault("keep", True)
    for name in ("batched_guidance", "keep", "in_context"):
        if not isinstance(given.get(name, False), bool):
            raise RequestError("{name} must be true or false, not {value}", name=name, value=given[name])
    if given.get("regions") is not None:
        given["regions"] = settle_regions(request, spec, given)
    steps = own.steps if request.steps is None else request.steps
    if given.get("sigmas") is None:
        given.pop("sigmas", None)
        return given, whole("steps", steps, 1, 1000)
    given["sigmas"] = _sigmas(given["sigmas"])
    count = len(given["sigmas"])
    if request.steps not in (None, count):
        raise RequestError("{count} sigmas make {count} steps, not {steps}", count=count, steps=request.steps)
    return given, count


def settle_quality(request: Request) -> str:
    """The level that was asked for, by its name."""
    name = request.quality or "exact"
    if name not in NAMES:
        raise RequestError("there is no quality {name}; choose {names}", name=name, names=", ".join(NAMES))
    return name


def settle_choices(request: Request, steps: int) -> dict[str, Any] | None:
    """What was decided while the picture was drawn before, if it is that: recipes come from strangers' files."""
    if request.choices is None:
        return None
    if isinstance(given := cast("Any", request.choices), Mapping):
        table = dict(cast("Mapping[str, Any]", given))
        words, safe = table.get("steps", ""), table.get("safe", [])
        known = isinstance(words, str) and (not words or check_words(words.split(), steps))
        if known and isinstance(safe, list | tuple) and check_safe(cast("list[Any]", safe), steps):
            return table
    raise RequestError("the recipe's choices are none for {steps} steps: draw the picture anew", steps=steps)


def _settle_control(given: dict[str, Any], pictures: int) -> None:
    """Each a number, or one number per control picture."""
    for name, most, default in (("control_scale", 10, 1.0), ("control_start", 1, 0.0), ("control_end", 1, 1.0)):
        value = given.get(name, default)
        if not isinstance(value, list | tuple):
            given[name] = number(name, value, 0, most)
            continue
        values = cast("list[Any]", value)
        if len(values) != pictures:
            raise RequestError(
                "{name} has {given} numbers for {count} control pictures: give one, or one each",
                **{"name": name, "given": len(values), "count": pictures},
            )
        given[name] = tuple(number(name, one, 0, most) for one in values)
    for start, end in zip(_each(given["control_start"], pictures), _each(given["control_end"], pictures), strict=True):
        if start >= end:
            raise RequestError("control_start {start} must come before control_end {end}", start=start, end=end)


def _settle_in_context(given: Mapping[str, Any], pictures: int) -> None:
    """The control picture stands beside the target: nothing else of a ControlNet's has a meaning."""
    if name := next((name for name in CONTROL if name in given), None):
        raise RequestError("{name} has no meaning in context: give the LoRA a strength", name=name)
    if pictures != 1:
        raise RequestError("one control picture can stand in context, not {count}", count=pictures)


def _each(value: float | tuple[float, ...], pictures: int) -> tuple[float, ...]:
    return value if isinstance(value, tuple) else (value,) * pictures


def _sigmas(value: Any) -> tuple[float, ...]:
    """Noise levels as people may give them: falling, each above 0 and at most 1."""
    if isinstance(value, list | tuple) and 1 <= len(cast("list[Any]", value)) <= 1000:
        levels = tuple(number("a sigma", level, 0, 1) for level in cast("list[Any]", value))
        if all(a > b for a, b in pairwise(levels)) and levels[-1] > 0:
            return levels
    raise RequestError("sigmas must be 1 to 1000 falling numbers, each above 0 and at most 1")
