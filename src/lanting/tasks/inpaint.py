"""Draw anew inside a mask, keep the rest: as image-to-image, and after every step the known pixels come back.

One latent of the picture serves as start and as what is kept (and in `edit_inpaint` as reference); diffusers
0.42 encodes a masked copy as well and never uses it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch.nn.functional as F
from PIL.Image import Image
from torch import Tensor

from lanting.core import Request, RequestError
from lanting.flow.latents import LatentCodec, pack
from lanting.flow.loop import Canvas, Tokens
from lanting.flow.schedule import scale_noise
from lanting.tasks.image_to_image import start_from, strength_of
from lanting.tasks.pictures import Size, box_around, contain, eight_bits, mask_of, paste_back, resize, to_mode
from lanting.tasks.studio import Studio, begin, look_at, size_of


def inpaint(studio: Studio, request: Request) -> Canvas:
    """White of the mask is drawn anew. Option padding_mask_crop: draw only the surroundings of the mask,
    large, and paste them back into the picture at its own size."""
    scene = crop_scene(request)
    size = size_of(request)
    canvas = begin(studio, request, studio.codec.grid(*size))
    return repaint(studio, request, scene, canvas, look_at(studio, scene.picture, size))


@dataclass(frozen=True, slots=True)
class Scene:
    """What is drawn: the whole picture and mask, or the part around the mask, fitted to the asked size."""

    picture: Image
    mask: Image
    restore: Callable[[Image], Image] | None = None  # puts a finished part back into the whole picture


def crop_scene(request: Request) -> Scene:
    """The picture (RGB) and mask of the request, cropped if padding_mask_crop asks for it."""
    if request.mask is None:
        raise RequestError("{task} needs a mask: a picture that is white where to draw anew", task=request.task)
    picture, mask = to_mode(request.images[0]), eight_bits(request.mask)
    padding = request.options.get("padding_mask_crop")
    if padding is None:
        return Scene(picture, mask)
    if mask.size != picture.size:
        mask = resize(mask.convert("L"), picture.size)
    size = size_of(request)
    box = box_around(mask, size, padding)
    restore = partial(paste_back, picture, mask, box)
    return Scene(contain(picture.crop(box), size), contain(mask.crop(box), size), restore)


def repaint(studio: Studio, request: Request, scene: Scene, canvas: Canvas, known: Tokens) -> Canvas:
    """`canvas` (of noise) begun at `known`, with everything outside the mask held to it."""
    mask = token_mask(studio.codec, scene.mask, size_of(request)).to(known.data)
    noise, draw, restore = canvas.start, canvas.finish, scene.restore

    def keep(latents: Tensor, sigma: Tensor) -> Tensor:
        return (1 - mask) * scale_noise(known.data.expand_as(latents), noise, sigma) + mask * latents

    canvas = replace(start_from(canvas, known, strength_of(request)), keep=keep)
    if restore is None:
        return canvas
    return replace(canvas, finish=lambda latents: [restore(part) for part in draw(latents)])


def token_mask(codec: LatentCodec, mask: Image, size: Size) -> Tensor:
    """(1, N, 4z): 1 where a latent is drawn anew; one picture pixel decides for all of a latent's."""
    rows, columns = size[1] // codec.stride, size[0] // codec.stride
    coarse = F.interpolate(mask_of(mask, size), size=(rows, columns))  # (1, 1, 2h, 2w), nearest
    return pack(coarse.expand(-1, codec.channels, -1, -1), codec.patch)
