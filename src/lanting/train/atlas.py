"""Every glyph and pictogram, drawn once and kept as strips of 8 px, so that drawing a batch is a few scatters.

Glyphs are covers of their cells (see `design`), pictograms are colours with their cover. Drawing all faces from the
fonts takes seconds; the finished atlas is kept in our cache folder and read from there in a fraction of one.
"""

from __future__ import annotations

import hashlib
import string
import zlib
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, cached_property
from importlib.resources import files
from io import BytesIO
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import PIL
import torch
from PIL import Image, ImageDraw, ImageFont, features
from torch import Tensor

from lanting.core.files import replacing
from lanting.train.assets import SIDE
from lanting.train.design import FACES, HANZI_MARKS, PICTOGRAM, PROPORTIONAL, UNIT, advance, is_hanzi
from lanting.train.strips import Strips, narrow_strips, stamps_of, strips_of
from lanting.weights.home import home

LATIN = string.ascii_letters + string.digits + "!?&-'.,%$:\"()/+#@*=;"
LATIN_FONTS = {
    "mono": "DejaVuSansMono-Bold.ttf",
    "typewriter": "CourierPrime-Bold.otf",
    "sans": "Sans-Bold.ttf",
    "serif": "Serif-Bold.ttf",
    "handwritten": "Hand-Bold.ttf",
}
HANZI_FONTS = {"serif": "Songti-Bold.otf", "handwritten": "Kaiti-Bold.ttf"}  # every other face: Heiti
HANZI_POINTS, HANZI_BASELINE = 30, 27
SMALL = (16, 32)  # pixels: a mono cell; a proportional one has the same height
WIDEST = 24  # pixels: three units


@cache
def alphabet() -> str:
    """All characters that can be drawn, Latin first; a character's label is its index here + 1."""
    from lanting.train.assets import hanzi

    return LATIN + HANZI_MARKS + hanzi()


@cache
def character_label(character: str) -> int:
    """1 + index in `alphabet`, 0 for anything else."""
    return alphabet().find(character) + 1


@cache
def _font(name: str, points: int) -> ImageFont.FreeTypeFont:
    from lanting.train.assets import font

    return ImageFont.truetype(BytesIO(font(name)), points)


@cache
def _points(face: str, scale: int) -> tuple[int, int]:
    """(font size, baseline from the cell's top): the largest whose widest letters fit, capitals centred."""
    width = (WIDEST if face in PROPORTIONAL else SMALL[0]) * scale
    height = SMALL[1] * scale
    for points in range(height, 4, -1):
        font = _font(LATIN_FONTS[face], points)
        bottom, ink_top = (font.getbbox(LATIN, anchor="ls")[i] for i in (3, 1))
        baseline = round((height - font.getbbox("H", anchor="ls")[1]) / 2)
        widest = max(font.getlength(c) for c in "mMHw") if face in PROPORTIONAL else font.getlength("m")
        if widest <= width and baseline + bottom <= height and baseline + ink_top >= 0:
            return points, baseline
    raise ValueError(f"the face {face} has no size for a cell of {width} px")


@cache
def natural_advance(face: str, character: str) -> float:
    """Advance in pixels at the small size of a face."""
    return _font(LATIN_FONTS[face], _points(face, 1)[0]).getlength(character)


def latin_cell(face: str, character: str, scale: int) -> np.ndarray:
    """Coverage of a Latin character in its cell: (32 scale, 8 advance scale) uint8; too wide ones are narrowed."""
    points, baseline = _points(face, scale)
    font = _font(LATIN_FONTS[face], points)
    width, height = advance(face, character) * UNIT * scale, SMALL[1] * scale
    left, _, right, _ = font.getbbox(character, anchor="ms")
    ink = int(max(right, -left)) * 2
    mask = Image.new("L", (max(width, ink + 2), height))
    ImageDraw.Draw(mask).text((mask.width / 2, baseline), character, fill=255, font=font, anchor="ms")
    if right - left <= width < mask.width:
        centre = (left + right) / 2 + mask.width / 2
        start = round(centre - width / 2)
        mask = mask.crop((start, 0, start + width, height))
    elif mask.width > width:
        mask = mask.resize((width, height), Image.Resampling.LANCZOS)
    return np.asarray(mask)


def hanzi_cell(face: str, character: str) -> np.ndarray:
    """Coverage of a Chinese character in its cell: (32, 32) uint8."""
    font = _font(HANZI_FONTS.get(face, "Heiti-Bold.otf"), HANZI_POINTS)
    mask = Image.new("L", (32, 32))
    ImageDraw.Draw(mask).text((1, HANZI_BASELINE), character, fill=255, font=font, anchor="ls")
    return np.asarray(mask)


