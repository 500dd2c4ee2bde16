"""A picture from words: noise, and nothing else to look at."""

from __future__ import annotations

from lanting.core import Request
from lanting.flow.loop import Canvas
from lanting.tasks.studio import Studio, begin, size_of


def text_to_image(studio: Studio, request: Request) -> Canvas:
    """Pure noise of the asked size, in order of prompt, then count."""
    return begin(studio, request, studio.codec.grid(*size_of(request)))
