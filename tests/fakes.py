"""FakeEngine: three Progress and an 8x8 picture, so that every interface can be tested without a model.

And a picture that is a trap: a PNG of any number of pixels in a few kilobytes.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from lanting.core.recipe import describe_request, request_of_picture
from lanting.core.types import Progress, Recipe, Request, Result
from lanting.specs import ModelSpec, get_spec

VERSIONS = {"lanting": "0.1.0", "torch": "0", "python": "3", "device": "fake", "dtype": "float32"}


@dataclass
class FakeEngine:
    """The engine's contract with nothing behind it. The picture's colour comes from the seed."""

    spec: ModelSpec = field(default_factory=lambda: get_spec("nano"))
    weights: str = "feedfacefeedface"
    fails: BaseException | None = None  # raised after the first step
    requests: list[Request] = field(default_factory=list)
    closed: int = 0
    cancelled: bool = False
    notes: tuple[str, ...] = ()
    loras: tuple[Any, ...] = ()
    controlnet: str | None = None  # what the engine was opened with
    sees: Any = None  # (picture) -> lines

    def stream(self, request: Request, previews: bool = False) -> Iterator[Any]:
        if request.tries is None:
            return self._once(request, previews)
        from lanting.engine.tries import until_read

        return until_read(request, lambda one, _: self._once(one, previews), self.sees)

    def _once(self, request: Request, previews: bool = False) -> Iterator[Progress | Result]:
        self.requests.append(request)
        try:
            for step in range(1, 4):
                preview = Image.new("RGB", (2, 2), "grey") if previews else None
                yield Progress("denoise", step, 3, 0.1 * step, preview)
                if self.fails is not None:
                    raise self.fails
        except GeneratorExit:
            self.cancelled = True
            raise
        yield self._result(request)

    def run(self, request: Request) -> Result:
        *_, result = self.stream(request)
        assert isinstance(result, Result)
        return result

    def set_strengths(self, *strengths: float) -> None:
        assert all(-10 <= strength <= 10 for strength in strengths)

    def close(self) -> None:
        self.closed += 1

    def _result(self, request: Request) -> Result:
        prompts = 1 if isinstance(request.prompt, str) else len(request.prompt)
        layers = request.options.get("layers", 1)
        images, recipes = [], []
        for index in range(prompts * request.count):
            one = request_of_picture(request, index)
            recipe = Recipe(describe_request(one), self.spec.name, self.weights, str(request.task), dict(VERSIONS))
            for layer in range(layers):
                colour = ((one.seed or 0) % 256, 10, layer)
                images.append(Image.new("RGBA" if layers > 1 else "RGB", (8, 8), colour))
                recipes.append(recipe)
        return Result(tuple(images), tuple(recipes), {"denoise": 0.3})


def bare_png(width: int, height: int) -> bytes:
    """A black one-bit PNG, a few kilobytes however many pixels it has."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    rows = zlib.compress(b"\0" * ((width + 7) // 8 + 1) * height, 9)
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
