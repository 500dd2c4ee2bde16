"""`lanting generate --prompts FILE`: a picture for every line of a file, drawn by one engine that is opened once.

Every line is checked and has a place before a weight is read; each picture is saved as soon as it is drawn, so whoever
stops it keeps what there is. Rejected: all lines as one batch, which would need the memory of all at once.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from lanting.cli.draw import Drawn, Wish, drawn_by, opened, place_names, report, size_in
from lanting.cli.read_back import places_of
from lanting.cli.screen import Screen
from lanting.core.errors import LantingError, RequestError
from lanting.core.lang import explain
from lanting.core.pictures import read_bytes
from lanting.core.save import Place, places_for, save_all
from lanting.core.types import Request, Result, prompts_of
from lanting.specs import settle

if TYPE_CHECKING:
    from lanting.engine import Engine

MOST = 10_000  # lines
LARGEST = 10_000_000  # bytes
# what a line in JSON may say, and which field of Request that is
KEYS = {name: name for name in ("prompt", "seed", "steps", "guidance_scale", "count", "size", "quality", "tries")}
KEYS |= {"negative_prompt": "negative_prompt", "negative": "negative_prompt", "guidance": "guidance_scale"}


@dataclass(frozen=True, slots=True)
class Line:
    """One wish of a file; `size` as it is typed, since only the model knows its own sizes."""

    number: int
    request: Request
    size: str | None
    seeded: bool = False  # the line names a seed of its own


def read_lines(path: str, usual: Request, size: str | None) -> list[Line]:
    """The wishes of a text file (- is stdin): one prompt a line, or one JSON object, which may say more.

    Empty lines and those that begin with # are none. What a line doesn't say is as in `usual`. Raises LantingError.
    """
    name = "stdin" if path == "-" else path
    data = sys.stdin.buffer.read(LARGEST + 1) if path == "-" else read_bytes(Path(path))
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise RequestError("{path} is no text in UTF-8: write one prompt a line", path=name) from None
    lines = [(number, line.strip()) for number, line in enumerate(text.splitlines(), 1)]
    wanted = [(number, line) for number, line in lines if line and not line.startswith("#")]
    if not wanted or len(wanted) > MOST or len(data) > LARGEST:
        raise RequestError(
            "{path} holds {count:,} prompts, and 1 to {most:,} can be drawn at a time",
            **{"path": name, "count": len(wanted), "most": MOST},
        )
    found = []
    for number, line in wanted:
        try:
            found.append(line_of(number, line, usual, size))
        except LantingError as error:
            raise at(name, number, error) from None
    return found


def line_of(number: int, line: str, usual: Request, size: str | None) -> Line:
    if not line.startswith("{"):
        return Line(number, replace(usual, prompt=line), size)
    try:
        told: Any = json.loads(line)
    except (ValueError, RecursionError):
        raise RequestError("it begins as JSON and is none: close it with }, or begin with a word") from None
    table = cast("dict[str, Any]", told)
    if strange := sorted(set(table) - set(KEYS)):
        raise RequestError("it knows no {name}; it knows {known}", name=strange[0], known=", ".join(KEYS))
    own = {KEYS[name]: value for name, value in table.items()}
    if not isinstance(own.get("prompt", ""), str):
        raise RequestError("a prompt must be text, not {kind}", kind=type(own["prompt"]).__name__)
    size = own.pop("size", size)
    if size is not None and not isinstance(size, str):
        raise RequestError('a size is written as "1024x768" or "16:9"')
    return Line(number, replace(usual, **{"prompt": "", **own}), size, own.get("seed") is not None)


def at(path: str, number: int, error: LantingError) -> RequestError:
    return RequestError("line {number} of {path}: {reason}", number=number, path=path, reason=explain(error))


def draw_many(path: str, lines: Sequence[Line], wish: Wish, screen: Screen) -> None:
    """Draw and save them one after another. Raises LantingError."""
    largest = max(lines, key=lambda line: len(prompts_of(line.request)) * whole(line.request.count))
    with opened(largest.request, replace(wish, size=largest.size), screen) as (engine, wish):
        wishes = settled(engine, path, lines)
        names = [place_names(one) for one in wishes]
        places = places_for(wish.output, [name for own in names for name in own], force=wish.force)
        for index, one in enumerate(wishes):
            own, places = places[: len(names[index])], places[len(names[index]) :]
            result = drawn_by(engine, one, wish, own[0].path, screen, f"{index + 1}/{len(wishes)} · ")
            paths = save_all(result.images, kept(result, own, wish), result.recipes)
            report(Drawn(paths, result, one), wish, screen, brief=True)


def whole(count: Any) -> int:
    return count if isinstance(count, int) else 1


def settled(engine: Engine, path: str, lines: Sequence[Line]) -> list[Request]:
    """All of them, checked; with a common seed every picture has one of its own."""
    before, found = 0, list[Request]()
    for line in lines:
        try:
            seed = line.request.seed
            seed = seed if seed is None or line.seeded else seed + before
            one = replace(line.request, size=size_in(line.size, engine.spec, line.request.size), seed=seed)
            found.append(settle(one, engine.spec))
        except LantingError as error:
            raise at("stdin" if path == "-" else path, line.number, error) from None
        before += found[-1].count
    return found


def kept(result: Result, places: list[Place], wish: Wish) -> list[Place]:
    """Where the pictures of one line go: named by the seeds that were kept, where words were read."""
    return places_of(result, wish.output, "", wish.force) if result.readings and not places[0].given else places
