"""Reading pictures people give us: three formats, a cap on pixels before decoding, one frame, upright.

The content decides, never the file's name. Pillow's own bomb guard lets an 81-megapixel PNG of ten kilobytes
through, so the size is checked from the header with a cap of our own.
"""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from lanting.core.errors import PictureError, first_line

if TYPE_CHECKING:
    from PIL import Image

MAX_PIXELS = 25_000_000
MAX_BYTES = 200_000_000
FORMATS = ("PNG", "JPEG", "WEBP")
METADATA = ("exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp")


def open_picture(source: str | Path | bytes, name: str = "the picture") -> Image.Image:
    """An upright RGB picture, or RGBA where the file has transparency; `info["path"]` keeps where it came
    from.

    source  a path, or the file's bytes (then `name` stands for it in errors)

    Raises PictureError: missing, unreadable, not PNG/JPEG/WebP, damaged, or above MAX_PIXELS.
    """
    shown = name if isinstance(source, bytes) else str(source)
    image = decode_picture(source if isinstance(source, bytes) else read_bytes(Path(source)), shown)
    try:
        plain = _upright(image)
    except Exception as error:  # of metadata that is damaged, or none
        raise broken(shown, error) from None
    plain.info = {} if isinstance(source, bytes) else {"path": str(source)}
    return plain


def _upright(image: Image.Image) -> Image.Image:
    """RGB or RGBA. Of metadata the orientation is read and the rest dropped first: Pillow would write it anew, and
    that of many cameras can't be written."""
    from PIL import ImageOps  # here and below: help and plans need no Pillow

    if image.mode.startswith("I"):  # 16 bits a pixel; converting would cut them off at 255
        image = image.convert("I").point(lambda level: level * (1 / 257)).convert("L")
    image.getexif()  # which keeps it
    for name in METADATA:
        image.info.pop(name, None)
    upright = ImageOps.exif_transpose(image)
    see_through = "A" in upright.getbands() or "transparency" in upright.info
    return upright.convert("RGBA" if see_through else "RGB")


def on_white(image: Image.Image) -> Image.Image:
    """RGB; what is transparent shows white, as on paper."""
    from PIL import Image

    paper = Image.new("RGBA", image.size, "white")
    paper.alpha_composite(image.convert("RGBA"))
    return paper.convert("RGB")


def open_mask(source: str | Path | bytes, name: str = "the mask") -> Image.Image:
    """A grey mask, white = repaint. Transparent pixels count as black."""
    from PIL import Image

    image = open_picture(source, name)
    if image.mode == "RGBA":
        black = Image.new("RGBA", image.size, "black")
        black.alpha_composite(image)
        black.info = image.info
        image = black
    return image.convert("L")


def read_bytes(path: Path) -> bytes:
    """The file's content, or a PictureError that says why not."""
    try:
        if path.is_dir():
            raise PictureError("{path} is a folder, not a picture", path=path)
        if not path.exists():
            raise PictureError("{path} does not exist", path=path)
        if not path.is_file():
            raise PictureError("{path} is not a file", path=path)
        if (size := path.stat().st_size) > MAX_BYTES:
            raise PictureError(
                "{path} is a file of {size:,} MB; pictures up to {most:,} MB are read",
                **{"path": path, "size": size // 1_000_000, "most": MAX_BYTES // 1_000_000},
            )
        return path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        reason = getattr(error, "strerror", None) or error
        raise PictureError("{path} can't be read: {reason}", path=path, reason=reason) from None


def decode_picture(data: bytes, name: str) -> Image.Image:
    """The first frame as Pillow decodes it, with its metadata in `info`."""
    from PIL import Image

    if not data:
        raise PictureError("{name} is empty", name=name)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own cap is lower
            image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError:
        raise PictureError("{name} has too many pixels: at most 25 million are read", name=name) from None
    except (OSError, ValueError, SyntaxError):
        raise PictureError(
            "{name} is not a picture we read (PNG, JPEG, WebP): it starts like {kind}",
            **{"name": name, "kind": _looks_like(data)},
        ) from None
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise PictureError(
            "{name} is {width}×{height}, {million} million pixels; at most 25 million are read: shrink it",
            **{"name": name, "width": width, "height": height, "million": width * height // 1_000_000},
        )
    try:
        image.load()
    # damaged files raise whatever the decoder meets: zlib, struct, Syntax, OS errors
    except Exception as error:
        raise broken(name, error) from None
    return image


def _looks_like(data: bytes) -> str:
    known = (
        (b"GIF8", "a GIF"),
        (b"BM", "a BMP"),
        (b"II*\0", "a TIFF"),
        (b"MM\0*", "a TIFF"),
        (b"%PDF", "a PDF"),
        (b"PK\3\4", "a ZIP"),
        (b"\x89PNG", "a damaged PNG"),
        (b"\xff\xd8\xff", "a damaged JPEG"),
        (b"RIFF", "a damaged WebP"),
    )
    for start, kind in known:
        if data.startswith(start):
            return kind
    if data[4:8] == b"ftyp":
        return "a HEIC, AVIF or video file"
    head = data[:256]
    if b"<svg" in head.lower():
        return "an SVG"
    return "a text file" if all(byte in b"\t\n\r" or byte >= 32 for byte in head) else "something else"


def broken(name: str, error: Exception) -> PictureError:
    """The sentence for a file on which a library gives up."""
    return PictureError("{name} is damaged: {reason}", name=name, reason=first_line(error)[:120])
