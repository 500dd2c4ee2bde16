"""Draw until the quoted words can be read: each picture is read back, and one that is wrong is drawn with another seed.

What is judged is what people see, by a reader that knows nothing of the model. Where no seed is right, the picture that
is nearest stays, and it is said what is read there. Tried and given up: painting anew only the lines that are wrong,
in place. Of 23 posters of nano's with a wrong line four such paintings mended two, four other seeds three
(docs/LOG.md): what it can't write it can't write there either.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

from lanting.core.checkpoint import Checkpoint
from lanting.core.quotes import quoted
from lanting.core.readings import Reading, shown
from lanting.core.recipe import request_of_picture
from lanting.core.types import Progress, Recipe, Request, Result, edits, note
from lanting.reading.reader import read_lines

if TYPE_CHECKING:
    from PIL.Image import Image

Event = Progress | Checkpoint | Result
Read = Callable[["Image"], Sequence[str]]
Draw = Callable[[Request, bool], Iterator[Any]]
SHOWN = 80  # characters of what is read, in a sentence about it


@dataclass(frozen=True, slots=True)
class Kept:
    """A picture, and what is read in it."""

    image: Image
    recipe: Recipe
    reading: Reading


def until_read(request: Request, draw: Draw, read: Read = read_lines) -> Iterator[Event]:
    """The events of all drawings, and one Result in which every picture was drawn with up to `tries` seeds.

    request  settled; pictures drawn anew take the seeds behind those of all pictures
    draw     (a request that reads nothing, whether it is the first) -> its events
    The result's recipes have the seeds that were kept, its seconds are those of all drawings.
    """
    tries, plain = request.tries or 1, replace(request, tries=None)
    result = yield from ended(draw(plain, True))
    began, spent = time.perf_counter(), dict(result.seconds)
    seen = [line for image in request.images for line in read(image)] if edits(request.task) else []
    kept: list[Kept] = []
    for index, (image, recipe) in enumerate(zip(result.images, result.recipes, strict=True)):
        asked = wanted(str(request_of_picture(plain, index).prompt), seen)
        kept.append(Kept(image, recipe, Reading(asked, tuple(read(image)), 1)))
    add(spent, {"read": time.perf_counter() - began})
    following = (request.seed or 0) + len(kept)
    for attempt in range(2, tries + 1):
        for index in (i for i, one in enumerate(kept) if one.reading.missing):
            yield again(kept[index].reading, attempt, tries, spent["read"])
            one = replace(request_of_picture(plain, index), seed=following)
            following += 1
            new = yield from ended(draw(one, False))
            began = time.perf_counter()
            kept[index] = better(kept[index], new, attempt, read)
            add(spent, dict(new.seconds) | {"read": time.perf_counter() - began})
    yield Progress("read", 1, 1, spent["read"])
    images, recipes = tuple(one.image for one in kept), tuple(one.recipe for one in kept)
    readings = tuple(one.reading for one in kept)
    yield replace(result, images=images, recipes=recipes, seconds=spent, readings=readings)


def wanted(prompt: str, seen: Sequence[str]) -> tuple[str, ...]:
    """The texts that a picture must show. An edit's words may quote what is there already, to say which is meant:
    where it quotes others too, those are asked for."""
    texts = quoted(prompt)
    return tuple(text for text in texts if not shown(text, seen)) or texts


def ended(events: Iterator[Any]) -> Generator[Progress | Checkpoint, None, Result]:
    """One drawing's events but the last, which is returned."""
    with closing(cast("Generator[Event]", events)):
        for event in events:
            if isinstance(event, Result):
                return event
            yield event
    raise RuntimeError("a drawing ended without a result")


def better(kept: Kept, result: Result, attempt: int, read: Read) -> Kept:
    """The nearer one of what was kept and what was drawn now."""
    reading = Reading(kept.reading.asked, tuple(read(result.images[0])), attempt)
    if reading.distance < kept.reading.distance:
        return Kept(result.images[0], result.recipes[0], reading)
    return replace(kept, reading=replace(kept.reading, tries=attempt))


def again(reading: Reading, attempt: int, tries: int, seconds: float) -> Progress:
    lines = " / ".join(reading.lines)[:SHOWN] or "-"
    told = note("it reads {lines}: drawn again, try {attempt} of {tries}", lines=lines, attempt=attempt, tries=tries)
    return Progress("read", attempt - 1, tries, seconds, notices=(told,))


def add(seconds: dict[str, float], more: dict[str, float]) -> None:
    for name, spent in more.items():
        seconds[name] = seconds.get(name, 0.0) + spent
