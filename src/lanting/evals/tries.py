"""Draw until the quoted words can be read: each picture is read back, and one that is wrong is drawn with another seed.

What is judged is what people see, by a reader that knows nothing of the model. A text that the model breaks over lines
counts as well. Where no seed is right, the picture that is nearest stays, and it is said what is read there. Rejected:
drawing only the wrong box anew, which needs to know where the box was meant to be.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from lanting.core.errors import RequestError
from lanting.core.quotes import quoted
from lanting.core.recipe import request_of_picture
from lanting.core.types import Recipe, Request, Result, words_of
from lanting.evals.reading import normalized_distance, read_lines, reader
from lanting.evals.scores import normal

if TYPE_CHECKING:
    from PIL.Image import Image

MOST = 64
Read = Callable[["Image"], Sequence[str]]
Draw = Callable[[Request], Result]


@dataclass(frozen=True, slots=True)
class Reading:
    """What was read in a picture that was to show `asked`."""

    asked: tuple[str, ...]
    lines: tuple[str, ...]
    tries: int  # pictures that were drawn for it

    @property
    def missing(self) -> tuple[str, ...]:
        return tuple(text for text in self.asked if not shown(text, self.lines))

    @property
    def distance(self) -> float:
        """0: everything is there; else how far what is read is from what was asked, up to 1 more for every text."""
        asked, lines = ([normal(text) for text in texts] for texts in (self.asked, self.lines))
        return len(self.missing) + normalized_distance(asked, lines) if self.missing else 0.0


@dataclass(frozen=True, slots=True)
class Kept:
    """A picture, and what is read in it."""

    image: Image
    recipe: Recipe
    reading: Reading


def shown(text: str, lines: Sequence[str]) -> bool:
    """Whether a text is a line, or some lines one under the other; case, white space and the width of marks aside: the
    reader gives full-width brackets as narrow ones."""
    wanted, seen = normal(text), [normal(line) for line in lines]
    return any("".join(seen[i:j]) == wanted for i in range(len(seen)) for j in range(i + 1, len(seen) + 1))


def check_tries(request: Request, tries: int) -> None:
    """Raises RequestError unless every prompt quotes something, MissingJudgeError where nothing can read."""
    prompts = words_of(request)
    if silent := next((prompt for prompt in prompts if not quoted(prompt)), None):
        raise RequestError(
            '--tries reads quoted words back, and there are none in {prompt}: write "..." around them',
            prompt=repr(silent[:60]),
        )
    if not 1 <= tries <= MOST:
        raise RequestError(
            "{name} must be a whole number from {low} to {high}, not {value}",
            **{"name": "--tries", "low": 1, "high": MOST, "value": tries},
        )
    reader()


def draw_until_read(request: Request, tries: int, draw: Draw, read: Read = read_lines) -> tuple[Result, list[Reading]]:
    """A result in which every picture was drawn with up to `tries` seeds, until its quoted words are read.

    request  settled: it has a seed; pictures drawn anew take the seeds behind those of all pictures
    draw     one request to its result, such as `Engine.run`
    Returns the result, whose recipes have the seeds that were kept and whose seconds are those of all drawings, and
    what is read in each picture.
    """
    result = draw(request)
    seconds, kept = dict(result.seconds), []
    for image, recipe in zip(result.images, result.recipes, strict=True):
        kept.append(Kept(image, recipe, looked_at(request, len(kept), image, 1, read)))
    following = (request.seed or 0) + len(kept)
    for attempt in range(2, tries + 1):
        for index in (i for i, one in enumerate(kept) if one.reading.missing):
            again = draw(replace(request_of_picture(request, index), seed=following))
            following += 1
            add(seconds, again.seconds)
            reading = looked_at(request, index, again.images[0], attempt, read)
            new = Kept(again.images[0], again.recipes[0], reading)
            better = new.reading.distance < kept[index].reading.distance
            kept[index] = new if better else replace(kept[index], reading=replace(kept[index].reading, tries=attempt))
    images, recipes = tuple(one.image for one in kept), tuple(one.recipe for one in kept)
    return replace(result, images=images, recipes=recipes, seconds=seconds), [one.reading for one in kept]


def looked_at(request: Request, index: int, image: Image, tries: int, read: Read) -> Reading:
    return Reading(quoted(str(request_of_picture(request, index).prompt)), tuple(read(image)), tries)


def add(seconds: dict[str, float], more: Mapping[str, float]) -> None:
    for name, spent in more.items():
        seconds[name] = seconds.get(name, 0.0) + spent
