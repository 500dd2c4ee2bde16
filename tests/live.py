"""Counts the bytes of tensors that are alive while code runs, on any device; on meta it costs no memory.

What it sees is what Python holds: every storage from the operation that made it until it is freed. Scratch memory
inside an operation is not seen. On meta, what an operation makes of tensors of some shapes is remembered: torch's own
answer is computed in Python and takes milliseconds.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def likeness(value: Any) -> tuple[Any, ...]:
    """All that an operation on meta can know of what it is given."""
    if isinstance(value, torch.Tensor):
        return torch.Tensor, tuple(value.shape), value.stride(), value.dtype
    if isinstance(value, list | tuple):
        return type(value), *map(likeness, value)
    return type(value), value


class Live(TorchDispatchMode):
    """`peak`: the largest sum of bytes of storages that were made inside and not yet freed."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.where = ""
        self.known: dict[int, Any] = {}
        self.made: dict[Any, tuple[Any, ...]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        before = {id(tensor.untyped_storage()) for tensor in tensors}
        result = self.remembered(func, tensors, args, kwargs or {})
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.note(leaf.untyped_storage(), before, str(func))
        return result

    def remembered(self, func: Any, tensors: list[torch.Tensor], args: Any, kwargs: Any) -> Any:
        """What `func` gives; a new meta tensor like the last one, where it made one of the same from the same."""
        schema = func._schema
        views = any(one.alias_info for one in (*schema.arguments, *schema.returns))
        if views or len(schema.returns) != 1 or not tensors or not all(tensor.is_meta for tensor in tensors):
            return func(*args, **kwargs)
        key = (func, likeness(args), likeness([*kwargs.items()]))
        if key not in self.made:
            result = func(*args, **kwargs)
            if not isinstance(result, torch.Tensor) or not result.is_meta:
                return result
            self.made[key] = likeness(result)
            return result
        _, size, stride, dtype = self.made[key]
        return torch.empty_strided(size, stride, dtype=dtype, device="meta")

    def note(self, storage: torch.UntypedStorage, before: set[int], where: str) -> None:
        key = id(storage)
        if key in self.known or key in before:
            return
        size = storage.nbytes()
        self.known[key] = weakref.ref(storage, lambda _: self.gone(key, size))
        self.now += size
        if self.now > self.peak:
            self.peak, self.where = self.now, where

    def gone(self, key: int, size: int) -> None:
        self.known.pop(key, None)
        self.now -= size


def coding_peaks(vae: Any, latents: torch.Tensor, pixels: torch.Tensor, tile: bool) -> tuple[int, int]:
    """Most bytes alive while an autoencoder decodes, and while it encodes."""
    with Live() as decoding:
        vae.decode(latents, tile=tile)
    with Live() as encoding:
        vae.encode(pixels, tile=tile)
    return decoding.peak, encoding.peak
