"""Counts the bytes of tensors that are alive while code runs, on any device; on meta it costs no memory.

What it sees is what Python holds: every storage from the operation that made it until it is freed. Scratch memory
inside an operation is not seen.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Live(TorchDispatchMode):
    """`peak`: the largest sum of bytes of storages that were made inside and not yet freed."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.where = ""
        self.known: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {id(leaf.untyped_storage()) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.note(leaf.untyped_storage(), before, str(func))
        return result

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
