"""Photoshop's files: 8 bits RGB, one pixel layer a layer, PackBits, a merged picture, the recipe as XMP.

The format is public and what is needed of it is small. Its PackBits is TIFF's, which Pillow writes and reads in C.
Where something is seen through the merged picture, its colours lie on white and a fourth channel says how much, as
Photoshop itself stores it; the layers keep their colours as they are. Rejected: psd-tools, whose files can't have
Chinese names of layers and whose merged picture is its own; it is what the tests read our files with.
"""

from __future__ import annotations

import io
import struct
from typing import TYPE_CHECKING, Any

from lanting.core.pictures import MAX_PIXELS, on_white
from lanting.core.recipe import to_json
from lanting.core.stack import MOST_LAYERS, NAMESPACE, Layer, Stack, as_xml, merged, word_in_xml
from lanting.core.types import Recipe

if TYPE_CHECKING:
    from PIL.Image import Image

XMP, VERSION = 1060, 1057  # image resources
ALPHA = -1
RAW, PACKED = 0, 1
STRIPS, STRIP_BYTES = 273, 279  # TIFF's tags
SIGNED = b"8BIM"


# ---------------------------------------------------------------- writing
def write(stack: Stack) -> bytes:
    """The file."""
    picture = merged(stack)
    see_through = picture.getchannel("A").getextrema() != (255, 255)
    bands = [*on_white(picture).split(), *([picture.getchannel("A")] if see_through else [])]
    width, height = stack.size
    header = b"8BPS" + struct.pack(">H6xHIIHH", 1, len(bands), height, width, 8, 3)
    sections = [b"", _resources(stack.recipe), _layers(stack, see_through)]
    body = b"".join(struct.pack(">I", len(section)) + section for section in sections)
    return header + body + _planes(bands)


def _resources(recipe: Recipe | None) -> bytes:
    """The merged picture is a real one; the recipe."""
    writer = _unicode("lanting")
    found = _resource(VERSION, struct.pack(">IB", 1, 1) + writer + writer + struct.pack(">I", 1))
    return found if recipe is None else found + _resource(XMP, _xmp(recipe))


def _resource(number: int, data: bytes) -> bytes:
    return SIGNED + struct.pack(">HHI", number, 0, len(data)) + data + b"\0" * (len(data) % 2)


