"""Edits at random: a picture or two, an instruction, and the picture that should come out.

Source and target are designs that differ in what the instruction names and in nothing else, so the target is known
exactly and "the rest is kept" can be measured. Layout is a rule of the text: where a changed text or a pictogram
moves other things, those belong to the change. Sources hide nothing (`as_seen`), and what neither they nor the
instruction say follows a rule: translations into English are capitals, a new texture is always laid alike.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

from lanting.core.errors import RequestError
from lanting.train.atlas import HANZI_FONTS
from lanting.train.design import (
    FACES,
    SCENES,
    SIDES,
    SQUARE,
    TEXTURES,
    UNIT,
    WIDE,
    Design,
    is_hanzi,
    place,
    readable_pairs,
)
from lanting.train.designs import DesignMaker, Mix, too_small

Box = tuple[int, int, int, int]  # x, y, width, height in pixels
ONE_PICTURE = (
    "rewrite",
    "ground",
    "letters",
    "add",
    "remove",
    "replace",
    "move",
    "face",
    "translate",
    "border",
    "texture",
    "scene",
)
TWO_PICTURES = ("ground_from", "concept_from", "text_from")
KINDS = ONE_PICTURE + TWO_PICTURES
# how often each is drawn: what v3 does in nine of ten cases (grounds, letters, scenes, removals) comes seldom, what
# needs glyphs or pictograms drawn again often. Rewrites most: they teach where text goes in a picture that is given
WEIGHTS = (9, 1, 1, 2.5, 1, 2.5, 2, 5, 3, 1.5, 1.5, 1, 0.5, 2, 3)
SIZES = (WIDE, SQUARE)
TRIES = 2000  # edits made up until one fits its canvas: of the rarest kind one in ten does
MARKS = 6  # ornaments that are multiples of it show no marks in the corners


@dataclass(frozen=True)
class Edit:
    """One edit. `changed` are the boxes that may differ between `sources[0]` and `target`; empty: anywhere."""

    kind: str
    sources: tuple[Design, ...]
    target: Design
    instruction: str
    language: str
    changed: tuple[Box, ...]


@cache
def _dictionary() -> tuple[tuple[str, str], ...]:
    from lanting.train.assets import dictionary

    return dictionary()


class EditMaker:
    """Draws edits of designs; everything random comes from `rng` or the maker's own generator."""

    def __init__(self, seed: int = 0, held_out: bool = False, mix: Mix | None = None):
        self._own = random.Random(seed)
        self.held_out = held_out
        self.designs = DesignMaker(seed, held_out, mix)

    def sample(
        self, rng: random.Random | None = None, size: tuple[int, int] = WIDE, kind: str | None = None, pictures: int = 0
    ) -> Edit:
        """A random edit; `pictures` (1 or 2) limits the kinds to those with that many references. Raises RequestError
        where none fits the canvas."""
        rng = rng or self._own
        for _ in range(TRIES):
            chosen = kind or self._kind(rng, pictures)
            source = as_seen(self._plainer(rng, self.designs.sample(rng, size).design))
            made = self._make(rng, chosen, source)
            if made is None:
                continue
            sources, target = made
            try:
                for design in (*sources, target):
                    place(design)
            except RequestError:
                continue
            return self._phrased(rng, chosen, sources, target)
        raise too_small(size)

    @staticmethod
    def _kind(rng: random.Random, pictures: int) -> str:
        kinds = KINDS if not pictures else ONE_PICTURE if pictures == 1 else TWO_PICTURES
        weights = [w for k, w in zip(KINDS, WEIGHTS, strict=True) if k in kinds]
        return rng.choices(kinds, weights)[0]

    @staticmethod
    def _plainer(rng: random.Random, design: Design) -> Design:
        """Sources carry at most two lines, so that an instruction can name what it means."""
        return replace(design, lines=design.lines[: rng.choice((1, 1, 2))])

    def _phrased(self, rng: random.Random, kind: str, sources: tuple[Design, ...], target: Design) -> Edit:
        from lanting.train.wording import instruct

        chinese = any(ord(c) > 0x2000 for design in (*sources, target) for line in design.lines for c in line)
        language = "zh" if rng.random() < (0.75 if chinese else 0.2) else "en"
        other = sources[-1] if kind in TWO_PICTURES else target
        instruction = instruct(kind, (sources[0], other), rng, language, len(sources), self.held_out)
        return Edit(kind, sources, target, instruction, language, changed_boxes(sources[0], target))

    def _make(self, rng: random.Random, kind: str, source: Design) -> tuple[tuple[Design, ...], Design] | None:
        """(sources, target), or None where this kind makes no sense for this source."""
        if kind in TWO_PICTURES:
            return self._from_second(rng, kind, source)
        makers: dict[str, Callable[[random.Random, Design], Design | None]] = {
            "rewrite": self._rewrite,
            "ground": _ground,
            "letters": _letters,
            "add": self._add,
            "remove": _remove,
            "replace": self._replace,
            "move": _move,
            "face": _face,
            "border": _border,
            "texture": _texture,
            "scene": _scene,
        }
        if kind == "translate":
            return self._translate(rng, source)
        target = makers[kind](rng, source)
        return None if target is None or target == source else ((source,), target)

    def _rewrite(self, rng: random.Random, source: Design) -> Design | None:
        if not source.lines:
            return None
        number = rng.randrange(len(source.lines))
        other = self.designs.sample(rng, source.size, kind="zh" if ord(source.lines[number][0]) > 0x2000 else "en")
        line = next(iter(other.design.lines), "")
        if not line or line in source.lines:
            return None
        return replace(source, lines=(*source.lines[:number], line, *source.lines[number + 1 :]))

    def _add(self, rng: random.Random, source: Design) -> Design | None:
        if source.concept is not None or not source.lines:
            return None
        return replace(source, concept=rng.randrange(self.designs.mix.concepts), count=1, side=rng.choice(SIDES))

    def _replace(self, rng: random.Random, source: Design) -> Design | None:
        if source.concept is None:
            return None
        return replace(source, concept=rng.randrange(self.designs.mix.concepts))

    def _translate(self, rng: random.Random, source: Design) -> tuple[tuple[Design, ...], Design] | None:
        english, chinese = rng.choice(_dictionary())
        pair = [rng.choice((english.lower(), english.upper(), english.capitalize())), chinese]
        if rng.random() < 0.5:
            pair = [chinese, english.upper()]
        try:
            plain = as_seen(replace(source, lines=(pair[0],)))
        except RequestError:
            return None
        return (plain,), replace(plain, lines=(pair[1],))

    def _from_second(self, rng: random.Random, kind: str, source: Design) -> tuple[tuple[Design, ...], Design] | None:
        second = self._plainer(rng, self.designs.sample(rng, source.size).design)
        if kind == "ground_from":
            if not _readable(second.ground, source.letters) or second.ground == source.ground:
                return None
            return (source, second), replace(source, ground=second.ground, ground2=None, texture="plain")
        if kind == "concept_from":
            if source.concept is not None or second.concept is None or not source.lines:
                return None
            second = replace(second, count=1)
            return (source, second), replace(source, concept=second.concept, count=1, side="above")
        if not source.lines or not second.lines or source.lines == second.lines:
            return None
        return (source, second), replace(source, lines=second.lines)


