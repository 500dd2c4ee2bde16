"""The arithmetic of reading scores: what was asked against what was read, and how sure the shares are.

Case, spaces and the width of marks are ignored, as in published benchmarks. Per picture: exact lines; all lines and
nothing else ("clean"); words (CVTG-2K's word accuracy); characters, 1 - edit distance (ChineseWord, and LongText-Bench
for Chinese); NED, the similarity 1 - edit distance / longer text of everything asked to everything read (AnyText,
CVTG-2K). 1 is perfect everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from lanting.core.readings import distances, edit_distance, normal

RESAMPLES = 2000


def pair_up(asked: Sequence[str], found: Sequence[str]) -> list[str]:
    """For every asked line the read line that stands for it ("" for none), each used once, least edits in all.

    Lines are taken as they are; the order does not matter, since a reader may meet columns before rows.
    """
    best: dict[int, tuple[int, tuple[int, ...]]] = {0: (0, ())}  # asked lines served (bits) -> (saved, who by)
    pairs = [[len(a) - edit_distance(a, b) for a in asked] for b in found]  # edits that a pair saves
    for number in range(len(found)):
        for served, (saved, whom) in list(best.items()):
            for i in range(len(asked)):
                bits, gain = served | 1 << i, saved + pairs[number][i]
                if not served & 1 << i and pairs[number][i] > 0 and gain > best.get(bits, (-1, ()))[0]:
                    best[bits] = (gain, (*whom, number * len(asked) + i))
    lines = [""] * len(asked)
    for step in max(best.values())[1]:
        lines[step % len(asked)] = found[step // len(asked)]
    return lines


def rejoin(asked: Sequence[str], found: Sequence[str]) -> list[str]:
    """The read lines, but neighbours that together are one asked line joined: a model may break a long line in two."""
    lines = list(found)
    for line in asked:
        for start in range(len(lines)):
            end = start + 1
            while end < len(lines) and len("".join(lines[start:end])) < len(line):
                end += 1
            if end > start + 1 and "".join(lines[start:end]) == line:
                lines[start:end] = [line]
                break
    return lines


def words_right(asked: str, line: str) -> tuple[int, int]:
    """(words read whole, words) of one asked line; `line` is what was read for it, spaces or not.

    A word counts where all its letters stand side by side in the best alignment and nothing is added to it: readers
    lose spaces too easily to be asked for them.
    """
    words = [word for word in map(normal, asked.split()) if word]
    a, b = "".join(words), normal(line)
    table, matches, added = distances(a, b), [-1] * len(a), set(range(len(b)))
    i, j = len(a), len(b)
    while i and j:
        if a[i - 1] == b[j - 1] and table[i][j] == table[i - 1][j - 1]:
            i, j = i - 1, j - 1
            matches[i] = j
            added.discard(j)
        elif table[i][j] == table[i - 1][j - 1] + 1:
            i, j = i - 1, j - 1
            added.discard(j)
        elif table[i][j] == table[i - 1][j] + 1:
            i -= 1
        else:
            j -= 1
    right, start = 0, 0
    for word in words:
        own = matches[start : start + len(word)]
        whole = own[0] >= 0 and own == list(range(own[0], own[0] + len(word)))
        right += whole and added.isdisjoint((own[0] - 1, own[-1] + 1))
        start += len(word)
    return right, len(words)


@dataclass(frozen=True)
class Reading:
    """One picture's score by one reader: counts, so that pictures can be added up."""

    lines: int
    lines_right: int
    words: int
    words_right: int
    characters: int
    characters_right: int
    ned: float  # 1 is perfect
    clean: bool  # all lines right, and no other line there


