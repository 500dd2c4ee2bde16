"""A picture in layers as a file holds it: a canvas, and on it named layers, each cut to the box in which it is seen.

What a layer holds where nothing is seen of it is given up with the cut; inside its box every pixel stays as it is,
colours under full transparency too. Rejected: layers as large as the canvas, which make files several times as large
and selections in the programs that open them useless.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lanting.core.lang import say
from lanting.core.types import Recipe

if TYPE_CHECKING:
    from PIL.Image import Image

NAMESPACE = "urn:lanting:1.0/"  # of the recipe, in files that keep it as XML
MOST_LAYERS = 64  # that are read of a file
MOST_XML = 4_000_000  # bytes of XML that are read of a file


@dataclass(frozen=True, slots=True)
class Layer:
    """`image` is RGBA, or None where nothing of the layer is seen; (left, top) is its place on the canvas in pixels."""

    name: str
    image: Image | None
    left: int = 0
    top: int = 0


@dataclass(frozen=True, slots=True)
class Stack:
    """`layers` with the lowest first; `size` (width, height) of the canvas in pixels."""

    size: tuple[int, int]
    layers: tuple[Layer, ...]
    recipe: Recipe | None = None


def layer_names(count: int, say: Callable[..., str] = say) -> list[str]:
    """Layer 1, Layer 2 and so on, in the person's language, or in that of another `say`."""
    return [say("Layer {number}", number=number) for number in range(1, count + 1)]


def stack_of(images: Sequence[Image], names: Sequence[str], recipe: Recipe | None = None) -> Stack:
    """Pictures of one size, the lowest first, as layers."""
    return Stack(images[0].size, tuple(map(_cut, images, names)), recipe)


def _cut(image: Image, name: str) -> Layer:
    clear = image.convert("RGBA")
    box = clear.getbbox(alpha_only=True)
    return Layer(name, None) if box is None else Layer(name, clear.crop(box), *box[:2])


def spread(layer: Layer, size: tuple[int, int]) -> Image:
    """The layer on a clear canvas."""
    from PIL import Image

    canvas = Image.new("RGBA", size)
    if layer.image is not None:
        canvas.paste(layer.image, (layer.left, layer.top))
    return canvas


def merged(stack: Stack) -> Image:
    """All layers over one another on a clear canvas, RGBA."""
    from PIL import Image

    canvas = Image.new("RGBA", stack.size)
    for layer in stack.layers:
        if layer.image is not None:
            canvas.alpha_composite(layer.image, (layer.left, layer.top))
    return canvas


def as_xml(text: str) -> str:
    """JSON as the content of an XML element. Letters beyond ASCII become JSON's own escapes: XML forbids some."""
    from xml.sax.saxutils import escape

    plain = "".join(letter if letter < "\x7f" else _escaped(letter) for letter in text)
    return escape(plain)


def _escaped(letter: str) -> str:
    import json

    return json.dumps(letter)[1:-1]


def word_in_xml(data: bytes, name: str = "recipe") -> str | None:
    """The text of our element, or of an attribute of that name, in a stranger's XML; None where there is none.

    Raises ValueError where the XML is too long, damaged, or declares entities.
    """
    from xml.etree.ElementTree import ParseError, fromstring

    if len(data) > MOST_XML or b"<!" in data:
        raise ValueError("XML that is too long or declares a document type")
    wanted = f"{{{NAMESPACE}}}{name}"
    try:
        root = fromstring(data)
    except ParseError as error:
        raise ValueError(str(error)) from None
    for element in root.iter():
        if element.tag == wanted:
            return element.text
        if wanted in element.attrib:
            return element.attrib[wanted]
    return None
