"""`--tries`: what a person is told of words that were read back, and where pictures go whose seeds were chosen so."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lanting.core.save import Place, named_by, places_for
from lanting.core.types import Result

if TYPE_CHECKING:
    from pathlib import Path

    from lanting.cli.screen import Screen
    from lanting.core.readings import Reading


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
