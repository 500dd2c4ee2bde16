"""Sizes in words and numbers: "1664x928", "16:9", and the size a picture is brought to. All in pixels."""

from __future__ import annotations

import math
import re

from lanting.core.errors import RequestError
from lanting.specs.model_spec import Defaults, ModelSpec

SMALLEST, LARGEST = 16, 4096  # one token is 16x16 pixels
WIDEST = 16  # longest side over shortest; beyond this a 1024x1024 area no longer fits LARGEST


def parse_size(text: str, spec: ModelSpec) -> tuple[int, int]:
    """(width, height) from "WxH", a size the release names ("16:9", "wide"), or any ratio "a:b".

    A ratio the release does not name gets the area of its default size. Raises RequestError with what is
    known.
    """
    word = text.strip().lower()
    if word in spec.defaults.sizes:
        return spec.defaults.sizes[word]
    if match := re.fullmatch(r"(\d{1,7})\s*[x×*]\s*(\d{1,7})", word):
        return check_size(int(match[1]), int(match[2]), spec.defaults.multiple)
    match = re.fullmatch(r"(\d{1,4}(?:\.\d{1,4})?):(\d{1,4}(?:\.\d{1,4})?)", word)
    if match and min(float(match[1]), float(match[2])) > 0:
        ratio = float(match[1]) / float(match[2])
        if max(ratio, 1 / ratio) > WIDEST:
            raise RequestError(
                "the ratio {ratio} is too extreme: at most {widest}:1 can be drawn", ratio=text, widest=WIDEST
            )
        width, height = spec.defaults.size
        return fit_area(drawable(width * height, ratio), ratio, step=spec.defaults.multiple)
    names = ", ".join(spec.defaults.sizes)
    raise RequestError(
        "the size {size} is not understood: write WIDTHxHEIGHT, or one of {names}",
        size=repr(text),
        names=names,
    )


def check_size(width: int, height: int, step: int = SMALLEST) -> tuple[int, int]:
    """The same size, or a RequestError that names the nearest one in multiples of `step` that can be drawn."""
    near = tuple(min(max((side + step // 2) // step * step, step), LARGEST) for side in (width, height))
    if not (SMALLEST <= width <= LARGEST and SMALLEST <= height <= LARGEST):
        raise RequestError(
            "the size {width}×{height} can't be drawn: each side must be {low} to {high}. Nearest: {w}×{h}.",
            **{
                "width": width,
                "height": height,
                "low": SMALLEST,
                "high": LARGEST,
                "w": near[0],
                "h": near[1],
            },
        )
    if near != (width, height):
        raise RequestError(
            "the size {width}×{height} can't be drawn: both sides must be multiples of {step}. Nearest: {w}×{h}.",
            **{"width": width, "height": height, "step": step, "w": near[0], "h": near[1]},
        )
    return width, height


def fit_area(area: int, ratio: float, step: int = 32) -> tuple[int, int]:
    """(width, height) of about `area` square pixels and that width/height ratio, in multiples of `step`.

    The rounding (halves to even) is that of the Qwen-Image edit pipelines, so sizes agree with theirs.
    """
    width = math.sqrt(area * ratio)
    height = width / ratio
    return max(round(width / step) * step, step), max(round(height / step) * step, step)


def drawable(area: int, ratio: float) -> int:
    """As much of `area` as a picture of that width/height ratio can have before a side is longer than LARGEST."""
    return min(area, int(LARGEST**2 / max(ratio, 1 / ratio)))


def size_of_picture(width: int, height: int, own: Defaults) -> tuple[int, int]:
    """The drawable size nearest to a picture: its own, or its ratio at the largest area the release names where it is
    larger than that, or longer than what can be drawn."""
    area = largest_area(own)
    if width * height > area or max(width, height) > LARGEST:
        return fit_area(drawable(area, width / height), width / height, step=own.multiple)
    return _nearest(width, height, own.multiple)


def largest_area(own: Defaults) -> int:
    """Square pixels of the largest size the release names."""
    return max(width * height for width, height in (own.size, *own.sizes.values()))


def reference_size(width: int, height: int, own: Defaults) -> tuple[int, int]:
    """(width, height) at which the VAE sees an input picture of an edit.

    Releases bring every picture to `vae_area`. One whose `vae_area` is 0 was trained on pictures as they are:
    they keep their own size in multiples of `multiple`, and those larger than every size it names are shrunk to at most
    the largest.
    """
    if own.vae_area:
        return fit_area(own.vae_area, width / height)
    most, near = largest_area(own), _nearest(width, height, own.multiple)
    if near[0] * near[1] <= most:
        return near
    sides = math.isqrt(most * width // height), math.isqrt(most * height // width)  # rounded down: at most `most`
    step = own.multiple
    return max(sides[0] // step * step, step), max(sides[1] // step * step, step)


def _nearest(width: int, height: int, step: int) -> tuple[int, int]:
    sides = [max((side + step // 2) // step * step, step) for side in (width, height)]
    return sides[0], sides[1]
