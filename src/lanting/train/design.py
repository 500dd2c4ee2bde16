"""Designs: signs, posters, labels, book covers, slides and buttons whose layout is a rule of the prompt.

Everything stands on a grid of units of 8 px, the stride of the autoencoder; lines and pictograms begin on whole
tokens (two units). A Chinese character fills 4 x 4 units. A Latin character is 4 units high and 2 wide (mono) or,
in a proportional face, 1 to 3 wide after its real advance; where every line then still leaves the outer ring of
tokens free, Latin lines are drawn twice as large. What a prompt leaves open (texture, ornaments, an unnamed ground)
is drawn by chance, and never moves a letter.
Rejected: advances in single pixels. At the same budget a tiny model draws none of them legibly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from math import ceil
from typing import NamedTuple

from lanting.core.errors import RequestError

UNIT, TOKEN = 8, 16  # pixels: one latent position, one transformer token
STRIP, WIDE, SQUARE, LARGE = (128, 64), (224, 96), (192, 192), (256, 256)  # width, height
SIZES = (STRIP, WIDE, SQUARE, LARGE)
MAX_LINES = 4
PICTOGRAM = 8  # units along a side of a pictogram
OVERHANG = 1.5  # pixels by which an advance may exceed its cell: its side bearings
TEXT, RING = 4, 2  # units: the height of a small line, the margin of one token

COLORS = {
    "red": (215, 35, 40),
    "blue": (30, 70, 200),
    "green": (25, 140, 60),
    "yellow": (250, 215, 40),
    "white": (250, 250, 250),
    "black": (15, 15, 15),
    "orange": (245, 130, 25),
    "purple": (120, 45, 160),
    "pink": (250, 150, 185),
    "gray": (128, 128, 128),
    "brown": (110, 65, 30),
    "cyan": (60, 200, 215),
}
MIN_LUMINANCE_GAP = 90  # of 255: below it thin strokes do not survive the autoencoder
FACES = ("mono", "typewriter", "sans", "serif", "handwritten")
PROPORTIONAL = frozenset(("sans", "serif", "handwritten"))
SCENES = ("sign", "poster", "label", "book", "slide", "button", "shop")
TEXTURES = ("plain", "dots", "stripes", "grid", "waves", "paper")
ALIGNS = ("center", "left", "right")
PLACES = ("middle", "top", "bottom")
SIDES = ("above", "below", "left", "right")
HANZI_MARKS = "，。！？、：；（）《》“”「」￥"


@dataclass(frozen=True)
class Design:
    """What one picture shows; `size` is (width, height) in pixels, `concept` a row of the pictograms."""

    size: tuple[int, int]
    lines: tuple[str, ...]
    ground: str
    letters: str
    ground2: str | None = None  # lower colour of a vertical gradient
    face: str = "mono"
    scene: str = "sign"
    align: str = "center"
    place: str = "middle"
    concept: int | None = None
    count: int = 1
    side: str = "above"  # of the text
    border: bool = False
    texture: str = "plain"
    ornament: int = 0  # seed of texture phase and corner ornaments; 0: no ornaments


@dataclass(frozen=True)
class Said:
    """What a sentence states of a design. The rest follows the rules above or is left to the seed."""

    ground: bool = True
    letters: bool = True
    face: bool = False
    align: bool = False
    place: bool = False
    border: bool = False
    texture: bool = False
    one_quote: bool = False


class Glyph(NamedTuple):
    """One character and its cell in units; `line` and `index` say where it stands in the text."""

    character: str
    line: int
    index: int
    x: int
    y: int
    width: int
    height: int


class Content(NamedTuple):
    """All of a design that its layout depends on; `concept` is 0 for any pictogram."""

    size: tuple[int, int]
    lines: tuple[str, ...]
    face: str
    align: str
    place: str
    concept: int | None
    count: int
    side: str


@dataclass(frozen=True)
class Placement:
    """Where everything stands, in units. `border` and `ring` are false where text needs the outer ring."""

    glyphs: tuple[Glyph, ...]
    boxes: tuple[tuple[int, int, int, int], ...]  # of the lines: x, y, width, height
    pictograms: tuple[tuple[int, int], ...]
    large: bool
    ring: bool


def luminance(color: str) -> float:
    """Rec. 601 luma of a named colour, 0..255."""
    red, green, blue = COLORS[color]
    return 0.299 * red + 0.587 * green + 0.114 * blue


@cache
def letters_for(ground: str, ground2: str | None = None) -> str:
    """The colour of letters nobody asked a colour for: white or black, whichever stands out more."""
    shade = luminance(ground) if ground2 is None else (luminance(ground) + luminance(ground2)) / 2
    return "white" if luminance("white") - shade >= shade - luminance("black") else "black"


@cache
def readable_pairs() -> tuple[tuple[str, str], ...]:
    """All (ground, letters) whose luminance gap is at least `MIN_LUMINANCE_GAP`."""
    return tuple((g, c) for g in COLORS for c in COLORS if abs(luminance(g) - luminance(c)) >= MIN_LUMINANCE_GAP)


def is_hanzi(character: str) -> bool:
    """Whether a character takes a full-width cell."""
    return ord(character) > 0x2000


def break_lines(text: str, most: int = 12) -> tuple[str, ...]:
    """The lines of one quoted text: two words are two lines, anything else is one line where it fits `most`.

    A longer text fills line after line with as many words as fit. Raises `RequestError` for an empty text, a word
    longer than a line, or more lines than a design has.
    """
    words = text.split()
    if len(words) == 2:
        lines = words
    else:
        lines = [""] * bool(words)
        for word in words:
            joined = f"{lines[-1]} {word}".strip()
            lines[-1:] = [joined] if len(joined) <= most else [lines[-1], word]
    if not words or max(map(len, lines)) > most or len(lines) > MAX_LINES or not lines[0]:
        raise RequestError(
            "a design has 1 to {lines} lines of at most {most} characters: shorten {text}",
            **{"lines": MAX_LINES, "most": most, "text": repr(text)},
        )
    return tuple(lines)


@cache
def advance(face: str, character: str) -> int:
    """Width of a small character in units: 4 for Chinese, 2 in a mono face, else 1 to 3 after the real advance."""
    if is_hanzi(character):
        return 4
    if face not in PROPORTIONAL or character == " ":
        return 2
    from lanting.train.atlas import natural_advance

    return min(3, max(1, ceil((natural_advance(face, character) - OVERHANG) / UNIT)))


def line_width(face: str, line: str) -> int:
    """Width of a small line in units."""
    return sum([advance(face, c) for c in line])


def place(design: Design) -> Placement:
    """The layout rule. Raises `RequestError` where the design does not fit its canvas."""
    d, concept = design, None if design.concept is None else 0
    return _placed(Content((d.size[0], d.size[1]), tuple(d.lines), d.face, d.align, d.place, concept, d.count, d.side))


@lru_cache(maxsize=4096)  # a design is placed when it is chosen, drawn and labelled
def _placed(design: Content) -> Placement:
    wide, high = design.size[0] // UNIT, design.size[1] // UNIT
    widths = [line_width(design.face, line) for line in design.lines]
    left, zone, beside = _zone(design, wide)
    stacked = PICTOGRAM if design.concept is not None and not beside and widths else 0
    room = high - stacked
    large = _fits_large(design, widths, zone, room)
    scale = 2 if large else 1
    tall = TEXT * scale
    block = tall * len(widths) + stacked
    if block > high or max(widths, default=0) * scale > zone or len(widths) > MAX_LINES or not all(design.lines):
        raise RequestError(
            "these lines don't fit {width}x{height}: {lines}",
            **{"width": design.size[0], "height": design.size[1], "lines": list(design.lines)},
        )
    top = _top(design.place, high, block)
    first = top + (stacked if design.side == "above" else 0)
    boxes = tuple(
        (left + _start(design.align, zone, width * scale), first + tall * i, width * scale, tall)
        for i, width in enumerate(widths)
    )
    pictograms = _pictograms(design, wide, high, top, first + tall * len(widths))
    glyphs = tuple(_glyphs(design, boxes, scale))
    taken = [*boxes, *((x, y, PICTOGRAM, PICTOGRAM) for x, y in pictograms)]
    ring = all(x >= RING and y >= RING and x + w <= wide - RING and y + h <= high - RING for x, y, w, h in taken)
    return Placement(glyphs, boxes, pictograms, large, ring)


def _zone(design: Content, wide: int) -> tuple[int, int, bool]:
    """(left end, width, pictogram beside?) of the columns that text may use."""
    beside = design.concept is not None and design.side in ("left", "right") and bool(design.lines)
    if not beside:
        return 0, wide, False
    taken = RING + PICTOGRAM
    return (taken if design.side == "left" else 0), wide - taken, True


def _fits_large(design: Content, widths: Sequence[int], zone: int, room: int) -> bool:
    """Latin lines are doubled where they then still leave a margin."""
    if not widths or is_hanzi(max("".join(design.lines), default=" ")):
        return False
    margin = 2 * RING if design.concept is None else RING
    return 2 * max(widths) <= zone - margin and 2 * TEXT * len(widths) <= room - margin


def _top(place_word: str, high: int, block: int) -> int:
    slack = high - block
    if place_word == "middle":
        return slack // 4 * 2
    margin = min(RING, slack // 2 * 2)
    return margin if place_word == "top" else slack - margin


def _start(align: str, zone: int, width: int) -> int:
    """Left end of a line in its zone, always on a whole token."""
    slack = zone - width
    if align == "center":
        return slack // 4 * 2
    margin = min(RING, slack // 2 * 2)
    return margin if align == "left" else max(0, (slack - margin) // 2 * 2)


def _pictograms(design: Content, wide: int, high: int, top: int, bottom: int) -> tuple[tuple[int, int], ...]:
    """Left upper corners of the pictograms; raises `RequestError` where they do not fit."""
    if design.concept is None:
        return ()
    if not design.lines:
        x, y = (wide - PICTOGRAM * design.count) // 4 * 2, _top(design.place, high, PICTOGRAM)
    elif design.side in ("left", "right"):
        x = RING if design.side == "left" else wide - RING - PICTOGRAM
        y = _top(design.place, high, PICTOGRAM)
    else:
        x = (wide - PICTOGRAM * design.count) // 4 * 2
        y = top if design.side == "above" else bottom
    beside = design.side in ("left", "right") and bool(design.lines)
    if x < 0 or (beside and design.count > 1) or not 1 <= design.count <= 3:
        raise RequestError(
            "{count} pictograms don't fit: ask for fewer, or for them above the text", count=design.count
        )
    return tuple((x + PICTOGRAM * i, y) for i in range(design.count))


def _glyphs(design: Content, boxes: Sequence[tuple[int, int, int, int]], scale: int) -> list[Glyph]:
    found = []
    face = design.face
    for number, (line, (x, y, _, height)) in enumerate(zip(design.lines, boxes, strict=True)):
        for index, character in enumerate(line):
            width = advance(face, character) * scale
            found.append(Glyph(character, number, index, x, y, width, height))
            x += width
    return found
