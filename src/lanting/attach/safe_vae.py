"""The autoencoder watched over: what it hands out is finite, or it is done again in a safer way (`attach.safe`).

Pixels are looked at before they are clamped, since a clamp makes white of what has overflowed. Tile by tile, where it
works in tiles.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lanting.attach.safe import HALVES, WAYS, Overrides, Safe, kernels
from lanting.attach.sentinel import name_of
from lanting.core.errors import NotFiniteError
from lanting.core.types import Notice, note

METHODS = {"vae.encode": "encode", "vae.decode": "reconstruct"}


class SafeVae:
    """Over one drawing. `known`: part of METHODS -> way, from the start."""

    def __init__(self, vae: Any, known: Mapping[str, str]):
        self.vae: nn.Module = vae
        self.ways = {path: way for path, way in known.items() if path in METHODS and way in WAYS}
        self.hung = Overrides()
        self.notices: list[Notice] = []

    def __enter__(self) -> SafeVae:
        for path, method in METHODS.items():
            self.hung.set(self.vae, method, partial(self.watched, path, method))
        return self

    def __exit__(self, *exception: object) -> None:
        self.hung.restore()

    def watched(self, path: str, method: str, x: Tensor, **more: Any) -> Any:
        """`encode` or `reconstruct`. Raises NotFiniteError when no way gives numbers."""
        for way in self.ladder(path):
            try:
                found = self.run(way, method, x, **more)
            except torch.OutOfMemoryError:
                if way is None or way == "plain":
                    raise
                continue  # the same in a wider type takes more
            if finite(found[0] if isinstance(found, tuple) else found):
                if way is not None and self.ways.get(path) != way:
                    self.ways[path] = way
                    self.tell(way)
                return found
        raise NotFiniteError("The VAE gives numbers that are not finite in every dtype: its weights are damaged.")

    def tell(self, way: str) -> None:
        facts: dict[str, object] = {"dtype": name_of(self.dtype), "way": way}
        if way == "plain":
            self.notices.append(note("the VAE gave numbers that are not finite: without kernels from now on"))
        else:
            self.notices.append(note("the VAE left the range of {dtype}: in {way} from now on", **facts))

    @property
    def dtype(self) -> torch.dtype:
        return next(self.vae.parameters()).dtype

    def ladder(self, path: str) -> Iterator[str | None]:
        """What to try, in this order; None: as it is. Where the kernels sit is looked up in trouble only."""
        way = self.ways.get(path)
        if way is None:
            yield None
        plain = ["plain"] if kernels(self.vae) else []
        wide = ["float32"] if self.dtype in HALVES else []
        wide += ["bfloat16"] if self.dtype == torch.float16 else []
        rungs = [*plain, *wide]
        if way is not None and way not in rungs:
            yield None
        yield from rungs[rungs.index(way) :] if way in rungs else rungs

    def run(self, way: str | None, method: str, x: Tensor, **more: Any) -> Any:
        if way is None:
            return getattr(type(self.vae), method)(self.vae, x, **more)
        off = Overrides()
        off.plain(self.vae)
        work: Callable[..., Any] = Safe(self.vae, way, method, onward=lambda: True)
        try:
            return work(x, **more)
        finally:
            off.restore()


def finite(x: Tensor) -> bool:
    """By one length, which is a tenth of the time that looking at each number takes on a CPU."""
    return math.isfinite(float(torch.linalg.vector_norm(x, dtype=torch.float32)))
