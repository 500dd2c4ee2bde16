"""Instructions for edits: what to change, in English and Chinese, six phrasings or more for every kind."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from lanting.train import wording_edits_zh, wording_held_out
from lanting.train.assets import concepts
from lanting.train.wording_en import FACES, PLACES, SCENES, SIDES, TEXTURES, grey, quote_en
from lanting.train.wording_names import NUMBERS, article, concept_phrase, plural
from lanting.train.wording_quotes import pick_marks

if TYPE_CHECKING:
    from lanting.train.design import Design

EDITS = {
    "rewrite": (
        "change {old} to {new}",
        "replace {old} with {new}",
        "rewrite {old} as {new}",
        "write {new} instead of {old}",
        "change the text {old} to {new}",
        "it should say {new} instead of {old}",
        "put {new} in place of {old}",
        "turn {old} into {new}",
    ),
    "rewrite_all": (
        "change the text to {new}",
        "make it say {new}",
        "replace the text with {new}",
        "the text should be {new}",
        "it should say {new}",
        "rewrite the text as {new}",
        "change {old} to {new}",
    ),
    "ground": (
        "make the background {ground}",
        "change the background to {ground}",
        "change the background color to {ground}",
        "turn the background {into}",
        "the background should be {ground}",
        "give it {a_ground} background",
        "use {a_ground} background",
        "put it on {a_ground} background",
        "change {from_ground} to {ground}",
        "{a_ground} background instead",
    ),
    "letters": (
        "make the {letters} {colour}",
        "change the {letters} to {colour}",
        "change the color of the {letters} to {colour}",
        "turn the {letters} {colour}",
        "use {colour} {letters}",
        "the {letters} should be {colour}",
        "write it in {colour}",
        "recolor the {letters} in {colour}",
    ),
    "add": (
        "add {it}{side}",
        "put {it}{side}",
        "place {it}{side}",
        "draw {it}{side}",
        "insert {it}{side}",
        "show {it}{side}",
        "add a picture of {it}{side}",
    ),
    "add_line": (
        "add the text {new}",
        "add the line {new}",
        "also write {new}",
        "write {new} as well",
        "put the words {new} on it",
        "add another line, {new}",
    ),
    "more": (
        "make it {many}",
        "there should be {many}",
        "show {many} instead",
        "draw {many}",
        "change it to {many}",
        "i want {many}",
    ),
    "remove": (
        "remove {the}",
        "delete {the}",
        "take away {the}",
        "erase {the}",
        "take {the} out",
        "get rid of {the}",
        "{no} please",
        "leave out {the}",
    ),
    "remove_line": (
        "remove {gone}",
        "delete {gone}",
        "remove the text {gone}",
        "erase {gone}",
        "take away {gone}",
        "get rid of the words {gone}",
    ),
    "replace": (
        "replace {the} with {it}",
        "change {the} to {it}",
        "turn {the} into {it}",
        "swap {the} for {it}",
        "put {it} in place of {the}",
        "show {it} instead of {the}",
        "make {the} {it}",
    ),
    "move": (
        "move {the}{side}",
        "put {the}{side}",
        "place {the}{side}",
        "shift {the}{side}",
        "{the} should be{side}",
        "move {the} so that it is{side}",
    ),
    "move_text": (
        "move the text{at}",
        "put the text{at}",
        "place the words{at}",
        "shift the text{at}",
        "the text should be{at}",
        "write the text{at}",
    ),
    "face": (
        "change the font to {face}",
        "make the text {face}",
        "make the letters {face}",
        "use {a_face} font",
        "write it in {face} letters",
        "set the text in {face}",
        "the font should be {face}",
        "switch to {a_face} font",
    ),
    "translate": (
        "translate {old} into {tongue}",
        "translate the text into {tongue}",
        "translate it to {tongue}",
        "write {old} in {tongue}",
        "make the text {tongue}",
        "put {old} into {tongue}",
        "say {old} in {tongue} instead",
        "change the text to {tongue}",
    ),
    "border_on": (
        "add a border",
        "add a frame",
        "put a border around it",
        "give it a border",
        "draw a frame around it",
        "it should have a border",
        "frame it",
        "add a border around the {noun}",
    ),
    "border_off": (
        "remove the border",
        "remove the frame",
        "delete the border",
        "take away the frame",
        "no border please",
        "it should have no border",
        "erase the border",
        "get rid of the border",
    ),
    "texture": (
        "make the background {texture}",
        "give it {a_texture} background",
        "use {a_texture} background",
        "change the background to {pattern}",
        "add {pattern} to the background",
        "restyle the background with {pattern}",
        "the background should have {pattern}",
    ),
    "texture_off": (
        "make the background plain",
        "give it a plain background",
        "remove the pattern",
        "use a plain background",
        "the background should be plain",
        "remove the {texture} pattern from the background",
        "no pattern in the background",
    ),
    "scene": (
        "make it {a_noun}",
        "turn it into {a_noun}",
        "turn the {old_noun} into {a_noun}",
        "change it to {a_noun}",
        "make {a_noun} of it",
        "show it as {a_noun}",
        "change the {old_noun} to {a_noun}",
    ),
    "ground_from": (
        "use the background color of picture 2",
        "use the background of picture 2",
        "give picture 1 the background of picture 2",
        "make the background like the one in picture 2",
        "change the background to that of picture 2",
        "take the background color from picture 2",
        "the background should be as in picture 2",
        "put picture 1 on the background of picture 2",
    ),
    "concept_from": (
        "add the icon of picture 2",
        "add the {name} from picture 2",
        "put the {name} of picture 2 above the text",
        "add the icon from picture 2 to picture 1",
        "take the {name} from picture 2",
        "put the icon of picture 2 on picture 1",
        "add the symbol of picture 2 above the text",
        "place the {name} of picture 2 on picture 1",
    ),
    "text_from": (
        "write the text of picture 2 on picture 1",
        "use the text of picture 2",
        "replace the text with that of picture 2",
        "change the text to that of picture 2",
        "take the text from picture 2",
        "picture 1 should say what picture 2 says",
        "put the words of picture 2 on picture 1",
        "make it say the same as picture 2",
    ),
}
TONGUES = ("english", "chinese")
MARGINS = {"center": "in the middle", "left": "on the left", "right": "on the right"}
KEEP = (", keep the rest", " and keep the rest", ", change nothing else")
SPELLINGS = ("color", "colour", "recolor", "recolour")
LETTERS = ("letters", "letters", "text", "words")
IN_FIRST = " in picture 1"


def instruct(
    kind: str, pair: tuple[Design, Design], rng: random.Random, language: str, refs: int = 1, held_out: bool = False
) -> str:
    """The sentence that asks for the second design of `pair` where the first is given, in `language` ("en" or "zh").

    `kind` is one of `lanting.train.edits.KINDS`. For the kinds that end in `_from` the second design is the second
    picture. `refs` is the number of pictures given: with two, the ordinary kinds say which picture they mean.
    `held_out` uses only the phrasings that training never meets.
    """
    before, after = pair
    form = edit_form(kind, before, after)
    if language == "zh":
        forms = wording_held_out.HELD_OUT_ZH if held_out else wording_edits_zh.EDITS
        return wording_edits_zh.instruct_zh(form, forms[form], pair, rng, refs)
    forms = wording_held_out.HELD_OUT_EN if held_out else EDITS
    text = rng.choice(forms[form]).format(**_parts(form, before, after, rng))
    if rng.random() < 0.4:
        text = text.replace("color", rng.choice(SPELLINGS[:2]))
    if refs > 1 and not form.endswith("_from"):
        text += IN_FIRST
    if rng.random() < 0.06:
        text += rng.choice(KEEP)
    if text[0].islower() and rng.random() < 0.35:
        text = text[0].upper() + text[1:]
    return text + "." if rng.random() < 0.1 else text


def edit_form(kind: str, before: Design, after: Design) -> str:
    """The table to draw from: some kinds have two, after what really changes."""
    if kind == "rewrite":
        changed = changed_lines(before, after)
        return "rewrite" if changed is not None and len(before.lines) > 1 else "rewrite_all"
    if kind == "border":
        return "border_on" if after.border else "border_off"
    if kind == "texture" and after.texture == "plain":
        return "texture_off"
    if kind == "move" and before.concept is not None and before.side != after.side:
        return "move"
    if kind == "move":
        return "move_text"
    if kind in ("add", "remove") and len(before.lines) != len(after.lines):
        return kind + "_line"
    if kind == "add" and before.concept is not None:
        return "more"
    return kind


def changed_lines(before: Design, after: Design) -> tuple[str, str] | None:
    """The only line that differs, before and after; None if there are several or their number changes."""
    if len(before.lines) != len(after.lines):
        return None
    pairs = [pair for pair in zip(before.lines, after.lines, strict=True) if pair[0] != pair[1]]
    return pairs[0] if len(pairs) == 1 else None


def _quotes(form: str, before: Design, after: Design, rng: random.Random) -> dict[str, str]:
    one = changed_lines(before, after) if form == "rewrite" else None
    old, new = ((one[0],), (one[1],)) if one else (before.lines, after.lines)
    if form == "add_line":
        new = tuple(line for line in after.lines if line not in before.lines) or after.lines
    gone = tuple(line for line in before.lines if line not in after.lines) or before.lines
    parts = {"old": old, "new": new, "gone": gone}
    if all(len(lines) == 1 for lines in parts.values()):  # the same marks everywhere in a sentence
        opening, closing = pick_marks([*old, *new, *gone], rng, "en")
        return {key: opening + lines[0] + closing for key, lines in parts.items()}
    return {key: quote_en(lines, False, rng) if lines else "the text" for key, lines in parts.items()}


def _parts(form: str, before: Design, after: Design, rng: random.Random) -> dict[str, str]:
    ground, from_ground = grey(after.ground, rng), grey(before.ground, rng)
    if after.ground2:
        ground = f"{ground} to {grey(after.ground2, rng)} gradient"
    into = "into " + article(ground) if after.ground2 else ground
    the = icon = ""
    if before.concept is not None:
        name = concepts()[before.concept].name_en
        the = "the " + (plural(name) if before.count > 1 else name)
        icon = "no " + name
    drawn = concepts()[after.concept].name_en if after.concept is not None else "icon"
    side = rng.choice(SIDES[after.side])
    adjectives, patterns = TEXTURES[after.texture]
    face, noun = rng.choice(FACES[after.face]), rng.choice(SCENES[after.scene])
    chinese = any(ord(c) > 0x2000 for line in after.lines for c in line)
    return {
        **_quotes(form, before, after, rng),
        "ground": article(ground) if after.ground2 else ground,
        "into": into,
        "a_ground": article(ground),
        "from_ground": f"the {from_ground} background" if before.ground2 is None else "the background",
        "letters": rng.choice(LETTERS),
        "colour": grey(after.letters, rng),
        "it": concept_phrase(drawn, after.count, rng),
        "many": f"{NUMBERS[after.count]} {plural(drawn) if after.count > 1 else drawn}",
        "the": the,
        "no": icon,
        "side": " " + side,
        "at": " " + (rng.choice(PLACES[after.place]) if before.place != after.place else MARGINS[after.align]),
        "face": face,
        "a_face": article(face),
        "tongue": TONGUES[chinese].capitalize() if rng.random() < 0.7 else TONGUES[chinese],
        "texture": rng.choice(adjectives if form == "texture" else TEXTURES[before.texture][0]),
        "a_texture": article(rng.choice(adjectives)),
        "pattern": rng.choice(patterns),
        "noun": rng.choice(SCENES[before.scene]),
        "old_noun": rng.choice(SCENES[before.scene]),
        "a_noun": article(noun),
        "name": drawn,
    }
