"""Labelled designs at random: what people could ask for, in both languages, and the split that is held out.

A `Mix` says how often each kind of content is drawn; training changes it as it goes on. Everything random comes from
the given generator, so one seed gives one stream. Held out are words, strings and Chinese lines by hash, and the
phrasings that `wording` reserves.
"""

from __future__ import annotations

import random
from bisect import bisect
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import accumulate
from typing import Any, TypeVar

from lanting.core.errors import RequestError
from lanting.train.design import (
    ALIGNS,
    COLORS,
    HANZI_MARKS,
    PLACES,
    SCENES,
    SIDES,
    SIZES,
    SQUARE,
    TEXTURES,
    Design,
    Said,
    break_lines,
    letters_for,
    place,
    readable_pairs,
)
from lanting.train.sign_texts import WORD_MIN, TextMaker, is_held_out

KINDS = ("en", "zh", "mixed", "pictogram")
FACE_WEIGHTS = {"mono": 34, "typewriter": 10, "sans": 20, "serif": 18, "handwritten": 18}
TRIES, ROUNDS = 40, 25  # designs drawn until one fits, of the kind that is asked; and how often as many in all
T = TypeVar("T")


@dataclass(frozen=True)
class Mix:
    """Shares of content. `hanzi` and `concepts` limit what is drawn; the commonest come first."""

    kinds: tuple[float, ...] = (0.37, 0.35, 0.06, 0.22)  # of `KINDS`
    hanzi: int = 3500
    concepts: int = 256
    pictogram: float = 0.2  # of the designs with text that also show a pictogram
    random_text: float = 0.35  # of the texts that are random strings or characters
    dense: float = 0.3  # of the designs whose lines are as many and as long as fit
    open: float = 0.45  # how often what may be left to the seed is more than plain
    gap: float = 0.0  # of the lines of both scripts that have a space between them; 0: they have no spaces at all
    faces: dict[str, float] = field(default_factory=lambda: dict(FACE_WEIGHTS))


@dataclass(frozen=True)
class Labelled:
    """A design, the sentence that asks for it and what that sentence states."""

    design: Design
    said: Said
    prompt: str
    language: str


def too_small(size: tuple[int, int]) -> RequestError:
    """Where nothing that is asked fits a canvas."""
    return RequestError(
        "no such design fits {width}x{height}: choose another size", **{"width": size[0], "height": size[1]}
    )


def pick(rng: random.Random, values: Sequence[T], weights: tuple[float, ...]) -> T:
    """What `rng.choices` would draw, in a third of the time: weights are summed once."""
    sums = _sums(weights)
    return values[bisect(sums, rng.random() * sums[-1], 0, len(sums) - 1)]


@cache
def _sums(weights: tuple[float, ...]) -> list[float]:
    return list(accumulate(weights))


@cache
def _phrases(held_out: bool) -> dict[int, tuple[str, ...]]:
    """Chinese phrases by length on one side of the split, commonest first."""
    from lanting.train.assets import phrases

    found: dict[int, list[str]] = {}
    for phrase in phrases():
        if len(phrase) < WORD_MIN or is_held_out(phrase) == held_out:
            found.setdefault(len(phrase), []).append(phrase)
    return {length: tuple(all_of) for length, all_of in found.items()}


@cache
def _hanzi(count: int) -> str:
    from lanting.train.assets import hanzi

    return hanzi()[:count]