def _readable(ground: str, letters: str) -> bool:
    return (ground, letters) in readable_pairs()


def _ground(rng: random.Random, source: Design) -> Design | None:
    fitting = [g for g, c in readable_pairs() if c == source.letters and g != source.ground]
    return replace(source, ground=rng.choice(fitting), ground2=None) if fitting else None


def _letters(rng: random.Random, source: Design) -> Design | None:
    fitting = [c for g, c in readable_pairs() if g == source.ground and c != source.letters]
    return replace(source, letters=rng.choice(fitting)) if fitting and source.lines else None


def _remove(rng: random.Random, source: Design) -> Design | None:
    return replace(source, concept=None, count=1) if source.concept is not None and source.lines else None


def _move(rng: random.Random, source: Design) -> Design | None:
    if source.concept is None or not source.lines or source.count > 1:
        return None
    return replace(source, side=rng.choice([s for s in SIDES if s != source.side]))


def _face(rng: random.Random, source: Design) -> Design | None:
    """Another face that looks another: Chinese has one for all but two of them."""
    chinese = _all_hanzi(source)
    own = _drawn_as(source.face, chinese)
    return (
        replace(source, face=rng.choice([f for f in FACES if _drawn_as(f, chinese) != own])) if source.lines else None
    )


def _drawn_as(face: str, chinese: bool) -> str:
    return face if not chinese or face in HANZI_FONTS else "mono"


