"""Signs: pictures whose whole layout is a rule of their text, so that a tiny model can learn to spell.

A canvas is a grid of 16 px tokens. A character stands in a cell on this grid, twice as high as wide; the
lines are one block in the middle. Cells are 32 px wide where every line then leaves the outer ring of tokens
free, else 16 px. A frame lies in that ring; a square sign with a line of 11 or 12 characters has no ring left
and is drawn without its frame. What a prompt leaves out is a rule too: letters are white or black, whichever
stands out more, the face is sans, there is no frame. Only the ground is left to the seed.
Rejected: proportional faces placed freely. At the same budget a tiny model draws none of them legibly.
"""

import random
import string
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from io import BytesIO

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from lanting.core.errors import RequestError
from lanting.train.design import luminance
from lanting.train.sign_texts import PUNCTUATION, TextMaker
from lanting.train.wording import Wish, phrase

TOKEN = 16  # pixels along a side of one transformer token: VAE stride 8, patch 2
MAX_CHARS = 12
WIDE = (224, 96)  # width, height
SQUARE = (192, 192)
SIZES = (WIDE, SQUARE)

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
}
MIN_LUMINANCE_GAP = 90  # of 255: below it thin strokes do not survive the VAE
FACES = {
    "sans": "DejaVuSansMono-Bold.ttf",
    "serif": "CourierPrime-Bold.otf",
    "handwritten": "FantasqueSansMono-Bold.ttf",
}
ALPHABET = string.ascii_letters + string.digits + PUNCTUATION  # label of a character: its index here + 1
FRAME_INSET, FRAME_WIDTH = 4, 3


@dataclass(frozen=True)
class Sign:
    """One sign and the sentence that asks for it; `size` is (width, height) in pixels."""

    prompt: str
    lines: tuple[str, ...]
    ground: str
    letters: str
    face: str
    frame: bool
    size: tuple[int, int]


@dataclass(frozen=True)
class Layout:
    """`cell` is 1 or 2 tokens wide; `origins[i]` is the (column, row) of the token where line i starts."""

    cell: int
    origins: tuple[tuple[int, int], ...]
    frame: bool


def letters_for(ground: str) -> str:
    """The colour of letters nobody asked a colour for: white or black, whichever stands out more."""
    return "white" if luminance("white") - luminance(ground) >= luminance(ground) - luminance("black") else "black"


def readable_pairs() -> list[tuple[str, str]]:
    """All (ground, letters) whose luminance gap is at least `MIN_LUMINANCE_GAP`."""
    return [(g, c) for g in COLORS for c in COLORS if abs(luminance(g) - luminance(c)) >= MIN_LUMINANCE_GAP]


def break_lines(text: str, max_chars: int = MAX_CHARS) -> tuple[str, ...]:
    """The lines of one quoted text: two words are two lines, anything else is one line where it fits.

    A text longer than one line fills the first line with as many words as fit and the second with the rest.
    Raises `RequestError` for an empty text, a word longer than a line or a text longer than two lines.
    """
    words = text.split()
    if len(words) == 2:
        lines = words
    else:
        lines = [" ".join(words)]
        if len(lines[0]) > max_chars:
            head = 1
            while head < len(words) and len(" ".join(words[: head + 1])) <= max_chars:
                head += 1
            lines = [" ".join(words[:head]), " ".join(words[head:])]
    if not words or max(map(len, lines)) > max_chars:
        raise RequestError(f"A sign has one or two lines of 1 to {max_chars} characters; shorten {text!r}.")
    return tuple(lines)


