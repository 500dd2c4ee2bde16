"""PowerPoint's files: one slide as large as the canvas, every layer a picture in its place, written by python-pptx.

The recipe is a part of custom XML, which PowerPoint keeps when it saves the file anew. Rejected: core properties, of
which 255 characters fit; notes, which a speaker would be shown. Reading needs no library: a slide is XML in a ZIP.
"""

from __future__ import annotations

import io
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from lanting.core.errors import OutputError
from lanting.core.openraster import MOST_BYTES, THUMBNAIL, entry
from lanting.core.pictures import MAX_PIXELS, decode_picture, on_white
from lanting.core.recipe import to_json
from lanting.core.stack import MOST_LAYERS, MOST_XML, NAMESPACE, Layer, Stack, as_xml, merged, word_in_xml

if TYPE_CHECKING:
    import zipfile

    from PIL.Image import Image

UNIT = 9525  # of a pixel at 96 to the inch, in PowerPoint's 914,400 units to the inch
SMALLEST, LARGEST = 914_400, 51_206_400  # sides of a slide: 1 and 56 inches
BLANK = 6  # the layout of python-pptx's own template that has nothing on it
RECIPE = "customXml/item1.xml"
TITLE = 255  # characters
SLIDE, RELATIONS = "ppt/slides/slide1.xml", "ppt/slides/_rels/slide1.xml.rels"
DRAWN = "{http://schemas.openxmlformats.org/drawingml/2006/main}"
SHOWN = "{http://schemas.openxmlformats.org/presentationml/2006/main}"
EMBEDDED = "{http://schemas.openxmlformats.org/officeDocument/2006/relationships}embed"


def library() -> Any:
    """python-pptx. Raises OutputError where it is not installed."""
    try:
        import pptx
    except ImportError:
        raise OutputError(
            'a .pptx file needs python-pptx, which is not installed: run pip install "lanting[layers]"'
        ) from None
    return pptx


# ---------------------------------------------------------------- writing
def write(stack: Stack) -> bytes:
    """The file. Raises OutputError where the library is not installed."""
    from PIL import Image

    show: Any = library().Presentation()
    unit = _unit(stack.size)
    show.slide_width, show.slide_height = (unit * side for side in stack.size)
    shapes = show.slides.add_slide(show.slide_layouts[BLANK]).shapes
    for layer in stack.layers:
        image = layer.image or Image.new("RGBA", (1, 1))
        place = [unit * side for side in (layer.left, layer.top, *image.size)]
        shape = shapes.add_picture(io.BytesIO(_encoded(image, "PNG")), *place)
        shape.name = layer.name
        shape.element.nvPicPr.cNvPr.set("descr", layer.name)  # what is read out where the picture can't be seen
    _describe(show, stack)
    buffer = io.BytesIO()
    show.save(buffer)
    return buffer.getvalue()


