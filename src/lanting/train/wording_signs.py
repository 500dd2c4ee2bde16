"""How people ask for a sign: one wish, many sentences, from a vocabulary small enough to be one token a word.

A sentence names what the wish states and leaves out the rest; the picture's rules fill it in (see `signs`).
Rejected: writing the wish as keywords. A model trained on those draws nothing for a plain English request.
"""

import random
import re
from dataclasses import dataclass

FACE_WORDS = {
    "sans": ("sans", "sans", "sans-serif", "plain"),
    "serif": ("serif", "serif", "typewriter"),
    "handwritten": ("handwritten", "handwritten", "casual"),
}
FRAME_WORDS = ("frame", "frame", "border", "outline")
SIGN_WORDS = ("sign", "sign", "sign", "board", "poster")
LETTER_WORDS = ("letters", "letters", "text", "lettering")
VIEWS = ("a picture", "an image", "a photo")
JOINTS = (" in ", " in ", " with ")
PLURAL_VERBS = ("saying", "reading", "that say")
BACKGROUNDS = ("on {} background", "with {} background")
VERBS = (
    "that says",
    "that says",
    "that reads",
    "saying",
    "reading",
    "with the text",
    "with the word",
    "with the words",
)

TEMPLATES = (
    "{sign} {verb} {quote}{in_letters}{frame}",
    "{sign} {verb} {quote}{in_letters}{frame}",
    "{sign} {verb} {quote}{comma_letters}{comma_frame}",
    "{sign}{frame} {verb} {quote}{in_letters}",
    "{sign}{in_letters}{frame} {verb} {quote}",
    "{sign}{with_letters}{and_frame} {verb} {quote}",
    "{sign}{with_letters} {quote}{and_frame}",
    "{sign}{comma_letters}{comma_frame}, {quote}",
    "{sign}{comma_frame}, {quote}{in_letters}",
    "{sign}: {quote}{comma_letters}{comma_frame}",
    "{sign} {quote}{in_letters}{frame}",
    "{quote}{in_letters} on {sign}{frame}",
    "the text {quote}{in_letters} on {sign}{frame}",
    "{letters} {verb_letters} {quote} on {sign}{frame}",
    "write {quote}{in_letters} on {sign}{frame}",
    "{view} of {sign} {verb} {quote}{in_letters}{frame}",
    "{view} of {sign}{with_letters}{and_frame} {verb} {quote}",
)


def wording_words() -> set[str]:
    """Every lower-case word a sentence can hold outside its quotes, colours left out."""
    faces = (word for group in FACE_WORDS.values() for word in group)
    groups = (
        FRAME_WORDS,
        SIGN_WORDS,
        LETTER_WORDS,
        VIEWS,
        JOINTS,
        PLURAL_VERBS,
        BACKGROUNDS,
        VERBS,
        TEMPLATES,
    )
    text = " ".join([*faces, *(part for group in groups for part in group), "a an the and bold thin no"])
    return set(re.findall(r"[a-z]+", re.sub(r"\{[a-z_]*\}", " ", text)))


@dataclass(frozen=True)
class Wish:
    """What a sentence states. None is left unsaid. `one_quote` joins two lines into one quoted text."""

    lines: tuple[str, ...]
    one_quote: bool
    ground: str | None
    letters: str | None
    face: str | None
    frame: bool


def phrase(wish: Wish, rng: random.Random) -> str:
    """One sentence for the wish; the same `rng` state gives the same sentence."""
    described = _letters(wish, rng)
    joint = rng.choice(JOINTS)
    border = _frame(wish, rng)
    text = rng.choice(TEMPLATES).format(
        sign=_sign(wish, rng),
        verb=rng.choice(VERBS),
        verb_letters=rng.choice(PLURAL_VERBS),
        view=rng.choice(VIEWS),
        quote=_quote(wish, rng),
        letters=described or rng.choice(LETTER_WORDS),
        in_letters=joint + described if described else "",
        with_letters=" with " + described if described else "",
        comma_letters=", " + described if described else "",
        frame=" with " + border if border else "",
        and_frame=(" and " if described else " with ") + border if border else "",
        comma_frame=rng.choice((", ", ", with ")) + border if border else "",
    )
    text = text[0].upper() + text[1:] if rng.random() < 0.4 and text[0] != '"' else text
    return text + "." if rng.random() < 0.1 else text


def _sign(wish: Wish, rng: random.Random) -> str:
    """`a blue sign`, `sign on a blue background`, `a sign`, ..."""
    noun = rng.choice(SIGN_WORDS)
    if wish.ground is None:
        return rng.choice(("a ", "a ", "the ", "")) + noun
    ground = "grey" if wish.ground == "gray" and rng.random() < 0.3 else wish.ground
    if rng.random() < 0.12:
        return f"a {noun} " + rng.choice(BACKGROUNDS).format(_article(ground))
    if rng.random() < 0.12:
        return f"{ground} {noun}"
    return (f"the {ground}" if rng.random() < 0.08 else _article(ground)) + f" {noun}"


def _letters(wish: Wish, rng: random.Random) -> str:
    """`bold serif white letters`, or nothing where neither colour nor face is stated."""
    parts = []
    if wish.letters:
        parts.append("grey" if wish.letters == "gray" and rng.random() < 0.3 else wish.letters)
    if wish.face:
        parts.append(rng.choice(FACE_WORDS[wish.face]))
    if not parts:
        return ""
    rng.shuffle(parts)
    if rng.random() < 0.1:
        parts.insert(0, "bold")
    return " ".join([*parts, rng.choice(LETTER_WORDS)])


def _frame(wish: Wish, rng: random.Random) -> str:
    if not wish.frame:
        return "no frame" if rng.random() < 0.05 else ""
    noun = rng.choice(FRAME_WORDS)
    return rng.choice((_article(noun), _article(noun), f"a thin {noun}"))


def _article(noun: str) -> str:
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def _quote(wish: Wish, rng: random.Random) -> str:
    if wish.one_quote:
        return '"' + " ".join(wish.lines) + '"'
    return rng.choice((" and ", " and ", ", ", " ")).join(f'"{line}"' for line in wish.lines)
