"""How people ask for a design: one design, many sentences, in English and Chinese.

A sentence names what `Said` states and leaves out the rest; the rules of the design fill it in. One skeleton in
eight is reserved: only held-out prompts use it. Words outside quotes come from tables, so that the vocabulary can
make each of them one token.
Rejected: writing the wish as keywords. A model trained on those draws nothing for a plain request.
"""

from __future__ import annotations

import random
import re
from functools import cache
from typing import TYPE_CHECKING

from lanting.train import wording_edits, wording_en, wording_names, wording_zh
from lanting.train.assets import concepts
from lanting.train.wording_edits import instruct
from lanting.train.wording_en import Facts, describe_en
from lanting.train.wording_quotes import locate, outside_quotes, without_quotes
from lanting.train.wording_signs import Wish, phrase
from lanting.train.wording_zh import describe_zh

if TYPE_CHECKING:
    from lanting.train.design import Design, Said

LANGUAGES = ("en", "zh")
RESERVED = 8  # every so many-th skeleton is for held-out prompts only


def describe(design: Design, said: Said, rng: random.Random, language: str, held_out: bool = False) -> str:
    """One sentence for the design in `language` ("en" or "zh"); the same `rng` state gives the same sentence.

    Lines are quoted from the top down. `held_out` uses only the skeletons that training never meets.
    """
    name = _name(design, language)
    words, drawn = bool(design.lines), design.concept is not None
    facts = Facts(
        design=design,
        name=name,
        ground=said.ground,
        texture=said.texture,
        letters=said.letters and words,
        face=said.face and words,
        align=said.align and words,
        place=said.place and (words or drawn),
        border=said.border,
        concept=drawn,
    )
    room = wording_zh if language == "zh" else wording_en
    skeletons = _side_of_split(room.SKELETONS if words else room.WORDLESS, held_out)
    if not words and not drawn:
        skeletons = ()
    tell = describe_zh if language == "zh" else describe_en
    return tell(facts, skeletons, said.one_quote, rng)


@cache
def _side_of_split(skeletons: tuple[str, ...], held_out: bool) -> tuple[str, ...]:
    return tuple(s for number, s in enumerate(skeletons) if (number % RESERVED == RESERVED - 2) == held_out)


def _name(design: Design, language: str) -> str:
    if design.concept is None:
        return ""
    concept = concepts()[design.concept]
    return concept.name_zh if language == "zh" else concept.name_en


def locate_concept(prompt: str, name: str) -> list[int]:
    """Indices of the characters of a pictogram's name outside quotes, its plural ending included; [] if absent.

    A name that is also a colour or a kind of picture (`orange`, `book`) is found where it is counted.
    """
    text = without_quotes(prompt)
    if all(ord(character) < 0x2000 for character in name):
        forms = sorted({name, wording_names.plural(name)}, key=len, reverse=True)
        pattern = "(?<![A-Za-z])(?:" + "|".join(map(re.escape, forms)) + ")(?![A-Za-z])"
        found = list(re.finditer(pattern, text, re.IGNORECASE))
        counted = [m for m in found if _counted_en(text, m.start(), m.end())]
    else:
        found = list(re.finditer(re.escape(name), text))
        counted = [m for m in found if text[: m.start()].endswith(("个", "只"))]
    chosen = (counted or found or [None])[0]
    return list(range(chosen.start(), chosen.end())) if chosen else []


GROUND_WORDS = "background to gradient cover color colour striped dotted plain checked wavy paper"
NOUNS = frozenset(
    word
    for group in (*wording_en.SCENES.values(), *wording_en.FACES.values(), wording_en.LETTERS, (GROUND_WORDS,))
    for phrase_ in group
    for word in phrase_.split()
)


def _counted_en(text: str, start: int, end: int) -> bool:
    """Whether a word stands as a counted thing: behind a number or an article, and not in front of a noun."""
    before = re.search(r"(\w+)\s+$", text[:start])
    after = re.match(r"\s+([a-z]+)", text[end:])
    counted = start == 0 or (before is not None and before[1].lower() in ("a", "an", "the", "one", "two", "three"))
    return counted and not (after and after[1] in NOUNS)


def wording_words() -> set[str]:
    """Every lower-case word that a sentence or an instruction can hold outside its quotes, names left out."""
    words: set[str] = set()
    for room in (wording_en, wording_edits, wording_names):
        for key, table in vars(room).items():
            if key.isupper() and key not in ("IRREGULAR", "UNCOUNTED"):
                _collect(table, words)
    return words | {"a", "an", "and", "icons", "symbols", "the", "with"}


def _collect(table: object, words: set[str]) -> None:
    """Add the words of a table, or of the values of a dictionary, without what stands in braces."""
    if isinstance(table, str):
        words.update(re.findall(r"[a-z]+", re.sub(r"\{[^}]*\}", " ", table)))
    elif isinstance(table, dict | tuple):
        for entry in table.values() if isinstance(table, dict) else table:
            _collect(entry, words)


__all__ = [
    "LANGUAGES",
    "Wish",
    "describe",
    "instruct",
    "locate",
    "locate_concept",
    "outside_quotes",
    "phrase",
    "wording_words",
]
