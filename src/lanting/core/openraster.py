"""OpenRaster files, which GIMP, Krita and MyPaint open: a ZIP of PNG files and of a page that says how they lie.

`mimetype` comes first and unpacked, so that programs know the file by its beginning. PNG files are packed already and
are stored as they are; all times are the same, so that the same layers give the same file. The recipe is an entry of
our own beside what the specification names; a program that saves the file anew drops it.
"""

from __future__ import annotations

import io
import zipfile
from typing import TYPE_CHECKING, Any

from lanting.core.pictures import MAX_PIXELS, decode_picture
from lanting.core.recipe import LONGEST, to_json
from lanting.core.stack import MOST_LAYERS, MOST_XML, Layer, Stack, merged

if TYPE_CHECKING:
    from PIL.Image import Image

MIMETYPE = "image/openraster"
RECIPE = "lanting/recipe.json"
THUMBNAIL = 256  # pixels of the longer side
MOST_BYTES = 200_000_000  # of a picture inside


# ---------------------------------------------------------------- writing
def write(stack: Stack) -> bytes:
    """The file."""
    from PIL import Image

    picture = merged(stack)
    small = picture.copy()
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        _put(file, "mimetype", MIMETYPE.encode())
        _put(file, "stack.xml", _page(stack))
        for number, layer in enumerate(stack.layers, 1):
            _put(file, _path(number), _png(layer.image or Image.new("RGBA", (1, 1))))
        _put(file, "mergedimage.png", _png(picture))
        _put(file, "Thumbnails/thumbnail.png", _png(small))
        if stack.recipe is not None:
            _put(file, RECIPE, to_json(stack.recipe).encode())
    return buffer.getvalue()


def _put(file: zipfile.ZipFile, name: str, data: bytes) -> None:
    told = zipfile.ZipInfo(name)  # stored, of the year 1980
    told.external_attr = 0o644 << 16  # readable for whoever unpacks it
    file.writestr(told, data)


def _path(number: int) -> str:
    return f"data/layer-{number}.png"


def _png(image: Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def _page(stack: Stack) -> bytes:
    """stack.xml, in which the uppermost layer comes first."""
    from xml.sax.saxutils import quoteattr

    width, height = stack.size
    lines = [
        f'    <layer name={quoteattr(layer.name)} src="{_path(number)}" x="{layer.left}" y="{layer.top}" '
        'opacity="1.0" visibility="visible" composite-op="svg:src-over"/>'
        for number, layer in enumerate(stack.layers, 1)
    ]
    head = '<?xml version="1.0" encoding="UTF-8"?>\n'
    head += f'<image version="0.0.3" w="{width}" h="{height}" xres="72" yres="72">\n  <stack>\n'
    return "\n".join([head + "\n".join(reversed(lines)), "  </stack>", "</image>", ""]).encode()


# ---------------------------------------------------------------- reading
def entry(file: zipfile.ZipFile, name: str, most: int) -> bytes | None:
    """An entry of a stranger's ZIP, at most so many bytes of it; None where it is not there. Raises ValueError."""
    try:
        found = file.getinfo(name)
    except KeyError:
        return None
    with file.open(found) as content:
        data = content.read(most + 1)
    if len(data) > most:
        raise ValueError(f"{name} is too long")
    return data


def recipe_text(file: zipfile.ZipFile) -> str | None:
    """The recipe as JSON; None where there is none. Raises ValueError."""
    data = entry(file, RECIPE, 4 * LONGEST)
    return None if data is None else data.decode("utf-8")


def read(file: zipfile.ZipFile) -> Stack:
    """The layers of a file as we write it, or as another program left it, as long as all are pixels and plain.

    Raises ValueError, or PictureError for a layer that is no picture.
    """
    from xml.etree.ElementTree import ParseError, fromstring

    page = entry(file, "stack.xml", MOST_XML)
    if page is None or b"<!" in page:
        raise ValueError("no stack.xml, or one that declares a document type")
    try:
        root = fromstring(page)
    except ParseError as error:
        raise ValueError(str(error)) from None
    found = [*root.iter("layer")]
    if len(found) > MOST_LAYERS:
        raise ValueError(f"more than {MOST_LAYERS} layers")
    size = int(root.attrib["w"]), int(root.attrib["h"])
    if not 0 < size[0] * size[1] <= MAX_PIXELS:
        raise ValueError("a canvas that is too large")
    return Stack(size, tuple(_read_layer(file, one) for one in reversed(found)))


def _read_layer(file: zipfile.ZipFile, told: Any) -> Layer:
    name = str(told.get("src"))
    data = entry(file, name, MOST_BYTES)
    if data is None:
        raise ValueError(f"{name} is missing")
    image = decode_picture(data, name).convert("RGBA")
    image.info = {}
    shown = image if image.getbbox(alpha_only=True) else None
    return Layer(str(told.get("name", "")), shown, int(told.get("x", 0)), int(told.get("y", 0)))
