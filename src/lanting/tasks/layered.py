"""Take a picture apart into RGBA layers: n + 1 pictures are painted together, looking at the one given.

The first of them reconstructs the whole picture and is dropped. The model asks for a shift of the schedule
that grows with the square root of the condition picture's tokens.
"""

from __future__ import annotations

import math
from dataclasses import replace

from PIL.Image import Image
from torch import Tensor

from lanting.core import Request
from lanting.flow.latents import LatentCodec
from lanting.flow.loop import Canvas, Grid
from lanting.tasks.pictures import pictures_from
from lanting.tasks.studio import Studio, begin, look_at, size_of

BASE_TOKENS = 256  # a 256 x 256 picture, for which the shift's exponent is 1


def layered(studio: Studio, request: Request) -> Canvas:
    """Option layers (default: the release's): how many. The picture isn't shown to the text encoder; the engine
    puts it into words where there is no prompt.

    Finishes as one list: per picture of the batch its layers, the lowest first.
    """
    layers = request.options.get("layers", studio.release.defaults.layers)
    size = size_of(request)
    picture = look_at(studio, request.images[0], size)
    grid = studio.codec.grid(*size)
    mu = math.sqrt(picture.data.shape[1] / BASE_TOKENS)
    canvas = begin(studio, request, grid, frames=layers + 1, mu=mu)

    def finish(latents: Tensor) -> list[Image]:
        return draw_layers(studio.codec, grid, latents)

    return replace(canvas, references=(picture,), finish=finish)


def draw_layers(codec: LatentCodec, grid: Grid, latents: Tensor) -> list[Image]:
    """(B, (n + 1) h w, 4z) -> B n pictures; frame 0, the composite, is left out."""
    frames = latents.unflatten(1, (-1, grid[1] * grid[2]))  # (B, n + 1, h w, 4z)
    return pictures_from(codec.decode(frames[:, 1:].flatten(0, 1), grid))
