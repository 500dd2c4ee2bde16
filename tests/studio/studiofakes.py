"""Engines for the studio's server: nano as it is, a layered model that draws nothing but has layers, others plain."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fakeserve import FakeEngine
from fakeserve import open_engine as open_fake
from PIL import Image

from lanting.core.types import Request, Result
from lanting.serve.worker import open_engine as open_real
from lanting.specs import get_spec


class Layered(FakeEngine):
    """Its layers are bars of glass."""

    def _result(self, request: Request) -> Result:
        count = int(request.options["layers"])
        drawn = super()._result(replace(request, count=count))
        glass = []
        for index in range(count):
            layer = Image.new("RGBA", (320, 240))
            layer.paste((200 - 40 * index, 60, 40 + 50 * index, 230), (20 + 60 * index, 20, 100 + 60 * index, 220))
            glass.append(layer)
        return replace(drawn, images=tuple(glass))


def open_engine(model: str, **options: Any) -> Any:
    if model == "nano":
        return open_real(model, **options)
    if model == "qwen-image-layered":
        return Layered(get_spec(model), pace=0.02)
    return replace(open_fake(model, **options), spec=get_spec(model))
