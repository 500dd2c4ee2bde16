"""`--tries`: pictures whose words are read back, drawn until they are right; and what a person is told of that."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from lanting.core.save import Place, named_by, places_for
from lanting.core.types import Request, Result

if TYPE_CHECKING:
    from pathlib import Path

    from lanting.cli.screen import Screen
    from lanting.evals.tries import Reading


def check(request: Request, tries: int) -> None:
    """Raises LantingError where nothing is quoted, or nothing can read; loads what reads."""
    if tries != 1:
        from lanting.evals.tries import check_tries

        check_tries(request, tries)


def read_back(request: Request, tries: int, draw: Callable[[Request], Result]) -> tuple[Result, tuple[Reading, ...]]:
    """The result of `draw`, of which pictures are drawn again until their words are read."""
    if tries == 1:
        return draw(request), ()
    from lanting.evals.tries import draw_until_read

    result, readings = draw_until_read(request, tries, draw)
    return result, tuple(readings)


def places_of(result: Result, output: str | None, title: str, force: bool) -> list[Place]:
    """Under the seeds that were kept."""
    return places_for(output, named_by(result.recipes), 1, title, force)


def tell(readings: Sequence[Reading], paths: Sequence[Path], screen: Screen) -> None:
    """A line a picture."""
    for reading, path in zip(readings, paths, strict=bool(readings)):
        lines = " / ".join(reading.lines) or "-"
        if reading.missing:
            screen.line(
                "the words of {path} are not right in {tries} tries: it reads {lines}",
                **{"path": path, "tries": reading.tries, "lines": lines},
            )
        else:
            screen.line("read back: {lines}   (try {tries})", lines=lines, tries=reading.tries)


def as_json(reading: Reading) -> dict[str, Any]:
    told = {"asked": list(reading.asked), "read": list(reading.lines)}
    return {"text": {**told, "right": not reading.missing, "tries": reading.tries}}
