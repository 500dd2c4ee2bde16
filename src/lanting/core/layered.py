"""Files that hold all layers of a picture: which kinds there are, written by ending, read by what is in them.

`psd`, `openraster` and `slides` know a format each; the rest of the program asks here. What is read comes from
strangers, so all three bound it, and whatever a damaged file makes them raise becomes one sentence.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

from lanting.core.errors import LantingError
from lanting.core.pictures import broken
from lanting.core.stack import Stack, stack_of
from lanting.core.types import Recipe

if TYPE_CHECKING:
    from zipfile import ZipFile

    from PIL.Image import Image

T = TypeVar("T")
PSD, ORA, PPTX = ".psd", ".ora", ".pptx"
KINDS = {  # ending: media type
    PSD: "image/vnd.adobe.photoshop",
    ORA: "image/openraster",
    PPTX: "application/vnd.openxmlformats-officedocument.presentationml.presentation",
}


def require(ending: str) -> None:
    """Raises OutputError where what writes this kind is not installed."""
    if ending == PPTX:
        from lanting.core import slides

        slides.library()


def pack(ending: str, images: Sequence[Image], names: Sequence[str], recipe: Recipe | None = None) -> bytes:
    """One of KINDS as bytes, from pictures of one size, the lowest first. Raises OutputError as `require` does."""
    from lanting.core import openraster, psd, slides

    write = {PSD: psd.write, ORA: openraster.write, PPTX: slides.write}[ending]
    return write(stack_of(images, names, recipe))


def kind_in(data: bytes) -> str | None:
    """Which of KINDS the bytes are; None for everything else."""
    if data.startswith(b"8BPS"):
        return PSD
    if not data.startswith(b"PK\3\4"):
        return None
    try:
        names = set(_zip(data).namelist())
    except Exception:  # no whole ZIP, so none of ours
        return None
    return ORA if {"mimetype", "stack.xml"} <= names else PPTX if "ppt/presentation.xml" in names else None


def recipe_text(data: bytes, name: str) -> str | None:
    """The recipe in one of KINDS as JSON; None where there is none. Raises PictureError for a damaged file."""
    from lanting.core import openraster, psd, slides

    return _read(data, name, psd.recipe_text, openraster.recipe_text, slides.recipe_text)


def unpack(data: bytes, name: str) -> Stack:
    """The layers in one of KINDS. Raises PictureError for a damaged file, or one that was changed beyond pixels."""
    from lanting.core import openraster, psd, slides

    return _read(data, name, psd.read, openraster.read, slides.read)


def _read(
    data: bytes,
    name: str,
    psd: Callable[[bytes], T],
    ora: Callable[[ZipFile], T],
    pptx: Callable[[ZipFile], T],
) -> T:
    try:
        kind = kind_in(data)
        return psd(data) if kind == PSD else (ora if kind == ORA else pptx)(_zip(data))
    except LantingError:
        raise
    except Exception as error:
        raise broken(name, error) from None


def _zip(data: bytes) -> ZipFile:
    from zipfile import ZipFile

    return ZipFile(io.BytesIO(data))