def _unicode(text: str) -> bytes:
    """With its length in units of 16 bits before it."""
    data = text.encode("utf-16-be")
    return struct.pack(">I", len(data) // 2) + data


def _xmp(recipe: Recipe) -> bytes:
    tool = f"lanting {recipe.versions.get('lanting', '')}".strip()
    return (
        '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>\n<x:xmpmeta xmlns:x="adobe:ns:meta/">'
        '<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description rdf:about="" '
        f'xmlns:xmp="http://ns.adobe.com/xap/1.0/" xmlns:lanting="{NAMESPACE}">'
        f"<xmp:CreatorTool>{as_xml(tool)}</xmp:CreatorTool><lanting:recipe>{as_xml(to_json(recipe))}</lanting:recipe>"
        '</rdf:Description></rdf:RDF></x:xmpmeta>\n<?xpacket end="w"?>'
    ).encode()


def _layers(stack: Stack, see_through: bool) -> bytes:
    """Records of all layers, then their channels. A count below zero says that the merged picture has an alpha."""
    records, pixels = b"", b""
    for layer in stack.layers:
        channels = _channels(layer)
        records += _record(layer, [len(channel) for channel in channels])
        pixels += b"".join(channels)
    count = -len(stack.layers) if see_through else len(stack.layers)
    info = struct.pack(">h", count) + records + pixels
    info += b"\0" * (-len(info) % 4)
    return struct.pack(">I", len(info)) + info + struct.pack(">I", 0)  # the last: no mask of all layers


def _record(layer: Layer, lengths: list[int]) -> bytes:
    width, height = (0, 0) if layer.image is None else layer.image.size
    box = struct.pack(">4i", layer.top, layer.left, layer.top + height, layer.left + width)
    channels = b"".join(struct.pack(">hI", *pair) for pair in zip((ALPHA, 0, 1, 2), lengths, strict=True))
    how = SIGNED + b"norm" + bytes((255, 0, 8, 0))  # opacity, clipping, flags as Photoshop sets them since version 5
    plain = layer.name.encode("ascii", "replace")[:31]  # for programs that don't read the name below
    short = bytes((len(plain),)) + plain
    short += b"\0" * (-len(short) % 4)
    name = _unicode(layer.name)
    name += b"\0" * (-len(name) % 4)
    more = struct.pack(">II", 0, 0) + short + SIGNED + b"luni" + struct.pack(">I", len(name)) + name
    return box + struct.pack(">H", 4) + channels + how + struct.pack(">I", len(more)) + more


def _channels(layer: Layer) -> list[bytes]:
    """Alpha, red, green, blue; each begins with how it is packed."""
    if layer.image is None:
        return [struct.pack(">H", RAW)] * 4
    red, green, blue, alpha = layer.image.split()
    return [_planes([band]) for band in (alpha, red, green, blue)]


def _planes(bands: list[Image]) -> bytes:
    """Bands one after another, packed row by row; the lengths of all rows stand before them."""
    from PIL import features

    if not features.check("libtiff"):  # a Pillow built without it: every program reads plain bytes too
        return struct.pack(">H", RAW) + b"".join(band.tobytes() for band in bands)
    packed = [_rows(band) for band in bands]
    lengths = [length for rows, _ in packed for length in rows]
    return struct.pack(f">H{len(lengths)}H", PACKED, *lengths) + b"".join(data for _, data in packed)


def _rows(band: Image) -> tuple[list[int], bytes]:
    """(length of each row, rows) of a band in PackBits, from a TIFF whose strips are one row high."""
    from PIL import Image

    buffer = io.BytesIO()
    band.save(buffer, "TIFF", compression="packbits", strip_size=band.width)
    with Image.open(buffer, formats=("TIFF",)) as tiff:
        tags: Any = tiff.tag_v2  # type: ignore[attr-defined]
        starts, lengths = _listed(tags[STRIPS]), _listed(tags[STRIP_BYTES])
    data = buffer.getbuffer()
    rows = (bytes(data[start : start + length]) for start, length in zip(starts, lengths, strict=True))
    return lengths, b"".join(rows)


def _listed(tag: Any) -> list[int]:
    """A TIFF's tag; one number alone is none of a list."""
    return [*tag] if isinstance(tag, tuple) else [tag]  # pyright: ignore[reportUnknownVariableType]


# ---------------------------------------------------------------- reading
class _Bytes:
    """A stranger's bytes, taken one piece after another. Raises ValueError where they end too soon."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def take(self, count: int) -> bytes:
        piece = self.data[self.at : self.at + count]
        if count < 0 or len(piece) != count:
            raise ValueError("the file ends too soon")
        self.at += count
        return piece

    def numbers(self, form: str) -> tuple[int, ...]:
        return struct.unpack(f">{form}", self.take(struct.calcsize(f">{form}")))

    def section(self) -> _Bytes:
        """What follows its own length."""
        (length,) = self.numbers("I")
        return _Bytes(self.take(length))

    @property
    def over(self) -> bool:
        return self.at >= len(self.data)


def _sections(data: bytes) -> tuple[tuple[int, int], _Bytes, _Bytes]:
    """(width, height), resources, layers. Raises ValueError for what we don't write."""
    file = _Bytes(data)
    file.take(4)
    version, _, height, width, depth, mode = file.numbers("H6xHIIHH")
    if (version, depth, mode) != (1, 8, 3) or not 0 < width * height <= MAX_PIXELS:
        raise ValueError("another kind of file than lanting writes, or too large")
    file.section()
    return (width, height), file.section(), file.section()


def recipe_text(data: bytes) -> str | None:
    """The recipe as JSON; None where there is none. Raises ValueError."""
    _, resources, _ = _sections(data)
    while not resources.over:
        resources.take(4)
        number, length = resources.numbers("HB")
        resources.take(length + (length + 1) % 2)
        content = resources.section().data
        resources.take(len(content) % 2)
        if number == XMP:
            return word_in_xml(content)
    return None


def read(data: bytes) -> Stack:
    """The layers of a file as we write it. Raises ValueError."""
    size, _, layers = _sections(data)
    info = layers.section()
    (count,) = info.numbers("h")
    if abs(count) > MOST_LAYERS:
        raise ValueError(f"more than {MOST_LAYERS} layers")
    records = [_read_record(info, size) for _ in range(abs(count))]
    return Stack(size, tuple(_read_layer(info, *record) for record in records))


def _read_record(info: _Bytes, size: tuple[int, int]) -> tuple[str, tuple[int, ...], list[tuple[int, int]]]:
    """Name, (top, left, bottom, right), and (which, length) of each channel."""
    box = info.numbers("4i")
    inside = 0 <= box[0] <= box[2] <= size[1] and 0 <= box[1] <= box[3] <= size[0]
    channels = [info.numbers("hI") for _ in range(info.numbers("H")[0])]
    if not inside or sorted(which for which, _ in channels) != [ALPHA, 0, 1, 2]:
        raise ValueError("layers of another kind than lanting writes")
    info.take(12)
    more = info.section()
    for _ in range(2):
        more.section()
    (length,) = more.numbers("B")
    name = more.take(length).decode("ascii", "replace")
    more.take(-(length + 1) % 4)
    while not more.over:
        key, content = more.take(8)[4:], more.section()
        if key == b"luni":
            name = content.take(2 * content.numbers("I")[0]).decode("utf-16-be", "replace")
    return name, box, [(which, length) for which, length in channels]


def _read_layer(info: _Bytes, name: str, box: tuple[int, ...], channels: list[tuple[int, int]]) -> Layer:
    from PIL import Image

    top, left, bottom, right = box
    size = right - left, bottom - top
    bands = {which: _read_band(_Bytes(info.take(length)), size) for which, length in channels}
    if 0 in size:
        return Layer(name, None)
    return Layer(name, Image.merge("RGBA", [bands[which] for which in (0, 1, 2, ALPHA)]), left, top)


def _read_band(channel: _Bytes, size: tuple[int, int]) -> Image:
    from PIL import Image

    (how,) = channel.numbers("H")
    if 0 in size:
        return Image.new("L", (1, 1))
    if how == RAW:
        return Image.frombytes("L", size, channel.take(size[0] * size[1]))
    if how != PACKED:
        raise ValueError("layers packed in another way than lanting does")
    packed = channel.take(sum(channel.numbers(f"{size[1]}H")))
    return Image.frombytes("L", size, packed, "packbits", "L")