def layout(lines: Sequence[str], size: tuple[int, int], frame: bool) -> Layout:
    """The layout rule. Raises `RequestError` where the lines do not fit the canvas."""
    columns, rows = size[0] // TOKEN, size[1] // TOKEN
    longest, count = max(map(len, lines), default=0), len(lines)
    if not 1 <= count <= 2 or not all(lines) or longest > min(columns, MAX_CHARS) or 2 * count > rows - 2:
        raise RequestError(f"A sign has one or two lines of 1 to {MAX_CHARS} characters; {list(lines)} do not fit.")
    fits_large = 2 * longest <= columns - 2 and 4 * count <= rows - 2
    cell = 2 if fits_large else 1
    frame = frame and longest <= columns - 2
    top = (rows - 2 * cell * count) // 2
    origins = tuple(((columns - cell * len(line)) // 2, top + 2 * cell * index) for index, line in enumerate(lines))
    return Layout(cell, origins, frame)


@cache
def _font(face: str, cell: int) -> tuple[ImageFont.FreeTypeFont, int]:
    """The largest size whose advance and ink fit the cell, and the baseline in it (pixels from its top)."""
    data = resources.files("lanting.train").joinpath("fonts", FACES[face]).read_bytes()
    width, height = cell * TOKEN, 2 * cell * TOKEN
    for points in range(width * 2, 4, -1):
        font = ImageFont.truetype(BytesIO(data), points)
        top, bottom = font.getbbox("H", anchor="ls")[1], font.getbbox(ALPHABET, anchor="ls")[3]
        baseline = round((height - top) / 2)  # capitals are centred: `top` is minus their height
        ink_top = font.getbbox(ALPHABET, anchor="ls")[1]
        if font.getlength("m") <= width and baseline + bottom <= height and baseline + ink_top >= 0:
            return font, baseline
    raise ValueError(f"the face {face} has no size for a cell of {width} px")


@cache
def _glyph(face: str, cell: int, character: str) -> np.ndarray:
    """Coverage of one character in its cell: (32 cell, 16 cell) uint8."""
    font, baseline = _font(face, cell)
    mask = Image.new("L", (cell * TOKEN, 2 * cell * TOKEN))
    ImageDraw.Draw(mask).text((cell * TOKEN / 2, baseline), character, fill=255, font=font, anchor="ms")
    return np.asarray(mask)


@cache
def _ramp(ground: str, letters: str) -> np.ndarray:
    """Colour of each coverage 0..255: (256, 3) uint8."""
    share = np.linspace(0.0, 1.0, 256)[:, None]
    return np.rint((1 - share) * COLORS[ground] + share * np.asarray(COLORS[letters])).astype(np.uint8)


def pixels(sign: Sign) -> np.ndarray:
    """The picture of a sign: (height, width, 3) uint8."""
    width, height = sign.size
    coverage = np.zeros((height, width), dtype=np.uint8)
    plan = layout(sign.lines, sign.size, sign.frame)
    if plan.frame:
        inner = FRAME_INSET + FRAME_WIDTH
        coverage[FRAME_INSET:-FRAME_INSET, FRAME_INSET:-FRAME_INSET] = 255
        coverage[inner:-inner, inner:-inner] = 0
    step = plan.cell * TOKEN
    for line, (column, row) in zip(sign.lines, plan.origins, strict=True):
        for index, character in enumerate(line):
            if character != " ":
                x, y = column * TOKEN + index * step, row * TOKEN
                coverage[y : y + 2 * step, x : x + step] = _glyph(sign.face, plan.cell, character)
    return _ramp(sign.ground, sign.letters)[coverage]


def render(sign: Sign) -> Image.Image:
    """The picture of a sign (RGB)."""
    return Image.fromarray(pixels(sign))


def labels(sign: Sign) -> np.ndarray:
    """The character on each token: (rows, columns) int64, 0 for none, else its index in `ALPHABET` + 1."""
    plan = layout(sign.lines, sign.size, sign.frame)
    grid = np.zeros((sign.size[1] // TOKEN, sign.size[0] // TOKEN), dtype=np.int64)
    for line, (column, row) in zip(sign.lines, plan.origins, strict=True):
        for index, character in enumerate(line):
            x = column + index * plan.cell
            grid[row : row + 2 * plan.cell, x : x + plan.cell] = ALPHABET.find(character) + 1
    return grid


class SignMaker:
    """Draws signs at random. `held_out` draws only words and strings that training never draws."""

    def __init__(self, seed: int = 0, held_out: bool = False, random_share: float = 0.3) -> None:
        self._own = random.Random(seed)
        self._texts = TextMaker(held_out, random_share)
        self._pairs = readable_pairs()

    def sample(self, rng: random.Random | None = None, size: tuple[int, int] | None = None) -> Sign:
        """A random sign; 60 % are wide where `size` is not given. `rng` replaces the maker's own."""
        rng = rng or self._own
        size = size or (WIDE if rng.random() < 0.6 else SQUARE)
        frame = rng.random() < 0.3
        lines = self._texts.lines(rng, self._lengths(rng, size))
        ground, letters = rng.choice(self._pairs)
        says_letters = rng.random() < 0.75
        if not says_letters:
            ground = rng.choice(list(COLORS))
            letters = letters_for(ground)
        face = rng.choice(list(FACES))
        wish = Wish(
            lines=lines,
            one_quote=len(lines) == 1 or (_as_one_quote(lines) and rng.random() < 0.6),
            ground=ground if rng.random() < 0.94 else None,
            letters=letters if says_letters else None,
            face=face if face != "sans" or rng.random() < 0.4 else None,
            frame=frame,
        )
        return Sign(phrase(wish, rng), lines, ground, letters, face, frame, size)

    def render(self, sign: Sign) -> Image.Image:
        """The picture of a sign (RGB)."""
        return render(sign)

    def pixels(self, sign: Sign) -> np.ndarray:
        """The picture of a sign: (height, width, 3) uint8."""
        return pixels(sign)

    def labels(self, sign: Sign) -> np.ndarray:
        """The character on each token: (rows, columns) int64."""
        return labels(sign)

    @staticmethod
    def _lengths(rng: random.Random, size: tuple[int, int]) -> list[int]:
        """The lengths of the lines: 40 % of the signs have 32 px cells, a single character is rare."""
        columns, rows = size[0] // TOKEN, size[1] // TOKEN
        large = (columns - 2) // 2
        two_large = rows - 2 >= 8
        if rng.random() < 0.4:
            count = 2 if two_large and rng.random() < 0.5 else 1
            return [1 if rng.random() < 0.04 else rng.randint(2, large) for _ in range(count)]
        if rng.random() < 0.4:
            return [rng.randint(large + 1, MAX_CHARS)]
        lengths = [rng.randint(2, MAX_CHARS), rng.randint(2, MAX_CHARS)]
        if two_large and max(lengths) <= large:
            lengths[rng.randrange(2)] = rng.randint(large + 1, MAX_CHARS)
        return lengths


def _as_one_quote(lines: Sequence[str]) -> bool:
    """Whether one quoted text with these words breaks into exactly these lines."""
    try:
        return break_lines(" ".join(lines)) == tuple(lines)
    except RequestError:
        return False
