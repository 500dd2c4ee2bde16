"""Prompts that the text encoder rewrites before it reads them, between loading and the task's canvas.

The request comes back with other words and without the wish, so that its recipe draws the same words again and nobody
writes anew: not a replay, not a drawing that is taken up again (its checkpoint has the words), not a second seed of the
same prompt (the last answers are kept). The head that writes is loaded by the first wish and by nothing else.
"""

from __future__ import annotations

import time
from collections.abc import Generator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lanting.core.errors import RequestError
from lanting.core.rewriting import Written
from lanting.core.types import Notice, Progress, Request, edits, note, prompts_of
from lanting.engine.phases import Phases
from lanting.engine.room import spare
from lanting.engine.studio import KEPT, digest, used
from lanting.tasks.edit import small_copies
from lanting.text.rewrite import MOST, rewrite
from lanting.weights.fits import HEAD

if TYPE_CHECKING:
    from PIL.Image import Image

    from lanting.engine.drawing import Drawing
    from lanting.engine.models import Models

PAUSE = 0.5  # seconds of writing after which it is told how far it is, and may be stopped
SHOWN = 40  # characters of a prompt in a sentence about it


def check_room(models: Models, planned: bool, budget: int | None) -> None:
    """Raises RequestError where a plan was made without the head, and there is no room for it.

    planned  the plan has it
    budget   bytes that the plan's device may take, where somebody said so
    """
    infos = models.checkpoints["text_encoder"].infos
    head = sum(info.end - info.start for name, info in infos.items() if name.startswith(HEAD.partition(".")[0]))
    if models.plan is None or planned or models.writes or head <= spare(models, budget):
        return
    raise RequestError(
        "rewriting prompts takes {size:.1f} GB more, for which this model was not planned: say so when it is opened "
        "(rewrite=True, or lanting serve --rewrite)",
        size=head / 1e9,
    )


def prepare(models: Models, request: Request, drawing: Drawing) -> None:
    """Before anything is loaded: have the head read along, if words are to be written."""
    if request.rewrite and drawing.written is None and not all(key in models.written for key in keys(models, request)):
        models.write_words()


def rewritten(models: Models, request: Request, drawing: Drawing, phases: Phases) -> Generator[Progress, None, Request]:
    """A settled request as it is to be drawn; Progress of the phase "write" on the way."""
    if not request.rewrite:
        return request
    prompts = prompts_of(request)
    if drawing.written is None or len(drawing.written) != len(prompts):
        drawing.written = yield from written(models, request, phases)
        phases.end("write")
    reasons = tuple(one.reason for one in drawing.written)
    drawing.remarks += [kept(prompt, why) for prompt, why in zip(prompts, reasons, strict=True) if why]
    words = tuple(one.words for one in drawing.written)
    one = isinstance(request.prompt, str)
    unwritten = (reasons[0] if one else reasons) if any(reasons) else None
    return replace(request, prompt=words[0] if one else words, asked=request.prompt, unwritten=unwritten, rewrite=False)


def words_for(models: Models, request: Request) -> str:
    """A settled request's prompt as it would be drawn."""
    if edits(request.task):
        models.see_pictures()
    writing = written(models, request, Phases())
    while True:
        try:
            next(writing)
        except StopIteration as end:
            return end.value[0].words


def kept(prompt: str, reason: str) -> Notice:
    """The sentence about a prompt that stays."""
    words = " ".join(prompt.split())
    short = words if len(words) <= SHOWN else words[: SHOWN - 3] + "..."
    return note("“{prompt}” is drawn as it was asked, not rewritten: {reason}", prompt=short, reason=reason)


def written(models: Models, request: Request, phases: Phases) -> Generator[Progress, None, tuple[Written, ...]]:
    """What becomes of each prompt; answers that were given before are known."""
    told = time.perf_counter()
    found: list[Written] = []
    images = seen(models, request)
    for prompt, key in zip(prompts_of(request), keys(models, request), strict=True):
        if key not in models.written:
            models.write_words()
            writing = rewrite(models.reader(), prompt, images)
            while True:
                try:
                    count = next(writing)
                except StopIteration as end:
                    models.written[key] = end.value
                    break
                if time.perf_counter() - told >= PAUSE:
                    told = time.perf_counter()
                    yield phases.tick("write", min(count, MOST), MOST)
        found.append(used(models.written, key, max(KEPT, len(found) + 1)))
    return tuple(found)


def keys(models: Models, request: Request) -> list[tuple[Any, ...]]:
    """By which the answers to a request's prompts are known."""
    shown = tuple(map(digest, request.images)) if edits(request.task) else ()
    return [(prompt, shown, models.spec.defaults.vl_area) for prompt in prompts_of(request)]


def seen(models: Models, request: Request) -> tuple[Image, ...]:
    """The pictures that an instruction is about, as the text encoder sees them when it reads."""
    return small_copies(request.images, models.spec.defaults.vl_area) if edits(request.task) else ()