@dataclass(frozen=True)
class Atlas:
    """The drawings of all glyphs and pictograms, and which of them each face has for a character."""

    glyphs: Strips
    stamps: Strips  # the pictograms, in the order of their concepts
    names: tuple[str, ...]  # of the glyphs: face, scale and character
    pictograms: Tensor  # (m, 64, 64, 4) uint8, the pictograms as 8 x 8 blocks, row by row

    @classmethod
    def build(cls) -> Atlas:
        """Draw everything from the fonts and the pictogram sheet."""
        from lanting.train.assets import pictograms

        cells = {f"{f} {k} {c}": latin_cell(f, c, k) for f in FACES for c in LATIN for k in (1, 2)}
        for face in ("mono", *HANZI_FONTS):
            cells.update({f"{face} 1 {c}": hanzi_cell(face, c) for c in alphabet()[len(LATIN) :]})
        return cls.of(strips_of(list(cells.values())), tuple(cells), torch.from_numpy(pictograms().copy()))

    @classmethod
    def of(cls, glyphs: Strips, names: tuple[str, ...], sheet: Tensor) -> Atlas:
        """An atlas from the strips of its glyphs and its pictograms as pictures (m, 64, 64, 4) uint8."""
        split = sheet.unflatten(2, (-1, UNIT)).unflatten(1, (-1, UNIT))  # (m, 8, 8, 8, 8, 4)
        blocks = split.transpose(2, 3).reshape(len(sheet), PICTOGRAM**2, UNIT**2, 4)
        return cls(glyphs, stamps_of(sheet.numpy()), names, blocks)

    @property
    def device(self) -> torch.device:
        return self.glyphs.cover.device

    @cached_property
    def faces(self) -> dict[tuple[str, bool], dict[str, int]]:
        """For each face, small and large: the drawing of each character."""
        found: dict[tuple[str, bool], dict[str, int]] = {(face, large): {} for face in FACES for large in (False, True)}
        for number, name in enumerate(self.names):
            face, scale, character = name.split(" ", 2)
            found[face, scale == "2"][character] = number
        shared = {c: number for c, number in found["mono", False].items() if is_hanzi(c)}
        for face in FACES:
            found[face, False] = shared | found[face, False]
        return found

    def to(self, device: torch.device | str) -> Atlas:
        return Atlas(self.glyphs.to(device), self.stamps.to(device), self.names, self.pictograms.to(device))

    def save(self, path: Path, key: str = "") -> None:
        """One compressed file (about 8 MB) that `load` reads without fonts; `key` says what it was made from."""
        split = self.pictograms.view(-1, PICTOGRAM, PICTOGRAM, UNIT, UNIT, 4).transpose(2, 3)
        with replacing(path) as part, part.open("wb") as file:
            np.savez_compressed(
                file,
                key=np.asarray(key),
                names=np.frombuffer("\n".join(self.names).encode(), dtype=np.uint8),
                cover=self.glyphs.cover[:, ::3].cpu().numpy(),
                places=torch.stack((self.glyphs.row, self.glyphs.column)).cpu().numpy().astype(np.uint8),
                count=self.glyphs.counts,
                pictograms=split.reshape(-1, SIDE, SIDE, 4).cpu().numpy(),
            )

    @classmethod
    def load(cls, path: Path, key: str = "") -> Atlas | None:
        """What `save` wrote; None where it was made from something else than `key` says."""
        with np.load(path, allow_pickle=False) as kept:
            if str(kept["key"]) != key:
                return None
            glyphs = narrow_strips(kept["cover"], kept["places"], kept["count"])
            names = tuple(kept["names"].tobytes().decode().split("\n"))
            return cls.of(glyphs, names, torch.from_numpy(kept["pictograms"]))


def source_key() -> str:
    """A hash of all an atlas is made from: fonts, assets, the code that draws and the library below it."""
    total = hashlib.sha256(f"{PIL.__version__} {features.version('freetype2')}".encode())
    here = files("lanting.train")
    folders = (entry for name in ("assets", "fonts") for entry in here.joinpath(name).iterdir() if entry.is_file())
    for entry in sorted(folders, key=lambda found: found.name):
        total.update(entry.read_bytes())
    for name in ("atlas.py", "design.py", "strips.py"):
        total.update(here.joinpath(name).read_bytes())
    return total.hexdigest()


@cache
def default_atlas() -> Atlas:
    """The atlas of the packaged fonts: from our cache folder, or drawn and left there for the next process."""
    path, key = home() / "atlas.npz", source_key()
    try:
        atlas = Atlas.load(path, key)
    except (OSError, ValueError, KeyError, EOFError, BadZipFile, zlib.error):  # not there, or not whole
        atlas = None
    if atlas is None:
        atlas = Atlas.build()
        with suppress(OSError):  # a folder that can't be written to only costs the time
            path.parent.mkdir(parents=True, exist_ok=True)
            atlas.save(path, key)
    return atlas
