"""Characters, phrases, pictograms and fonts that nano's designs are made of; where each comes from: LICENSES.md.

Everything is read from the package on first use and kept. ``tools/make_assets.py`` of the repository makes the files.
"""

from __future__ import annotations

import gzip
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from io import BytesIO

import numpy as np
from PIL import Image

SIDE = 64  # px, a pictogram's width and height


@dataclass(frozen=True)
class Concept:
    """What a pictogram shows. ``category``: nature, food, object, activity, place, face or symbol."""

    name_en: str
    name_zh: str
    category: str


@cache
def hanzi() -> str:
    """3,500 simplified characters, most used first; every Chinese font draws them."""
    return _text("hanzi.txt").strip()


@cache
def phrases() -> tuple[str, ...]:
    """About 20,000 Chinese words and sayings of 1-8 characters of ``hanzi()``, most used first."""
    return tuple(gzip.decompress(_bytes("phrases-zh.txt.gz")).decode("utf-8").split())


@cache
def dictionary() -> tuple[tuple[str, str], ...]:
    """(english, chinese) pairs fit for signs: one word of 2-10 letters a-z, 1-4 characters of ``hanzi()``."""
    rows = (line.split("\t") for line in _text("dictionary.tsv").splitlines())
    return tuple((english, chinese) for english, chinese in rows)


@cache
def concepts() -> tuple[Concept, ...]:
    """What each pictogram shows, in their order; names do not repeat.

    Rows 0-255 are common things that look distinct, with one English word and 1-3 characters of ``hanzi()``.
    """
    rows = (line.split(" ", 1)[1].split("\t") for line in _text("concepts.tsv").splitlines())
    return tuple(Concept(*row) for row in rows)


@cache
def pictograms() -> np.ndarray:
    """(n, 64, 64, 4) uint8 RGBA, straight alpha, row i showing ``concepts()[i]``; read-only."""
    sheet = np.asarray(Image.open(BytesIO(_bytes("pictograms.webp"))).convert("RGBA"))
    rows, columns = sheet.shape[0] // SIDE, sheet.shape[1] // SIDE
    tiles = sheet.reshape(rows, SIDE, columns, SIDE, 4).swapaxes(1, 2).reshape(-1, SIDE, SIDE, 4)
    tiles = np.ascontiguousarray(tiles[: len(concepts())])  # (n, 64, 64, 4)
    tiles.setflags(write=False)
    return tiles


@cache
def font(name: str) -> bytes:
    """The font ``name`` of the folder fonts, with or without its ending; KeyError with the names there are."""
    folder = files("lanting.train") / "fonts"
    known = {entry.name[:-4]: entry for entry in folder.iterdir() if entry.name.endswith((".ttf", ".otf"))}
    stem = name.removesuffix(".ttf").removesuffix(".otf")
    if stem not in known:
        raise KeyError(f"no font {name!r}: choose one of {', '.join(sorted(known))}")
    return known[stem].read_bytes()


def _bytes(name: str) -> bytes:
    return (files(__name__) / name).read_bytes()


def _text(name: str) -> str:
    return _bytes(name).decode("utf-8")
