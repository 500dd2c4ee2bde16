"""An engine for servers that takes pictures apart, without looking at them: every layer is a bar of glass."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fakeserve import FakeEngine
from fakeserve import open_engine as open_fake
from PIL import Image

from lanting.core.types import Request, Result
from lanting.specs import get_spec


def bar(picture: int, layer: int) -> Image.Image:
    """32 x 24; the last layer of three is empty."""
    glass = Image.new("RGBA", (32, 24))
    if layer < 2:
        glass.paste((200 - 40 * layer, 60, 40 + 50 * picture, 230), (2 + 6 * layer, 2, 10 + 6 * layer, 22))
    return glass


class Layered(FakeEngine):
    def _result(self, request: Request) -> Result:
        drawn, count = super()._result(request), int(request.options["layers"])
        images = tuple(bar(picture, layer) for picture in range(request.count) for layer in range(count))
        return replace(drawn, images=images, recipes=tuple(one for one in drawn.recipes for _ in range(count)))


def open_engine(model: str, **options: Any) -> FakeEngine:
    return Layered(get_spec(model)) if model == "qwen-image-layered" else open_fake(model, **options)