def _unit(size: tuple[int, int]) -> int:
    """How large a pixel is, in PowerPoint's units: as on a screen, where the slide may have that size."""
    unit = min(max(UNIT, -(-SMALLEST // min(size))), LARGEST // max(size))
    if unit * min(size) < SMALLEST:
        raise OutputError(
            "PowerPoint has no slides as narrow as {width}×{height}: use .psd or .ora", width=size[0], height=size[1]
        )
    return unit


def _encoded(image: Image, kind: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind)
    return buffer.getvalue()


def _describe(show: Any, stack: Stack) -> None:
    """Properties and preview, of which the template brings its own; the recipe."""
    now, told = datetime.now(UTC).replace(tzinfo=None), show.core_properties
    told.author = told.last_modified_by = "lanting"
    told.created = told.modified = now
    told.revision, told.title = 1, _title(stack)
    small = on_white(merged(stack))
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    package = show.part.package
    for part in package.iter_parts():
        if part.partname == "/docProps/thumbnail.jpeg":
            part.blob = _encoded(small, "JPEG")
    if stack.recipe is not None:
        from pptx.opc.constants import RELATIONSHIP_TYPE
        from pptx.opc.package import Part
        from pptx.opc.packuri import PackURI

        text = f'<?xml version="1.0" encoding="UTF-8"?>\n<recipe xmlns="{NAMESPACE}">{as_xml(to_json(stack.recipe))}'
        part = Part(PackURI(f"/{RECIPE}"), "application/xml", package, f"{text}</recipe>".encode())
        show.part.relate_to(part, RELATIONSHIP_TYPE.CUSTOM_XML)


def _title(stack: Stack) -> str:
    """The prompt, without what XML forbids."""
    words = "" if stack.recipe is None else " ".join(str(stack.recipe.request["prompt"]).split())
    return "".join(letter for letter in words if letter.isprintable())[:TITLE]


# ---------------------------------------------------------------- reading
def recipe_text(file: zipfile.ZipFile) -> str | None:
    """The recipe as JSON; None where there is none. Raises ValueError."""
    for name in file.namelist()[:10_000]:  # PowerPoint may give it another number
        if name.startswith("customXml/item") and name.endswith(".xml") and "Props" not in name:
            found = word_in_xml(entry(file, name, MOST_XML) or b"")
            if found is not None:
                return found
    return None


def read(file: zipfile.ZipFile) -> Stack:
    """The pictures of a slide that are as large as when it was written. Raises ValueError or PictureError."""
    from xml.etree.ElementTree import ParseError, fromstring

    pages = [entry(file, name, MOST_XML) or b"<!" for name in ("ppt/presentation.xml", SLIDE, RELATIONS)]
    if any(b"<!" in page for page in pages):
        raise ValueError("a slide is missing, or declares a document type")
    try:
        show, slide, relations = map(fromstring, pages)
    except ParseError as error:
        raise ValueError(str(error)) from None
    targets = {one.get("Id"): str(one.get("Target")) for one in relations}
    found = [*slide.iter(f"{SHOWN}pic")]
    if not 0 < len(found) <= MOST_LAYERS:
        raise ValueError(f"no pictures, or more than {MOST_LAYERS}")
    layers, units = zip(*(_read_picture(file, one, targets) for one in found), strict=True)
    whole = show.find(f"{SHOWN}sldSz")
    if whole is None or len(unit := {one for pair in units for one in pair}) != 1:
        raise ValueError("pictures that were made larger or smaller")
    pixel = unit.pop()
    size = int(whole.attrib["cx"]) // pixel, int(whole.attrib["cy"]) // pixel
    if not 0 < size[0] * size[1] <= MAX_PIXELS:
        raise ValueError("a slide that is too large")
    placed = (Layer(one.name, one.image, one.left // pixel, one.top // pixel) for one in layers)
    return Stack(size, tuple(placed))


def _read_picture(file: zipfile.ZipFile, told: Any, targets: dict[str | None, str]) -> tuple[Layer, tuple[int, int]]:
    """The layer, placed in PowerPoint's units, and how many of those a pixel is wide and high."""
    at, extent = (told.find(f".//{DRAWN}xfrm/{DRAWN}{part}") for part in ("off", "ext"))
    named, blip = told.find(f".//{SHOWN}cNvPr"), told.find(f".//{DRAWN}blip")
    if any(one is None for one in (at, extent, named, blip)):
        raise ValueError("pictures of another kind than lanting places")
    name = targets.get(blip.get(EMBEDDED), "").replace("../", "ppt/")
    data = entry(file, name, MOST_BYTES)
    if data is None:
        raise ValueError(f"{name} is missing")
    image = decode_picture(data, name).convert("RGBA")
    image.info = {}
    unit = int(extent.get("cx")) // image.width, int(extent.get("cy")) // image.height
    shown = image if image.getbbox(alpha_only=True) else None
    return Layer(named.get("name", ""), shown, int(at.get("x")), int(at.get("y"))), unit