def _border(rng: random.Random, source: Design) -> Design | None:
    return replace(source, border=not source.border) if place(source).ring and source.scene != "label" else None


def _texture(rng: random.Random, source: Design) -> Design | None:
    """The new texture is laid as the marks in the corners say, which can be seen."""
    texture = rng.choice([t for t in TEXTURES if t != source.texture])
    return replace(source, texture=texture, ornament=source.ornament % MARKS)


def _scene(rng: random.Random, source: Design) -> Design | None:
    return replace(source, scene=rng.choice([s for s in SCENES if s != source.scene]))


def as_seen(design: Design) -> Design:
    """The design without what its picture hides, which nobody could know of once an edit brings it to light.

    Hidden are borders and marks where text needs the outer ring, marks behind a border, the seed of a plain ground,
    faces that draw Chinese alike, and alignments and places that lay this text as the usual ones do. A texture without
    marks may be shifted. Raises `RequestError` for a design that does not fit.
    """
    here = place(design)
    marked = here.ring and not design.border and design.scene not in ("button", "label")
    seen = replace(
        design,
        border=design.border and here.ring,
        ornament=_plain_ornament(design, marked),
        face=_drawn_as(design.face, _all_hanzi(design)) if design.lines else "mono",
    )
    for usual in ({"align": "center"}, {"place": "middle"}):
        other = replace(seen, **usual)
        if place(other) == here:
            seen = other
    return seen


def _plain_ornament(design: Design, marked: bool) -> int:
    mark = design.ornament % MARKS if marked else 0
    return mark if design.texture == "plain" else design.ornament - design.ornament % MARKS + mark


def _all_hanzi(design: Design) -> bool:
    return all(map(is_hanzi, "".join(design.lines).replace(" ", "")))


def changed_boxes(source: Design, target: Design) -> tuple[Box, ...]:
    """Boxes (pixels) outside which the two pictures are the same; () where all of the picture may change."""
    everywhere = ("ground", "ground2", "texture", "scene", "ornament", "border")
    if any(getattr(source, name) != getattr(target, name) for name in everywhere):
        return ()
    before, after = place(source), place(target)
    if before.ring != after.ring:
        return ()
    same_ink = source.letters == target.letters and source.face == target.face
    found: set[Box] = set()
    lines = [
        [(box, line) for box, line in zip(p.boxes, d.lines, strict=True)]
        for p, d in ((before, source), (after, target))
    ]
    for box, _ in set(lines[0]) ^ set(lines[1]) if same_ink else set(lines[0]) | set(lines[1]):
        found.add(_pixels(box))
    pictograms = [{(x, y, d.concept) for x, y in p.pictograms} for p, d in ((before, source), (after, target))]
    found |= {_pixels((x, y, 8, 8)) for x, y, _ in pictograms[0] ^ pictograms[1]}
    if (
        not same_ink
        and source.letters != target.letters
        and (source.border or source.ornament % MARKS or source.scene != "sign" or source.texture != "plain")
    ):
        return ()
    return tuple(sorted(found))


def _pixels(box: Box) -> Box:
    x, y, width, height = (UNIT * value for value in box)
    return x, y, width, height


__all__ = ["KINDS", "ONE_PICTURE", "TWO_PICTURES", "Edit", "EditMaker", "as_seen", "changed_boxes"]