class DesignMaker:
    """Draws designs; `held_out` draws only texts and phrasings that training never draws."""

    def __init__(self, seed: int = 0, held_out: bool = False, mix: Mix | None = None):
        self.held_out = held_out
        self._own = random.Random(seed)
        self.change(mix or Mix())

    def change(self, mix: Mix) -> None:
        """Draw from another mix from now on."""
        self.mix = mix
        self._texts = TextMaker(self.held_out, mix.random_text)
        self._words = TextMaker(self.held_out, 0.0)
        self._known = frozenset(_hanzi(mix.hanzi) + HANZI_MARKS)
        self._kinds, self._faces = tuple(mix.kinds), (tuple(mix.faces), tuple(mix.faces.values()))

    def sample(
        self, rng: random.Random | None = None, size: tuple[int, int] = SQUARE, kind: str | None = None
    ) -> Labelled:
        """A random labelled design of one canvas size and, if given, of one kind; of English text where none fits.
        Raises RequestError where that doesn't either."""
        rng = rng or self._own
        chosen = kind or pick(rng, KINDS, self._kinds)
        for number in range(ROUNDS * TRIES):
            chosen = "en" if number == TRIES else chosen
            design = self.design(rng, size, chosen)
            try:
                place(design)
            except RequestError:
                continue
            return self.label(rng, design, chosen)
        raise too_small(size)

    def design(self, rng: random.Random, size: tuple[int, int], kind: str) -> Design:
        """One design that may not fit yet."""
        with_pictogram = kind == "pictogram" or rng.random() < self.mix.pictogram
        alone = kind == "pictogram" and rng.random() < 0.5
        concept = rng.randrange(self.mix.concepts) if with_pictogram and size[1] > 64 else None
        side = rng.choice(SIDES) if size[1] >= 160 else rng.choice(("left", "right", "left", "right", "above"))
        count = rng.choice((1, 1, 1, 2, 3)) if alone or side in ("above", "below") else 1
        face = pick(rng, *self._faces)
        language = "zh" if kind == "zh" or (kind == "pictogram" and rng.random() < 0.3) else "en"
        lines = () if alone and concept is not None else self.lines(rng, size, kind, language, concept is not None)
        ground, letters = rng.choice(readable_pairs())
        return Design(
            size,
            lines,
            ground,
            letters,
            self._second(rng, ground, letters),
            face,
            concept=concept,
            count=count,
            side=side,
            **self._decoration(rng),
        )

    @staticmethod
    def _second(rng: random.Random, ground: str, letters: str) -> str | None:
        """The lower colour of a gradient, mostly none."""
        if rng.random() >= 0.07:
            return None
        fitting = [g for g, c in readable_pairs() if c == letters and g != ground]
        return rng.choice(fitting) if fitting else None

    def _decoration(self, rng: random.Random) -> dict[str, Any]:
        """Scene, alignment, place, border and what the seed decides."""
        loose = rng.random() < self.mix.open
        return {
            "scene": pick(rng, SCENES, (40, 14, 10, 9, 9, 9, 9)),
            "align": pick(rng, ALIGNS, (80, 10, 10)),
            "place": pick(rng, PLACES, (80, 10, 10)),
            "border": rng.random() < 0.2,
            "texture": rng.choice(TEXTURES) if loose else "plain",
            "ornament": rng.randrange(60) if loose else 6 * rng.randrange(10),
        }

    def lines(
        self, rng: random.Random, size: tuple[int, int], kind: str, language: str, beside: bool = False
    ) -> tuple[str, ...]:
        """Lines of text that are likely to fit."""
        columns = size[0] // 16 - (5 if beside else 0)
        most = max(1, min(4, size[1] // 32 - (1 if size[1] < 160 and size[1] > 64 else 2 if size[1] >= 160 else 0)))
        dense = rng.random() < self.mix.dense
        count = most if dense else pick(rng, range(1, most + 1), (5, 4, 2, 2)[:most])
        if kind == "mixed":
            return tuple(self._mixed(rng, min(columns, 12), count == 1) for _ in range(count))
        if language == "zh":
            longest = max(1, min(8, columns // 2))
            lengths = [
                longest - rng.randint(0, longest // 3) if dense else rng.randint(1, longest) for _ in range(count)
            ]
            return tuple(self.chinese(rng, length) for length in lengths)
        return self._texts.lines(rng, self._lengths(rng, columns, count, dense))

    @staticmethod
    def _lengths(rng: random.Random, columns: int, count: int, dense: bool) -> list[int]:
        """Lengths of English lines: half of the designs have lines that can be drawn large."""
        longest = max(2, min(12, columns))
        large = max(2, (columns - 2) // 2)
        if not dense and rng.random() < 0.45:
            longest = min(longest, large)
        shortest = max(2, longest // 2) if dense else 2
        return [1 if rng.random() < 0.03 else rng.randint(shortest, longest) for _ in range(count)]

    def chinese(self, rng: random.Random, length: int) -> str:
        """A Chinese line of `length` characters: phrases, or characters at random."""
        for _ in range(200):
            line = self._phrase(rng, length) if rng.random() > self.mix.random_text else self._jumble(rng, length)
            if length > 3 and rng.random() < 0.06:
                line = line[:-1] + rng.choice("！？。，、：")
            if self._known.issuperset(line) and (length < WORD_MIN or is_held_out(line) == self.held_out):
                return line
        return self._jumble(rng, length)

    def _phrase(self, rng: random.Random, length: int) -> str:
        by_length = _phrases(self.held_out)
        if length in by_length and (length <= 4 or rng.random() < 0.5):
            return rng.choice(by_length[length])
        if length < 4:
            return self._jumble(rng, length)
        head = rng.randint(2, length - 2)
        return self._phrase(rng, head) + self._phrase(rng, length - head)

    def _jumble(self, rng: random.Random, length: int) -> str:
        pool = _hanzi(self.mix.hanzi)
        return "".join([rng.choice(pool) for _ in range(length)])

    def _mixed(self, rng: random.Random, units: int, alone: bool) -> str:
        """A line of both scripts, `units` half-width cells at most. A lone line of two words would be two lines."""
        head = rng.randint(1, max(1, min(3, (units - 2) // 2)))
        rest = units - 2 * head
        latin = self._texts.lines(rng, [rng.randint(1, max(1, min(6, rest)))])[0]
        if not self.mix.gap:
            latin = latin.replace(" ", "")
        hanzi = self.chinese(rng, head)
        gap = " " if self._apart(rng, len(latin) < rest and (not alone or " " in latin)) else ""
        return hanzi + gap + latin if rng.random() < 0.5 else latin + gap + hanzi

    def _apart(self, rng: random.Random, may: bool) -> bool:
        """Whether a space stands between two scripts; no number is drawn where none ever does."""
        return bool(self.mix.gap) and rng.random() < self.mix.gap and may

    def label(self, rng: random.Random, design: Design, kind: str) -> Labelled:
        """Decide what is said, bring the design in line with it, and phrase it."""
        from lanting.train.wording import describe

        said = Said(
            ground=rng.random() < 0.94 or design.ground2 is not None,
            letters=bool(design.lines) and rng.random() < 0.75,
            face=bool(design.lines) and (design.face != "mono" or rng.random() < 0.15),
            align=bool(design.lines) and (design.align != "center" or rng.random() < 0.05),
            place=design.place != "middle" or rng.random() < 0.03,
            border=rng.random() < (0.75 if design.border else 0.12),
            texture=(design.texture != "plain" and rng.random() < 0.2) or rng.random() < 0.02,
            one_quote=self._as_one_quote(design.lines) and rng.random() < 0.6,
        )
        if not said.letters and design.lines:
            design = replace(design, letters=letters_for(design.ground, design.ground2))
            if design.ground2 and (design.letters, design.ground2) not in [(c, g) for g, c in readable_pairs()]:
                design = replace(design, ground2=None)
        if not design.lines:
            design = replace(design, letters=letters_for(design.ground, design.ground2))
        zh = (kind == "zh" and rng.random() < 0.8) or (kind in ("mixed", "pictogram") and rng.random() < 0.5)
        zh = zh or (kind == "en" and rng.random() < 0.1)
        language = "zh" if zh else "en"
        return Labelled(design, said, describe(design, said, rng, language, self.held_out), language)

    @staticmethod
    def _as_one_quote(lines: Sequence[str]) -> bool:
        """Whether one quoted text with these words breaks into exactly these lines."""
        try:
            return len(lines) > 1 and break_lines(" ".join(lines)) == tuple(lines)
        except RequestError:
            return False


__all__ = ["COLORS", "KINDS", "SIZES", "DesignMaker", "Labelled", "Mix"]
