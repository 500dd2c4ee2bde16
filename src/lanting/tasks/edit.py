"""Change pictures by instruction: they stand as references behind the target, and the reader sees them too.

The releases differ in two areas only. Qwen-Image-Edit shows text encoder and VAE the same picture; 2509 and
2511 show the encoder a small copy (384 x 384 pixels' worth) of each of up to three pictures; nano shows the VAE
each picture at its own size. Any mix works here, batches of prompts included (diffusers 0.42 refuses those for
2509).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from PIL.Image import Image

from lanting.core import Request
from lanting.flow.loop import Canvas, Tokens
from lanting.specs.sizes import fit_area, reference_size
from lanting.tasks.inpaint import crop_scene, repaint
from lanting.tasks.keep import keeping
from lanting.tasks.pictures import resize, to_mode
from lanting.tasks.studio import Studio, begin, look_at, size_of


def edit(studio: Studio, request: Request) -> Canvas:
    """Pure noise, looking at every picture of the request in order. Option keep: what the edit leaves alone is the
    first picture's own."""
    grid = studio.codec.grid(*size_of(request))
    canvas = begin(studio, request, grid, images=for_reader(studio, request.images))
    canvas = replace(canvas, references=references(studio, request.images))
    if not request.options.get("keep"):
        return canvas
    first, known = request.images[0], canvas.references[0]
    if known.grid != grid:
        known = look_at(studio, first, size_of(request))
    return keeping(canvas, studio.codec, first, known)


def edit_inpaint(studio: Studio, request: Request) -> Canvas:
    """`inpaint` on the first picture, which is the first reference too; further pictures follow it."""
    scene, size = crop_scene(request), size_of(request)
    images = for_reader(studio, request.images)
    canvas = begin(studio, request, studio.codec.grid(*size), images=images)
    known = look_at(studio, scene.picture, size)
    canvas = repaint(studio, request, scene, canvas, known)
    return replace(canvas, references=(known, *references(studio, request.images[1:])))


def references(studio: Studio, images: Sequence[Image]) -> tuple[Tokens, ...]:
    """Each picture at the size the VAE is to see, encoded."""
    own = studio.release.defaults
    return tuple(look_at(studio, image, reference_size(image.width, image.height, own)) for image in images)


def for_reader(studio: Studio, images: Sequence[Image]) -> tuple[Image, ...]:
    """Each picture at the area the text encoder is to see, RGB. What is transparent is laid on white first, or where
    the VAE reads RGBA and both are to see one picture, after resizing."""
    return small_copies(images, studio.release.defaults.vl_area, studio.codec.pixel_channels)


def small_copies(images: Sequence[Image], area: int, channels: int = 3) -> tuple[Image, ...]:
    """The same for any `area` in pixels; `channels` are the VAE's."""
    sizes = (fit_area(area, image.width / image.height) for image in images)
    return tuple(to_mode(resize(to_mode(image, channels), size)) for image, size in zip(images, sizes, strict=True))
