"""Quotation marks of a sentence: which to use, and where the quoted characters stand."""

import random
import re
from collections.abc import Sequence

QUOTES = {
    "en": (('"', '"', 15), ("“", "”", 3), ("'", "'", 2)),  # opening, closing, weight
    "zh": (("“", "”", 11), ("「", "」", 4), ('"', '"', 3), ("‘", "’", 2)),
}
MARKS = tuple(dict.fromkeys((pair[0], pair[1]) for group in QUOTES.values() for pair in group))
QUOTED = re.compile(r"\"[^\"]*\"|“[^”]*”|「[^」]*」|‘[^’]*’|(?<![A-Za-z0-9])'[^']*'(?![A-Za-z0-9])")


def pick_marks(lines: Sequence[str], rng: random.Random, language: str) -> tuple[str, str]:
    """Opening and closing mark, neither of which occurs in a line.

    Falls back to 『』 for lines that hold every style; the sentence then still has one reading.
    """
    text = "".join(lines)
    free = [mark for mark in QUOTES[language] if mark[0] not in text and mark[1] not in text]
    if not free:
        return "『", "』"
    opening, closing, _ = rng.choices(free, [mark[2] for mark in free])[0]
    return opening, closing


def without_quotes(prompt: str) -> str:
    """The prompt with every quoted text, marks included, blanked by as many spaces: indices stay as they are."""
    return QUOTED.sub(lambda found: " " * len(found[0]), prompt)


def outside_quotes(prompt: str) -> list[str]:
    """The lower-case English words of a prompt that no quotation marks enclose."""
    return re.findall(r"[a-z]+", without_quotes(prompt).lower())


def locate(prompt: str, lines: Sequence[str]) -> list[list[int]]:
    """For every line, the index into the prompt of each of its characters, spaces included.

    Lines are looked for from left to right, first each in its own quote, then all in one quote (joined by
    single spaces or by nothing). A line the prompt does not quote has an empty list.
    """
    if len(lines) > 1:
        for joint in (" ", ""):
            start = _quoted(prompt, joint.join(lines), 0)
            if start >= 0:
                return _runs(lines, start, len(joint))
    found, cursor = [], 0
    for line in lines:
        start = _quoted(prompt, line, cursor)
        found.append(list(range(start, start + len(line))) if start >= 0 else [])
        cursor = start + len(line) + 1 if start >= 0 else cursor
    return found


def _runs(lines: Sequence[str], start: int, gap: int) -> list[list[int]]:
    runs = []
    for line in lines:
        runs.append(list(range(start, start + len(line))))
        start += len(line) + gap
    return runs


def _quoted(prompt: str, text: str, cursor: int) -> int:
    """Where `text` begins behind `cursor`, in quotation marks; -1 if nowhere."""
    starts = [prompt.find(a + text + b, cursor) for a, b in (*MARKS, ("『", "』"))]
    starts = [start for start in starts if start >= 0]
    return min(starts) + 1 if starts else -1
