"""What the signs say: English words, random strings, numbers, prices, times and lines of several short words.

The split is by hash, so it never moves: 2,000 words, and a tenth of all other strings of four or more
characters, are never drawn in training. Shorter strings are so few that training sees nearly all of them:
they have no split. Nor has the dictionary that edits translate by, which must be learnt by heart: its words are taken
out of the 2,000.
"""

import gzip
import hashlib
import random
import string
from collections.abc import Callable
from functools import lru_cache
from importlib import resources
from itertools import chain

from lanting.train.assets import dictionary

PUNCTUATION = "!?&-'.,%$:"
WORD_MIN, _HELD_OUT_WORDS = 4, 2000
MARKS = "!?."  # what a word may end with
_CASES = (str.lower, str.upper, str.capitalize)


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


@lru_cache(maxsize=1)
def words() -> tuple[tuple[str, ...], frozenset[str]]:
    """24,000 lower-case English words of 2-12 letters (SCOWL), and those nearly 2,000 of them that are held out."""
    packed = resources.files("lanting.train").joinpath("words.txt.gz").read_bytes()
    everything = tuple(gzip.decompress(packed).decode().split())
    held_out = sorted((word for word in everything if len(word) >= WORD_MIN), key=_digest)[:_HELD_OUT_WORDS]
    return everything, frozenset(held_out) - _translated()


@lru_cache(maxsize=1)
def _translated() -> frozenset[str]:
    """What edits translate, in both languages: training draws all of it."""
    return frozenset(chain(*dictionary()))


def is_held_out(text: str) -> bool:
    """Whether training never draws this text (no spaces; letter case and a mark at its end do not matter)."""
    text = text.lower().rstrip(MARKS)
    if text in _known():
        return text in words()[1]
    return len(text) >= WORD_MIN and _digest(text) % 10 == 0 and text not in _translated()


@lru_cache(maxsize=1)
def _known() -> frozenset[str]:
    return frozenset(words()[0])


class TextMaker:
    """Draws the lines of a sign with given lengths; `random_share` of the words are random strings."""

    def __init__(self, held_out: bool = False, random_share: float = 0.3) -> None:
        self._held_out = held_out
        self._random_share = random_share
        everything, reserved = words()
        self._by_length: dict[int, list[str]] = {}
        for word in everything:
            if (word in reserved) == held_out or len(word) < WORD_MIN:
                self._by_length.setdefault(len(word), []).append(word)

    def lines(self, rng: random.Random, lengths: list[int]) -> tuple[str, ...]:
        """One text per length. A lone line never holds exactly two words: those would be two lines."""
        return tuple(self._line(rng, length, alone=len(lengths) == 1) for length in lengths)

    def _line(self, rng: random.Random, length: int, alone: bool) -> str:
        if length >= 5 and rng.random() < 0.15:
            return " ".join(self._word(rng, part) for part in _parts(rng, length, 3 if alone else 2))
        return self._word(rng, length)

    def _word(self, rng: random.Random, length: int) -> str:
        if rng.random() < self._random_share or length not in self._by_length:
            return self._string(rng, length)
        if rng.random() < 0.12:
            return self._fitting(rng, length, _figure)
        mark = rng.choice(MARKS) if length >= 4 and rng.random() < 0.06 else ""
        word = rng.choice(self._by_length.get(length - len(mark)) or self._by_length[length])
        case = rng.choices(_CASES, (40, 35, 25))[0]
        return (case(word) + mark)[:length]

    def _string(self, rng: random.Random, length: int) -> str:
        return self._fitting(rng, length, _jumble)

    def _fitting(self, rng: random.Random, length: int, make: Callable[[random.Random, int], str]) -> str:
        """Draws until the text belongs to our side of the split."""
        while True:
            text = make(rng, length)
            if length < WORD_MIN or is_held_out(text) == self._held_out:
                return text


def _parts(rng: random.Random, length: int, count: int) -> list[int]:
    """`count` word lengths that fill a line of `length` with single spaces between them."""
    cuts = sorted(rng.sample(range(1, length - count + 1), count - 1))
    ends = [*cuts, length - count + 1]
    return [end - start for start, end in zip([0, *cuts], ends, strict=True)]


def _jumble(rng: random.Random, length: int) -> str:
    kinds = (
        string.ascii_lowercase,
        string.ascii_uppercase,
        string.ascii_letters,
        string.ascii_uppercase + string.digits,
        string.digits,
        string.ascii_letters + string.digits + PUNCTUATION,
    )
    return "".join(rng.choices(rng.choices(kinds, (30, 30, 12, 10, 10, 8))[0], k=length))


def _figure(rng: random.Random, length: int) -> str:
    """A number, price, share or time of exactly `length` characters."""
    digits = "".join(rng.choices(string.digits, k=length))
    forms = [digits]
    if length >= 2:
        forms += ["$" + digits[1:], digits[1:] + "%"]
    if length >= 4:
        forms += [digits[:-3] + "." + digits[-2:], f"{digits[:-3]}:{digits[-2:]}"]
    if length >= 5:
        forms += [
            "$" + digits[1:-3] + "." + digits[-2:],
            digits[: length // 2] + "-" + digits[length // 2 + 1 :],
        ]
    return rng.choice(forms)
