"""Pictures as clients send and want them: base64, data URLs, uploads, addresses; PNG, JPEG, WebP.

What comes in is judged by its bytes alone and bounded before it is decoded (`core.pictures`); decoding is done in
threads, two at once, so that neither time nor memory runs away. What goes out carries its recipe in every format.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from lanting.core.errors import PictureError, RequestError
from lanting.core.pictures import open_mask, open_picture
from lanting.core.recipe import read_recipe
from lanting.core.save import how_to_save
from lanting.serve.fetch import Limits, fetch

if TYPE_CHECKING:
    from PIL.Image import Image

T = TypeVar("T")
KINDS = {"png": "PNG", "jpeg": "JPEG", "jpg": "JPEG", "webp": "WEBP"}
TYPES = {"PNG": "image/png", "JPEG": "image/jpeg", "WEBP": "image/webp"}
AT_ONCE = 2


@dataclass(frozen=True)
class Eyes:
    """How input pictures are read on this server. `limits` None: no addresses are fetched."""

    limits: Limits | None = None
    turns: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(AT_ONCE))

    async def picture(self, source: str | bytes, name: str = "the picture") -> Image:
        """Upright, RGB or RGBA, without metadata. Raises PictureError or RequestError."""
        return await self._read(source, name, open_picture)

    async def mask(self, source: str | bytes, name: str = "the mask") -> Image:
        """Grey; white is drawn anew."""
        return await self._read(source, name, open_mask)

    async def clear_mask(self, source: str | bytes, name: str = "the mask") -> Image:
        """Grey; white where the file is transparent, as OpenAI's clients mark what is to change. A file without any
        transparency is taken as it looks: white is drawn anew."""
        return await self._read(source, name, open_clear_mask)

    async def pictures(self, sources: Sequence[str | bytes], most: int) -> tuple[Image, ...]:
        """All of them, one after another."""
        if len(sources) > most:
            raise RequestError("at most {most} pictures are read, not {count}", most=most, count=len(sources))
        numbered = enumerate(sources, 1)
        return tuple([await self.picture(one, f"picture {number}") for number, one in numbered])

    async def _read(self, source: str | bytes, name: str, how: Callable[[bytes, str], T]) -> T:
        if isinstance(source, str) and source[:8].lower().startswith(("http://", "https://")):
            if self.limits is None:
                raise RequestError("this server fetches no addresses: send {name} itself, as base64", name=name)
            source = await fetch(source, self.limits, name)

        def look() -> T:
            return how(from_base64(source, name) if isinstance(source, str) else source, name)

        async with self.turns:
            return await asyncio.to_thread(look)


def open_clear_mask(data: bytes, name: str) -> Image:
    from PIL import ImageOps

    picture = open_picture(data, name)
    if picture.mode == "RGBA" and picture.getchannel("A").getextrema()[0] < 255:  # type: ignore[operator]
        return ImageOps.invert(picture.getchannel("A"))
    return open_mask(data, name)


def from_base64(text: str, name: str) -> bytes:
    """Plain or as a data URL."""
    if text[:5].lower() == "data:":
        head, comma, text = text.partition(",")
        if not comma or not head.lower().endswith(";base64"):
            raise PictureError("{name} is a data URL without base64: write data:image/png;base64,...", name=name)
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError):
        raise PictureError("{name} is not base64: send the file's bytes encoded, or upload it", name=name) from None


def kind_of(word: str | None) -> str:
    """Pillow's name of an output format."""
    kind = KINDS.get((word or "png").lower())
    if kind is None:
        raise RequestError("the format {word} is not written here: use png, jpeg or webp", word=repr(word))
    return kind


def encoded(path: Path, kind: str = "PNG", quality: int | None = None) -> bytes:
    """A finished picture's file in a format, with its recipe. `quality` 0 to 100 of JPEG and WebP."""
    if kind == "PNG":
        return path.read_bytes()
    from PIL import Image

    with Image.open(path, formats=("PNG",)) as image:
        image.load()
    how = how_to_save(kind, read_recipe(path))
    if quality is not None:
        how |= {"quality": quality} | ({"lossless": False} if kind == "WEBP" else {})
    buffer = io.BytesIO()
    (image.convert("RGB") if kind == "JPEG" else image).save(buffer, format=kind, **how)
    return buffer.getvalue()


def enlarged(preview: bytes, size: tuple[int, int], kind: str = "PNG") -> bytes:
    """A preview at the size the picture will have."""
    from PIL import Image

    with Image.open(io.BytesIO(preview), formats=("JPEG",)) as image:
        large = image.resize(size, Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    large.save(buffer, format=kind)
    return buffer.getvalue()


def to_base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")
