"""What is read in a picture against what was asked to stand there.

Case, white space and the width of marks do not count, since readers lose them and people forgive them. A text that the
model breaks over lines counts as well.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


def normal(text: str) -> str:
    """As it is compared: without white space and case, full-width marks and letters as their narrow twins."""
    return re.sub(r"\s+", "", unicodedata.normalize("NFKC", text)).casefold()


def edit_distance(a: str, b: str) -> int:
    """Levenshtein distance: insertions, deletions and replacements that turn a into b."""
    return int(distances(a, b)[-1][-1])


def distances(a: str, b: str) -> list[list[int]]:
    """The table of edit distances between all beginnings of a (rows) and of b (columns)."""
    table = [list(range(len(b) + 1))]
    for i, x in enumerate(a, 1):
        previous, row = table[-1], [i]
        for j, y in enumerate(b, 1):
            row.append(min(previous[j] + 1, row[-1] + 1, previous[j - 1] + (x != y)))
        table.append(row)
    return table


def normalized_distance(asked: Sequence[str], found: Sequence[str]) -> float:
    """Edit distance of everything asked to everything read, divided by the longer: 0 perfect, 1 nothing right."""
    a, b = (normal("".join(lines)) for lines in (asked, found))
    return edit_distance(a, b) / max(len(a), len(b), 1)


def hits(asked: Sequence[str], found: Sequence[str]) -> list[bool]:
    """For every asked line: is it one of those that were read?"""
    seen = [normal(line) for line in found]
    return [normal(line) in seen for line in asked]


def shown(text: str, lines: Sequence[str]) -> bool:
    """Whether a text is a line, or some lines one under the other."""
    wanted, seen = normal(text), [normal(line) for line in lines]
    return any("".join(seen[i:j]) == wanted for i in range(len(seen)) for j in range(i + 1, len(seen) + 1))


@dataclass(frozen=True, slots=True)
class Reading:
    """What was read in a picture that was to show `asked`."""

    asked: tuple[str, ...]
    lines: tuple[str, ...]  # top to bottom, without spaces
    tries: int  # pictures that were drawn for it

    @property
    def missing(self) -> tuple[str, ...]:
        return tuple(text for text in self.asked if not shown(text, self.lines))

    @property
    def distance(self) -> float:
        """0: everything is there; else how far what is read is from what was asked, up to 1 more for every text."""
        missing = self.missing
        return len(missing) + normalized_distance(self.asked, self.lines) if missing else 0.0

    def as_json(self) -> dict[str, Any]:
        told = {"asked": list(self.asked), "read": list(self.lines)}
        return told | {"right": not self.missing, "tries": self.tries}
