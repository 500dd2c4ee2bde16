"""A picture from a picture: start part of the way down, at the known picture plus that much noise."""

from __future__ import annotations

from dataclasses import replace

from lanting.core import Request
from lanting.flow.loop import Canvas, Tokens
from lanting.flow.schedule import scale_noise, skipped_steps
from lanting.tasks.studio import Studio, begin, look_at, size_of


def image_to_image(studio: Studio, request: Request) -> Canvas:
    """The first picture, resized to the asked size, noised by `strength` and drawn again under the prompt."""
    size = size_of(request)
    canvas = begin(studio, request, studio.codec.grid(*size))
    return start_from(canvas, look_at(studio, request.images[0], size), strength_of(request))


def start_from(canvas: Canvas, known: Tokens, strength: float) -> Canvas:
    """The same canvas, begun at the noise level that leaves a share `strength` of its steps."""
    sigmas = canvas.sigmas[skipped_steps(canvas.steps, strength) :]
    data = known.data.expand_as(canvas.start)
    return replace(canvas, start=scale_noise(data, canvas.start, sigmas[0]), sigmas=sigmas)


def strength_of(request: Request) -> float:
    return 1.0 if request.strength is None else request.strength