def compare(asked: Sequence[str], found: Sequence[str]) -> Reading:
    """The score of one picture. Text that was read and not asked for lowers NED, and the picture is not clean."""
    plain = [normal(line) for line in asked]
    read = rejoin(plain, [normal(line) for line in found])
    lines = pair_up(plain, read)
    words = [words_right(line, read) for line, read in zip(asked, lines, strict=True)]
    right = [max(0, len(a) - edit_distance(a, b)) for a, b in zip(plain, lines, strict=True)]
    return Reading(
        lines=len(plain),
        lines_right=sum(a == b for a, b in zip(plain, lines, strict=True)),
        words=sum(total for _, total in words),
        words_right=sum(good for good, _ in words),
        characters=sum(map(len, plain)),
        characters_right=sum(right),
        ned=similarity("".join(plain), "".join(read)),
        clean=lines == plain and len(read) == len(plain),
    )


def similarity(a: str, b: str) -> float:
    """1 - edit distance / length of the longer."""
    return 1 - edit_distance(a, b) / max(len(a), len(b), 1)


@dataclass(frozen=True)
class Share:
    """`right` of `total`, and the bounds of its 95 % interval."""

    right: float
    total: int
    low: float
    high: float

    @property
    def value(self) -> float:
        return self.right / self.total if self.total else 0.0

    def as_json(self) -> dict[str, float]:
        return {"share": round(self.value, 4)} | {k: round(v, 4) for k, v in asdict(self).items()}


def share_of(rights: Sequence[float], totals: Sequence[int] | None = None) -> Share:
    """The share over pictures, `rights[i]` of `totals[i]` (1 each by default), and its 95 % interval.

    Wilson's over the pictures where each is one trial, or where resampling says nothing: one picture, or all with the
    same share, as 0 or 1. Else the bootstrap over whole pictures, because the lines of one picture fail together.
    """
    good = np.asarray(rights, dtype=np.float64)
    of = np.ones(len(good)) if totals is None else np.asarray(totals, dtype=np.float64)
    right, total = float(good.sum()), int(of.sum())
    trials = bool(np.all(of == 1) and np.all((good == 0) | (good == 1)))
    alike = bool(np.allclose(good * total, of * right, rtol=1e-9, atol=1e-9))
    if trials or alike:
        low, high = wilson(right, int(np.count_nonzero(of)), total)
    else:
        low, high = _bootstrap(good, of)
    return Share(right, total, low, high)


def wilson(right: float, trials: int, total: int | None = None, z: float = 1.96) -> tuple[float, float]:
    """95 % confidence interval of a share (Wilson score); `total` where `right` is counted in other units."""
    if trials == 0:
        return 0.0, 1.0
    share = right / (total or trials)
    middle = (share + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * (share * (1 - share) / trials + z * z / (4 * trials * trials)) ** 0.5
    return max(0.0, middle - half), min(1.0, middle + half)


def _bootstrap(good: np.ndarray, of: np.ndarray) -> tuple[float, float]:
    picks = np.random.default_rng(0).integers(0, len(good), (RESAMPLES, len(good)))
    shares = good[picks].sum(1) / np.maximum(of[picks].sum(1), 1)
    low, high = np.percentile(shares, (2.5, 97.5))
    return float(low), float(high)


@dataclass(frozen=True)
class Score:
    """One reader's score over a set."""

    lines: Share
    clean: Share
    words: Share
    characters: Share
    ned: Share

    def as_json(self) -> dict[str, dict[str, float]]:
        return {
            name: share.as_json()
            for name, share in (
                ("exact_lines", self.lines),
                ("clean_pictures", self.clean),
                ("words", self.words),
                ("characters", self.characters),
                ("ned", self.ned),
            )
        }


def add_up(readings: Sequence[Reading]) -> Score:
    """The scores of many pictures as one."""
    return Score(
        lines=share_of([r.lines_right for r in readings], [r.lines for r in readings]),
        clean=share_of([float(r.clean) for r in readings]),
        words=share_of([r.words_right for r in readings], [r.words for r in readings]),
        characters=share_of([r.characters_right for r in readings], [r.characters for r in readings]),
        ned=share_of([r.ned for r in readings]),
    )
