"""`settle` turns what a person asked into a request with no gaps, or says in one sentence why it can't.

It runs before any weight is read and needs no torch, so every surface gives the same answer at once.
Settling a settled request changes nothing.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from lanting.core.errors import RequestError
from lanting.core.quotes import quoted
from lanting.core.rewriting import LONGEST
from lanting.core.types import TASK_NAMES, Request, edits, prompts_of
from lanting.specs.model_spec import ModelSpec
from lanting.specs.numbers import number, whole
from lanting.specs.options import settle_choices, settle_options, settle_quality
from lanting.specs.rewriting import settle_rewrite
from lanting.specs.sizes import WIDEST, check_size, fit_area, reference_size, size_of_picture

if TYPE_CHECKING:
    from PIL.Image import Image

LONGEST_PROMPT, LONGEST_NEGATIVE = LONGEST, 4_000  # characters; the reader sees 1,024 tokens at most
LARGEST_SEED = 2**63 - 1
MOST_CONTROLS = 4  # control pictures whose residuals are added up
FROM_NOISE = {"text_to_image", "edit", "layered", "controlnet", "controlnet_inpaint"}  # no strength here
NEEDS_MASK = {"inpaint", "edit_inpaint", "controlnet_inpaint"}
NEEDS_PROMPT = {"text_to_image", "edit", "edit_inpaint", "controlnet"}


def settle(request: Request, spec: ModelSpec) -> Request:
    """Every None filled from the release, every value checked. Raises RequestError."""
    task = _task(request, spec)
    _check_words(request, task)
    rewrite = settle_rewrite(request, task, spec)
    _check_pictures(request, task, spec)
    own = spec.defaults
    negative = own.negative_prompt if request.negative_prompt is None else request.negative_prompt
    check_text(negative, LONGEST_NEGATIVE)
    options, steps = settle_options(request, task, spec)
    choices = settle_choices(request, steps)
    count = whole("count", request.count, 1, 64)
    tries = _tries(request, task)
    last = LARGEST_SEED - count * len(prompts_of(request)) * (tries or 1) + 1  # picture i is drawn with seed + i
    seed = secrets.randbelow(2**32) if request.seed is None else whole("seed", request.seed, 0, last)
    guidance = own.guidance_scale if request.guidance_scale is None else request.guidance_scale
    return replace(
        request,
        task=task,
        negative_prompt=negative,
        size=_size(request, task, spec, options),
        steps=steps,
        guidance_scale=number("guidance", guidance, 0, 100),
        seed=seed,
        count=count,
        strength=_strength(request, task, spec),
        options=options,
        quality=settle_quality(request),
        choices=choices,
        rewrite=rewrite,
        tries=tries,
    )


def _task(request: Request, spec: ModelSpec) -> str:
    task = request.task
    if task is None:
        task = _inferred(request, spec)
    if task not in TASK_NAMES:
        raise RequestError("there is no task {task}; tasks are {names}", task=task, names=", ".join(TASK_NAMES))
    if task in spec.tasks:
        return task
    if task == "text_to_image" and "edit" in spec.tasks:
        raise RequestError("{model} edits pictures: give it at least one", model=spec.name)
    able = ", ".join(spec.tasks)
    raise RequestError("{model} can't do {task}; it does {able}", model=spec.name, task=task, able=able)


def _inferred(request: Request, spec: ModelSpec) -> str:
    if spec.tasks == ("layered",):
        return "layered"
    if request.mask is not None:
        return "edit_inpaint" if "edit_inpaint" in spec.tasks else "inpaint"
    if request.images:
        varied = request.strength is not None and "image_to_image" in spec.tasks  # an edit knows no strength
        return "edit" if "edit" in spec.tasks and not varied else "image_to_image"
    return "text_to_image"


def _check_words(request: Request, task: str) -> None:
    words = prompts_of(request)
    if not 1 <= len(words) <= 64:
        raise RequestError("between 1 and 64 prompts can be drawn at once, not {count}", count=len(words))
    if len(words) > 1 and task == "layered":
        raise RequestError("layers are drawn from one picture and one prompt at a time, not {count}", count=len(words))
    for text in words:
        check_text(text)
        if task in NEEDS_PROMPT and not text.strip():
            raise RequestError("the prompt is empty: say what to draw")


def check_text(text: Any, longest: int = LONGEST_PROMPT) -> None:
    """Raises RequestError unless it is text that can be read, of `longest` characters at most."""
    if not isinstance(text, str):
        raise RequestError("a prompt must be text, not {kind}", kind=type(text).__name__)
    if len(text) > longest:
        raise RequestError(
            "the prompt has {count:,} characters and at most {longest:,} are read: shorten it",
            **{"count": len(text), "longest": longest},
        )
    if any(0xD800 <= ord(letter) <= 0xDFFF for letter in text):
        raise RequestError("the prompt holds bytes that are not UTF-8: retype it")


def _check_pictures(request: Request, task: str, spec: ModelSpec) -> None:
    given, most = len(request.images), _most_pictures(task, spec)
    if task == "text_to_image" and given:
        raise RequestError("text_to_image takes no picture; for that use image_to_image or an edit release")
    if task != "text_to_image" and not given:
        raise RequestError("{task} needs a picture: give at least one", task=task)
    if given > most:
        raise RequestError(
            "{model} takes at most {most} pictures for {task}, not {given}",
            **{"model": spec.name, "most": most, "task": task, "given": given},
        )
    for image in request.images:
        if max(image.size) > WIDEST * min(image.size):
            width, height = image.size
            raise RequestError(
                "a picture of {width}×{height} is too narrow to work on: crop it to at most {widest}:1",
                **{"width": width, "height": height, "widest": WIDEST},
            )
    if task in NEEDS_MASK or request.mask is not None:
        _check_mask(request, task)


def _most_pictures(task: str, spec: ModelSpec) -> int:
    if task.startswith("controlnet"):
        return MOST_CONTROLS
    return max(spec.defaults.max_pictures, 1) if edits(task) else 1


def _check_mask(request: Request, task: str) -> None:
    mask = request.mask
    if mask is None:
        raise RequestError("{task} needs a mask: a picture that is white where to draw anew", task=task)
    if task not in NEEDS_MASK:
        raise RequestError("{task} takes no mask", task=task)
    repainted = request.images if task == "controlnet_inpaint" else request.images[:1]  # of several nets, whichever's
    if all(mask.size != image.size for image in repainted):
        check_mask_size(mask, repainted[0])
    if _brightest(mask) < 128:  # the mask is cut at half
        raise RequestError("the mask is black everywhere, so nothing would change: paint white what to draw anew")


def check_mask_size(mask: Image, picture: Image) -> None:
    """Raises RequestError where a mask is not as large as the picture that it belongs to."""
    if mask.size != picture.size:
        ours, theirs = (f"{w}×{h}" for w, h in (mask.size, picture.size))
        raise RequestError(
            "the mask is {mask} and the picture {picture}: make them the same size", mask=ours, picture=theirs
        )


def repainting(masked: Sequence[bool], either: Sequence[bool]) -> set[int]:
    """Which of several ControlNets, by number, repaint their pictures under a mask: those that can do nothing else;
    without such the first one that can do either."""
    only = {number for number, one in enumerate(masked) if one}
    return only or {number for number, one in enumerate(either) if one and not any(either[:number])}


def _brightest(mask: Image) -> int:
    """Of 255, rounded; 16 bits a pixel are scaled, as for drawing, where converting would cut them off at 255."""
    if mask.mode.startswith("I"):
        return round(cast("int", mask.convert("I").getextrema()[1]) / 257)
    return cast("int", mask.convert("L").getextrema()[1])


def _tries(request: Request, task: str) -> int | None:
    """Where words are read back, there must be some."""
    if request.tries is None:
        return None
    if task == "layered":
        raise RequestError("the words of layers are not read back: leave tries out")
    if silent := next((prompt for prompt in prompts_of(request) if not quoted(prompt)), None):
        raise RequestError(
            'quoted words are to be read back, and there are none in {prompt}: write "..." around them',
            prompt=repr(silent[:60]),
        )
    return whole("tries", request.tries, 1, 64)


def _size(request: Request, task: str, spec: ModelSpec, options: dict[str, Any]) -> tuple[int, int]:
    own = spec.defaults
    if task == "layered":  # the picture's own ratio at the asked resolution; another size would move the layers
        width, height = request.images[0].size
        natural = fit_area(options["resolution"] ** 2, width / height)
        if request.size not in (None, natural):
            raise RequestError("layers keep the picture's own ratio: use resolution 640 or 1024 instead of a size")
        return natural
    if request.size is not None:
        sides = tuple(request.size)
        if len(sides) != 2:
            raise RequestError("a size is two numbers, width and height")
        width, height = (whole("a side of the size", side, -LARGEST_SEED, LARGEST_SEED) for side in sides)
        return check_size(width, height, own.multiple)
    if task == "text_to_image":
        return own.size
    last = task == "edit" and own.vae_area > 0  # the released edit models draw at the ratio of the last picture
    width, height = request.images[-1 if last else 0].size
    if edits(task):
        return reference_size(width, height, own)
    return size_of_picture(width, height, own)


def _strength(request: Request, task: str, spec: ModelSpec) -> float:
    if task not in FROM_NOISE:
        given = spec.defaults.strength if request.strength is None else request.strength
        if number("strength", given, 0, 1) == 0:
            raise RequestError("strength 0 leaves the picture as it is: use more than 0 and at most 1")
        return float(given)
    if request.strength not in (None, 1, 1.0):
        raise RequestError("{task} starts from noise, so strength has no meaning: leave it out", task=task)
    return 1.0
