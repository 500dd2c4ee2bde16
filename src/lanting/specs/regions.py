"""Regions: words for a part of the picture. What people may say, and what is done with it; no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, cast

from lanting.core.errors import RequestError
from lanting.core.types import Request, prompts_of
from lanting.specs.detect import SINGLE_STREAM
from lanting.specs.model_spec import ModelSpec
from lanting.specs.numbers import number

MOST, LONGEST = 8, 2_000  # regions, and characters of one's words
PLACES = {  # names for boxes: left, top, right, bottom, in parts of the picture
    "left": (0.0, 0.0, 0.5, 1.0),
    "right": (0.5, 0.0, 1.0, 1.0),
    "top": (0.0, 0.0, 1.0, 0.5),
    "bottom": (0.0, 0.5, 1.0, 1.0),
    "center": (0.25, 0.25, 0.75, 0.75),
    "top-left": (0.0, 0.0, 0.5, 0.5),
    "top-right": (0.5, 0.0, 1.0, 0.5),
    "bottom-left": (0.0, 0.5, 0.5, 1.0),
    "bottom-right": (0.5, 0.5, 1.0, 1.0),
}


def settle_regions(request: Request, spec: ModelSpec, options: Mapping[str, Any]) -> list[dict[str, Any]]:
    """[{"prompt", "box": [left, top, right, bottom]}] of a request that has some. Raises RequestError."""
    if not knows_regions(spec):
        raise RequestError("{model} reads one text for the whole picture: leave regions out", model=spec.name)
    if len(prompts_of(request)) > 1:
        raise RequestError("regions belong to one prompt, and {count} were given", count=len(prompts_of(request)))
    for name in ("batched_guidance", "in_context", "padding_mask_crop"):
        if options.get(name):
            raise RequestError("regions and {name} don't go together: leave one out", name=name)
    given: Any = request.options["regions"]
    if not isinstance(given, list | tuple) or not 1 <= len(cast("list[Any]", given)) <= MOST:
        raise RequestError("regions must be a list of 1 to {most}, each with a prompt and a box", most=MOST)
    return [_settled(one) for one in cast("list[Any]", given)]


def _settled(given: Any) -> dict[str, Any]:
    if not isinstance(given, Mapping) or set(table := cast("Mapping[str, Any]", given)) != {"prompt", "box"}:
        raise RequestError("a region has a prompt and a box, and nothing else")
    words = table["prompt"]
    if not isinstance(words, str) or not len(words.strip()) > 0 or len(words) > LONGEST:
        raise RequestError("the words of a region must be text of 1 to {most:,} characters", most=LONGEST)
    return {"prompt": words, "box": box_of(table["box"])}


def box_of(given: Any) -> list[float]:
    """A box [left, top, right, bottom] in parts of the picture, from numbers or one of PLACES."""
    if isinstance(given, str) and given in PLACES:
        return list(PLACES[given])
    if isinstance(given, list | tuple) and len(cast("list[Any]", given)) == 4:
        sides = [number("a side of a region's box", side, 0, 1) for side in cast("list[Any]", given)]
        if sides[0] < sides[2] and sides[1] < sides[3]:
            return sides
    raise RequestError(
        "a region's box is left, top, right and bottom in parts of the picture (0,0,0.5,1 is its left half), or one of "
        "{places}",
        places=", ".join(PLACES),
    )


def knows_regions(spec: ModelSpec) -> bool:
    """Whether a release draws with words for parts of a picture."""
    return "text_to_image" in spec.tasks and spec.shape.get("_class_name") != SINGLE_STREAM


def write_region(region: Mapping[str, Any]) -> str:
    """The inverse of `parse_region`."""
    box = tuple(region["box"])
    place = next((name for name, sides in PLACES.items() if sides == box), ",".join(f"{side:g}" for side in box))
    return f"{place}={region['prompt']}"


def parse_region(text: str) -> dict[str, Any]:
    """A region as people type it: BOX=WORDS, say "left=a red fox" or "0,0.5,1,1=a river"."""
    place, found, words = text.partition("=")
    if not found or not words.strip():
        raise RequestError('the region {text} has no words: write it like "left=a red fox"', text=repr(text[:60]))
    sides: Any = place.strip()
    with suppress(ValueError):
        sides = [float(side) for side in place.split(",")]
    return {"prompt": words.strip(), "box": box_of(sides)}


def covered(box: list[float], rows: int, columns: int) -> tuple[range, range]:
    """Rows and columns of tokens that a box touches; at least one of each."""
    left, top, right, bottom = box
    sides = ((top, bottom, rows), (left, right, columns))
    return cast("tuple[range, range]", tuple(_touched(*side) for side in sides))


def _touched(begin: float, end: float, count: int) -> range:
    almost = 1e-9  # a part like 1/3 was divided, and ends where it is meant to
    first = min(math.floor(begin * count + almost), count - 1)
    return range(first, max(math.ceil(end * count - almost), first + 1))
