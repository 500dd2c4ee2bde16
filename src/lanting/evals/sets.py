"""The held-out sets: what is asked of a model, from the designs and edits that training never draws.

A set is a rule over `lanting.train.designs`, so it has no files and never runs out; name, language, seed and count
decide every prompt. Full-size models are asked the same sentences at a size of their own.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lanting.core.errors import RequestError

if TYPE_CHECKING:
    from lanting.train.design import Design
    from lanting.train.designs import Labelled, Mix
    from lanting.train.edits import Edit

TEXT_SETS = ("words", "random", "phrases", "posters", "faces", "edits")
LANGUAGES = ("en", "zh")
SHORTEST = 4  # letters: shorter English texts are so few that training has seen nearly all of them
MOST_HANZI = 6  # characters of a line in the Chinese sets of one line
TRIES = 5000  # designs drawn per kept one before a set counts as empty
Size = tuple[int, int]
Sizes = tuple[Size, ...]


@dataclass(frozen=True)
class Case:
    """One thing asked: the sentence in its language, the picture it should give by rule, for edits those given."""

    prompt: str
    design: Design
    language: str
    sources: tuple[Design, ...] = ()
    edit: Edit | None = None
    labelled: Labelled | None = None

    @property
    def lines(self) -> tuple[str, ...]:
        return self.design.lines

    @property
    def script(self) -> str:
        """The language an optical reader should expect: "zh" where a line holds a Chinese character."""
        from lanting.train.design import is_hanzi

        return "zh" if any(is_hanzi(c) for line in self.lines for c in line) else "en"


@dataclass(frozen=True)
class Rule:
    """What belongs to a text set: the canvas sizes in turn, the mix that is drawn from, and what is kept."""

    sizes: Sizes
    mix: Mix
    keep: Callable[[Design], bool]


def text_cases(name: str, language: str, count: int, seed: int = 0, hanzi: int = 3500, sizes: Sizes = ()) -> list[Case]:
    """`count` cases of a text set.

    hanzi  how many characters, commonest first, the Chinese sets use
    sizes  canvases, in turn; (): the set's own
    """
    if name == "edits":
        return _edited_texts(language, count, seed, hanzi, sizes)
    from lanting.train.designs import DesignMaker

    rule = text_rule(name, language, hanzi)
    maker, rng = DesignMaker(seed, held_out=True, mix=rule.mix), random.Random(f"{name} {language} {seed}")
    sizes = sizes or rule.sizes

    def drawn(index: int) -> Case | None:
        made = maker.sample(rng, sizes[index % len(sizes)], language)
        fits = made.language == language and made.design.concept is None and rule.keep(made.design)
        return Case(made.prompt, made.design, language, labelled=made) if fits else None

    return list(_gather(drawn, count))


def text_rule(name: str, language: str, hanzi: int) -> Rule:
    """The rule of one of TEXT_SETS but "edits"."""
    from lanting.train.design import LARGE, SQUARE, WIDE
    from lanting.train.designs import Mix

    def mix(random_text: float, faces: dict[str, float]) -> Mix:
        return Mix(random_text=random_text, faces=faces, pictogram=0.0, hanzi=hanzi)

    mono, others = {"mono": 4.0, "typewriter": 1.0}, {"sans": 1.0, "serif": 1.0, "handwritten": 1.0}
    one = one_line_zh if language == "zh" else one_line_en
    several = some_lines if language == "zh" else spaced_lines
    rules = {
        "words": Rule((WIDE, SQUARE), mix(0.0, mono), one),
        "random": Rule((WIDE, SQUARE), mix(1.0, mono), one),
        "phrases": Rule((WIDE, SQUARE), mix(0.0, mono), several),
        "posters": Rule((SQUARE, LARGE), mix(0.0, mono), lambda design: 2 <= len(design.lines) <= 4),
        "faces": Rule((WIDE, SQUARE), mix(0.0, others), some_lines),
    }
    return rules[name]


def one_line_en(design: Design) -> bool:
    from lanting.train.sign_texts import MARKS

    line = "".join(design.lines)
    return len(design.lines) == 1 and " " not in line and len(line.rstrip(MARKS)) >= SHORTEST


def one_line_zh(design: Design) -> bool:
    return len(design.lines) == 1 and len(design.lines[0]) <= MOST_HANZI


def some_lines(design: Design) -> bool:
    return 1 <= len(design.lines) <= 2


def spaced_lines(design: Design) -> bool:
    return some_lines(design) and any(" " in line for line in design.lines)


def _edited_texts(language: str, count: int, seed: int, hanzi: int, sizes: Sizes) -> list[Case]:
    """Edits that change the words, in equal parts; the language is that of the words that should come out."""
    from lanting.train.design import is_hanzi
    from lanting.train.designs import Mix
    from lanting.train.edits import EditMaker

    maker = EditMaker(seed, held_out=True, mix=Mix(hanzi=hanzi, pictogram=0.0))
    rng, sizes = random.Random(f"edits {language} {seed}"), sizes or usual_sizes()

    def drawn(index: int) -> Case | None:
        made = maker.sample(rng, sizes[index // 2 % len(sizes)], ("rewrite", "translate")[index % 2])
        new = "".join(line for line in made.target.lines if line not in made.sources[0].lines)
        in_zh = any(map(is_hanzi, new))
        return edit_case(made) if new and in_zh == (language == "zh") else None

    return list(_gather(drawn, count))


def usual_sizes() -> Sizes:
    """The two canvases that most sets alternate between."""
    from lanting.train.design import SQUARE, WIDE

    return WIDE, SQUARE


def edit_cases(
    kinds: tuple[str, ...], count: int, seed: int = 0, concepts: int = 256, hanzi: int = 3500, sizes: Sizes = ()
) -> list[Case]:
    """`count` edits, the kinds in turn; `concepts` is how many pictograms, commonest first, are used."""
    from lanting.train.designs import Mix
    from lanting.train.edits import EditMaker

    check_concepts(concepts)
    maker = EditMaker(seed, held_out=True, mix=Mix(hanzi=hanzi, concepts=concepts, pictogram=0.5))
    rng, sizes = random.Random(f"edit {seed}"), sizes or usual_sizes()

    def drawn(index: int) -> Case | None:
        made = maker.sample(rng, sizes[index // len(kinds) % len(sizes)], kinds[index % len(kinds)])
        return edit_case(made) if _shows(made) else None

    return list(_gather(drawn, count))


def check_concepts(count: int) -> None:
    """Raises RequestError where there are not so many pictograms."""
    from lanting.train.assets import concepts

    if not 1 <= count <= len(concepts()):
        raise RequestError(
            "{name} must be a whole number from {low} to {high}, not {value}",
            **{"name": "--concepts", "low": 1, "high": len(concepts()), "value": count},
        )


def _shows(made: Edit) -> bool:
    """Whether the edit changes the picture at all: some faces draw Chinese alike."""
    from lanting.train.draw import render

    return not bool((render([made.sources[0]]) == render([made.target])).all())


def edit_case(made: Edit) -> Case:
    return Case(made.instruction, made.target, made.language, made.sources, made)


def follow_cases(
    count: int, seed: int = 0, concepts: int = 256, language: str | None = None, sizes: Sizes = ()
) -> list[Case]:
    """Designs whose sentence says much: half show text alone, half a pictogram, with text or without."""
    from lanting.train.designs import DesignMaker, Mix

    check_concepts(concepts)
    maker = DesignMaker(seed, held_out=True, mix=Mix(pictogram=0.0, concepts=concepts, random_text=0.0))
    drawing = DesignMaker(seed, held_out=True, mix=Mix(pictogram=1.0, concepts=concepts, random_text=0.0))
    rng, sizes = random.Random(f"follow {seed}"), sizes or usual_sizes()

    def drawn(index: int) -> Case | None:
        tongue = language or LANGUAGES[index // 2 % 2]
        source, kind = (maker, tongue) if index % 2 else (drawing, rng.choice(("pictogram", tongue)))
        made = source.sample(rng, sizes[index // 4 % len(sizes)], kind)
        return Case(made.prompt, made.design, made.language, labelled=made) if made.language == tongue else None

    return list(_gather(drawn, count))


def open_cases(count: int, seed: int = 0) -> list[Case]:
    """Sentences that say the words and little else, so that the seed has a choice."""
    from lanting.train.designs import DesignMaker, Mix

    maker = DesignMaker(seed, held_out=True, mix=Mix(kinds=(1, 0, 0, 0), pictogram=0.0, random_text=0.0))
    rng = random.Random(f"open {seed}")

    def drawn(index: int) -> Case | None:
        made = maker.sample(rng, usual_sizes()[index % 2], "en")
        said = made.said
        is_open = not (said.ground or said.texture or said.border or said.letters)
        return Case(made.prompt, made.design, made.language, labelled=made) if is_open else None

    return list(_gather(drawn, count))


def _gather(drawn: Callable[[int], Case | None], count: int) -> Iterator[Case]:
    """Draws until `count` are kept. Raises RequestError where nothing meets the rule: a canvas may be too small."""
    for index in range(count):
        for _ in range(TRIES):
            if (case := drawn(index)) is not None:
                yield case
                break
        else:
            raise RequestError("of {count} designs none belongs to this set: choose another --size", count=TRIES)
