"""English sentences for a design: a skeleton, and the stated facts in the places that it leaves for them.

Every lower-case word of the upper-case tables here is one token of the vocabulary.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cache
from string import Formatter
from typing import TYPE_CHECKING

from lanting.train.wording_names import NUMBERS, article, concept_phrase
from lanting.train.wording_quotes import pick_marks

if TYPE_CHECKING:
    from lanting.train.design import Design

COLOURS = ("red", "blue", "green", "yellow", "white", "black", "orange", "purple", "pink", "gray", "brown", "cyan")
GREY = "grey"
SCENES = {
    "sign": ("sign", "sign", "sign", "board"),
    "poster": ("poster",),
    "label": ("label", "label", "tag"),
    "book": ("book cover",),
    "slide": ("slide", "slide", "presentation slide"),
    "button": ("button",),
    "shop": ("shop sign", "shop sign", "storefront sign"),
}
FACES = {
    "mono": ("mono", "monospaced", "monospaced"),
    "typewriter": ("typewriter",),
    "sans": ("sans", "sans-serif", "bold"),
    "serif": ("serif",),
    "handwritten": ("handwritten", "handwritten", "brush", "casual"),
}
TEXTURES = {
    "plain": (("plain",), ("no pattern",)),  # as adjective, as noun
    "dots": (("dotted",), ("dots", "a dot pattern")),
    "stripes": (("striped",), ("stripes", "a stripe pattern")),
    "grid": (("checked",), ("checks", "a grid pattern")),
    "waves": (("wavy",), ("waves", "a wave pattern")),
    "paper": (("paper",), ("a paper texture",)),
}
LETTERS = ("letters", "letters", "text", "lettering", "type")
IN_COLOUR = ("in {}", "in {} {letters}", "in {} {letters}", "written in {}")
IN_FACE = ("in {} {letters}", "in {} {letters}", "in {a} font")
PLACES = {
    "top": ("at the top", "at the top", "near the top"),
    "middle": ("in the middle", "in the middle", "in the center"),
    "bottom": ("at the bottom", "at the bottom", "near the bottom"),
}
ALIGNS = {
    "left": ("left-aligned", "aligned left", "aligned to the left"),
    "center": ("centered", "centered", "aligned to the center"),
    "right": ("right-aligned", "aligned right", "aligned to the right"),
}
CORNERS = ("at the {place} {align}", "in the {place} {align}")
BORDERS = (("a border", "a border", "a frame"), ("no border", "no border", "no frame"))
SIDES = {
    "above": ("above the text", "above the text", "above", "over the text", "on top"),
    "below": ("below the text", "below the text", "below", "under the text"),
    "left": ("to the left of the text", "left of the text", "on the left"),
    "right": ("to the right of the text", "right of the text", "on the right"),
}
BESIDE = {"above": ("above", "over"), "below": ("below", "under"), "left": ("left of",), "right": ("right of",)}
BACKGROUNDS = (
    "{a} background",
    "{a} background",
    "a background fading from {top} to {low}",
    "a gradient from {top} to {low}",
)
TEXTURED = "{a} background with {pattern}"
EMPTY = ("empty", "blank")
VERBS = ("that says", "that says", "that reads", "saying", "saying", "reading", "with the text", "with the words")
PLURAL_VERBS = ("saying", "reading", "that say")
TITLED = {"book": "titled", "poster": "titled", "slide": "titled", "button": "labeled"}
MAKES = ("make", "make", "draw", "create", "design", "make me", "i want", "i need", "please draw")
VIEWS = ("a picture", "an image", "a photo", "a design")
TEXTS = ("the text", "the words", "text", "the lines")
WRITTEN = ("written", "printed")
JOINTS = (" and ", " and ", ", ", ", ", " then ", ", then ", " ", " above ", " over ")
IN_LINES = (" in {} lines", " on {} lines")
NTH = " on the first line and {} on the second"

# Lower-case places may stay empty and bring their own space; upper-case ones need their fact.
SKELETONS = (
    "{scene} {verb} {quote}{letters}{at}{facts}",
    "{scene} {verb} {quote}{at}{letters}{facts}",
    "{scene} {verb} {quote}{letters}{at}{tail}",
    "{scene}{facts} {verb} {quote}{letters}{at}",
    "{scene}{facts} {verb} {quote}{at}{letters}",
    "{scene}{facts} {verb} {quote}",
    "{scene}{facts} and {texts} {quote}{letters}{at}",
    "{scene} with {quote}{letters}{at}{tail}",
    "{scene}, {quote}{letters}{at}{tail}",
    "{scene}, {quote}{tail}",
    "{scene}: {quote}{letters}{at}{tail}",
    "{scene}. it says {quote}{letters}{at}{tail}",
    "{scene}. text: {quote}{tail}",
    "{scene} where {quote} is {written}{letters}{at}{tail}",
    "{scene} with {LETTERS} {verbs} {quote}{at}{tail}",
    "{scene} with {LETTERS}, {quote}{tail}",
    "{quote}{letters}{at} on {scene}{facts}",
    "{quote} {written}{letters}{at} on {scene}{facts}",
    "{texts} {quote}{letters}{at} on {scene}{facts}",
    "{LETTERS} {verbs} {quote}{at} on {scene}{facts}",
    "write {quote}{letters}{at} on {scene}{facts}",
    "on {scene}{facts} write {quote}{letters}{at}",
    "put {quote}{letters}{at} on {scene}{facts}",
    "{make} {scene} {verb} {quote}{letters}{at}{facts}",
    "{make} {scene}{facts} {verb} {quote}{letters}{at}",
    "{make} {scene}, it should say {quote}{letters}{at}{tail}",
    "{view} of {scene} {verb} {quote}{letters}{at}{facts}",
    "{view} of {scene}{facts} {verb} {quote}{letters}{at}",
    "{noun} on {GROUND} {verb} {quote}{letters}{at}{tail}",
    "{noun}, {GROUND}, {quote}{tail}",
    "{noun} with {GROUND} {verb} {quote}{letters}{at}{tail}",
    "{quote}{letters}{at} on {GROUND}, {noun}{facts}",
    "{CONCEPT} {SIDE} {quote}{letters}{at} on {scene}{facts}",
    "{scene} with {CONCEPT} {SIDE} {quote}{letters}{at}{tail}",
    "{scene} with {CONCEPT} {SIDE} the text {quote}{letters}{at}{tail}",
)
WORDLESS = (
    "{CONCEPT} on {scene}{facts}",
    "{CONCEPT} on {scene}{tail}",
    "{scene} with {CONCEPT}{tail}",
    "{scene} showing {CONCEPT}{tail}",
    "{scene}: {CONCEPT}{tail}",
    "{scene}, {CONCEPT}{tail}",
    "{make} {scene} with {CONCEPT}{tail}",
    "{make} {CONCEPT} on {scene}{facts}",
    "{view} of {CONCEPT} on {scene}{facts}",
    "{CONCEPT} on {GROUND}, {noun}{facts}",
    "{noun} with {CONCEPT} on {GROUND}{tail}",
    "put {CONCEPT} on {scene}{facts}",
)

NOTHING = ("{scene}{facts}", "{EMPTY}{facts}")


@dataclass
class Facts:
    """What the sentence still has to state; stated facts are taken out."""

    design: Design
    name: str  # of the pictogram
    ground: bool
    texture: bool
    letters: bool
    face: bool
    align: bool
    place: bool
    border: bool
    concept: bool


def describe_en(facts: Facts, skeletons: tuple[str, ...], one_quote: bool, rng: random.Random) -> str:
    """One English sentence that states the facts."""
    text = _filled(rng.choice(fitting_skeletons(skeletons, stated(facts), NOTHING)), facts, one_quote, rng)
    if text[0].islower() and rng.random() < 0.4:
        text = text[0].upper() + text[1:]
    return text + "." if rng.random() < 0.1 else text


def stated(facts: Facts) -> frozenset[str]:
    """The upper-case places that these facts can fill."""
    have = {"LETTERS"} if facts.letters or facts.face else set()
    have |= {"GROUND"} if facts.ground else set()
    return frozenset(have | ({"CONCEPT", "SIDE"} if facts.concept else set()))


@cache
def fitting_skeletons(skeletons: tuple[str, ...], have: frozenset[str], empty: tuple[str, ...]) -> list[str]:
    """The skeletons whose upper-case places can all be filled, twice those that have such places; else `empty`."""
    fitting = []
    for skeleton in skeletons:
        need = {key for _, key, _, _ in Formatter().parse(skeleton) if key and key.isupper()}
        if need <= have:
            fitting += [skeleton] * (2 if need else 1)
    return fitting or list(empty)


def _filled(skeleton: str, facts: Facts, one_quote: bool, rng: random.Random) -> str:
    design = facts.design
    keys = [key for _, key, _, _ in Formatter().parse(skeleton) if key]
    parts: dict[str, str] = {}
    if "CONCEPT" in keys:
        parts["CONCEPT"] = concept_phrase(facts.name, design.count, rng)
        parts["CONCEPT"] += _at(facts, rng) if not design.lines else ""
        facts.concept = False
    parts["SIDE"] = rng.choice(BESIDE[design.side])
    if "LETTERS" in keys:
        parts["LETTERS"] = letters_phrase(facts, rng)
    if "GROUND" in keys:
        parts["GROUND"] = ground_phrase(facts, rng)
    parts["scene"] = _scene(facts, rng) if "scene" in keys else ""
    parts["noun"] = article(rng.choice(SCENES[design.scene]))
    parts["letters"] = _in_letters(facts, rng) if "letters" in keys else ""
    parts["at"] = _at(facts, rng) if "at" in keys else ""
    verb = TITLED.get(design.scene) if rng.random() < 0.15 else None
    parts["verb"] = verb or rng.choice(VERBS)
    parts["verbs"] = rng.choice(PLURAL_VERBS[: 3 if parts.get("LETTERS", "").endswith("letters") else 2])
    parts["texts"], parts["make"] = rng.choice(TEXTS[: 4 if len(design.lines) > 1 else 3]), rng.choice(MAKES)
    parts["view"], parts["written"] = rng.choice(VIEWS), rng.choice(WRITTEN)
    parts["quote"] = quote_en(design.lines, one_quote, rng) if design.lines else ""
    rest = _rest(facts, rng)
    parts["facts"], parts["tail"] = _listed(rest, " with "), _tail(rest, rng, bool(design.lines))
    parts["EMPTY"] = article(f"{rng.choice(EMPTY)} {rng.choice(SCENES[design.scene])}")
    return skeleton.format(**parts)


def _scene(facts: Facts, rng: random.Random) -> str:
    """`a striped red sign`, `sign on a red background`, `the sign`, ... States ground and texture."""
    design = facts.design
    noun = rng.choice(SCENES[design.scene])
    if not (facts.ground or facts.texture):
        return rng.choice((article(noun), article(noun), "the " + noun, noun))
    draw = rng.random()
    if draw < 0.14:
        return article(noun)  # the ground comes later
    if draw < 0.28 and facts.ground:
        return f"{article(noun)} on {ground_phrase(facts, rng)}"
    words = _ground_words(facts, rng)
    facts.ground = facts.texture = False
    whole = " ".join([*words, noun])
    return whole if draw > 0.9 else "the " + whole if draw > 0.86 else article(whole)


def _ground_words(facts: Facts, rng: random.Random) -> list[str]:
    design, words = facts.design, []
    if facts.ground:
        colour = grey(design.ground, rng)
        words.append(f"{colour} to {grey(design.ground2, rng)} gradient" if design.ground2 else colour)
    if facts.texture:
        words.insert(rng.choice((0, len(words))), rng.choice(TEXTURES[design.texture][0]))
    return words


def ground_phrase(facts: Facts, rng: random.Random) -> str:
    """`a red background`, `a gradient from red to blue`, `a red background with stripes`; states the ground."""
    design = facts.design
    if design.ground2 and facts.ground and not facts.texture and rng.random() < 0.5:
        text = rng.choice(BACKGROUNDS[2:]).format(top=grey(design.ground, rng), low=grey(design.ground2, rng))
    elif facts.texture and design.texture != "plain" and rng.random() < 0.4:
        facts.texture = False
        colours = " ".join(_ground_words(facts, rng))
        pattern = rng.choice(TEXTURES[design.texture][1])
        text = TEXTURED.format(a=article((colours + " background").strip())[: -len(" background")], pattern=pattern)
    else:
        text = BACKGROUNDS[0].format(a=article(" ".join(_ground_words(facts, rng))))
    facts.ground = facts.texture = False
    return text


def _letter_words(facts: Facts, rng: random.Random) -> list[str]:
    words = [grey(facts.design.letters, rng)] if facts.letters else []
    if facts.face:
        words.insert(rng.choice((0, len(words))), rng.choice(FACES[facts.design.face]))
    return words


def letters_phrase(facts: Facts, rng: random.Random) -> str:
    """`white serif letters`; states colour and face."""
    words = _letter_words(facts, rng)
    facts.letters = facts.face = False
    return " ".join([*words, rng.choice(LETTERS)])


def _in_letters(facts: Facts, rng: random.Random) -> str:
    words = _letter_words(facts, rng)
    if not words:
        return ""
    form = rng.choice(IN_FACE if facts.face else IN_COLOUR)
    facts.letters = facts.face = False
    text = " ".join(words)
    return " " + form.format(text, a=article(text), letters=rng.choice(LETTERS))


def _at(facts: Facts, rng: random.Random) -> str:
    """` at the top`, ` left-aligned at the top`, ` in the top left`, or nothing."""
    design = facts.design
    both = facts.align and facts.place
    corner = both and design.align != "center" and design.place != "middle" and rng.random() < 0.4
    parts = [rng.choice(ALIGNS[design.align])] if facts.align else []
    if facts.place:
        parts.insert(rng.choice((0, len(parts))), rng.choice(PLACES[design.place]))
    facts.align = facts.place = False
    if corner:
        return " " + rng.choice(CORNERS).format(place=design.place, align=design.align)
    return " " + " ".join(parts) if parts else ""


def _rest(facts: Facts, rng: random.Random) -> list[str]:
    """Noun phrases for everything not yet stated, in random order."""
    design, rest = facts.design, []
    if facts.ground:
        rest.append(ground_phrase(facts, rng))
    elif facts.texture:
        rest.append(rng.choice(TEXTURES[design.texture][1]))
    at = _at(facts, rng)
    letters = facts.letters or facts.face
    if letters or at:
        rest.append((letters_phrase(facts, rng) if letters else "the text") + at)
    if facts.border:
        rest.append(rng.choice(BORDERS[0 if design.border else 1]))
    if facts.concept:
        says_side = design.lines and (design.side != "above" or rng.random() < 0.5)
        side = " " + rng.choice(SIDES[design.side]) if says_side else ""
        rest.append(concept_phrase(facts.name, design.count, rng) + side)
    rng.shuffle(rest)
    return rest


def _listed(rest: list[str], opening: str) -> str:
    if not rest:
        return ""
    return opening + (", ".join(rest[:-1]) + " and " if len(rest) > 1 else "") + rest[-1]


def _tail(rest: list[str], rng: random.Random, words: bool) -> str:
    """The same behind a comma; behind a pictogram `with` alone would belong to it."""
    if rest and rng.random() < 0.6:
        return ", " + ", ".join(rest)
    return _listed(rest, rng.choice((", with ", " with ")) if words else ", with ")


def quote_en(lines: tuple[str, ...], one_quote: bool, rng: random.Random) -> str:
    """The lines in quotation marks, from the top down."""
    opening, closing = pick_marks(lines, rng, "en")
    count = len(lines)
    if one_quote or count == 1:
        text = opening + " ".join(lines) + closing
        return text + rng.choice(IN_LINES).format(NUMBERS[count]) if count > 1 and rng.random() < 0.12 else text
    quotes = [opening + line + closing for line in lines]
    draw = rng.random()
    if count == 2 and draw < 0.08:
        return quotes[0] + NTH.format(quotes[1])
    if count > 2 and draw < 0.6:
        text = ", ".join(quotes[:-1]) + " and " + quotes[-1]
    else:
        text = rng.choice(JOINTS).join(quotes)
    return text + rng.choice(IN_LINES).format(NUMBERS[count]) if draw > 0.85 else text


def grey(colour: str | None, rng: random.Random) -> str:
    return GREY if colour == "gray" and rng.random() < 0.3 else colour or ""
