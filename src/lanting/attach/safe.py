"""A module run in a safer way than the rest: without kernels, or in a wider kind of number. Undone without a trace.

    plain      by its own definition in PyTorch, no kernel in it or below it
    bfloat16   plain, in a type with the range of float32, for networks in float16
    float32    plain, in float32
Only `forward` is another for as long as it lasts; weights stay where and what they are and are widened for the one
call, so streaming, tables and LoRAs find everything in its place. Streams between two widened blocks stay wide: what
overflows in half precision would overflow again on the way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lanting.attach.modulation import Tabled
from lanting.nn.linears import PackedLinear

WIDE = {"bfloat16": torch.bfloat16, "float32": torch.float32}
WAYS = ("plain", *WIDE)
HALVES = (torch.float16, torch.bfloat16)
MISSING = object()


class Overrides:
    """What was put over modules' own methods, and what was there before."""

    def __init__(self) -> None:
        self.undo: list[tuple[dict[str, Any], str, Any]] = []

    def set(self, module: nn.Module, name: str, value: Any = MISSING) -> None:
        """Another `name` for the instance; without a value that of its class."""
        own: dict[str, Any] = module.__dict__
        self.undo.append((own, name, own.get(name, MISSING)))
        own.pop(name, None)
        if value is not MISSING:
            own[name] = value

    def plain(self, root: nn.Module) -> None:
        """Kernels off, in a module and below it."""
        for module, name in kernels(root):
            self.set(module, name)

    def restore(self) -> None:
        for own, name, old in reversed(self.undo):
            own.pop(name, None)
            if old is not MISSING:
                own[name] = old
        self.undo.clear()


def kernels(root: nn.Module) -> list[tuple[nn.Module, str]]:
    """Where something other than a module's own definition computes, in a module and below it."""
    return [
        (module, name)
        for module in root.modules()
        for name in ("forward", "product")
        if module.__dict__.get(name) is not None and not isinstance(module.__dict__[name], Safe)
    ]


class Safe:
    """In place of a method of a module.

    onward  whether whoever reads the result takes it wide
    ends    it is the last block: what reads its stream is a norm
    """

    def __init__(
        self,
        module: nn.Module,
        way: str,
        method: str = "forward",
        onward: Callable[[], bool] = lambda: False,
        ends: bool = False,
    ):
        self.module, self.way, self.onward, self.ends = module, way, onward, ends
        self.plain = getattr(type(module), method)

    def __call__(self, *args: Any, **more: Any) -> Any:
        dtype = WIDE.get(self.way)
        if dtype is None:
            return self.plain(self.module, *args, **more)
        narrow = next((p.dtype for p in floats(self.module) if p.dtype in HALVES), torch.float32)
        with widened(self.module, dtype):
            out = self.plain(self.module, *cast(args, dtype), **cast(more, dtype))
        return out if self.onward() else narrowed(out, narrow, self.ends)


def floats(root: nn.Module) -> Iterator[Tensor]:
    """Parameters and buffers whose type can be another; packed weights can't, and adapt to their inputs."""
    for module in root.modules():
        if not isinstance(module, PackedLinear):
            every = (*module._parameters.values(), *module._buffers.values())
            yield from (x for x in every if x is not None and x.is_floating_point())


@contextmanager
def widened(root: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """The weights below a module in another type, for one call."""
    kept: list[tuple[dict[str, Any], str, Tensor]] = []
    for module in root.modules():
        if isinstance(module, PackedLinear):
            continue
        tables: list[Any] = [module._parameters, module._buffers]
        for table in (*tables, *([vars(module)] if isinstance(module, Tabled) else [])):
            halves = [(name, x) for name, x in table.items() if isinstance(x, Tensor) and x.dtype in HALVES]
            kept += [(table, name, x) for name, x in halves if x.dtype != dtype]
    for table, name, x in kept:
        wide = x.detach().to(dtype)
        table[name] = nn.Parameter(wide, requires_grad=False) if isinstance(x, nn.Parameter) else wide
    try:
        yield
    finally:
        for table, name, x in kept:
            table[name] = x


def cast(value: Any, dtype: torch.dtype) -> Any:
    """Every floating tensor of half precision in arguments, and a dtype among them, as `dtype`."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, torch.dtype):
        return dtype
    if isinstance(value, tuple | list):
        return type(value)(cast(each, dtype) for each in value)
    if isinstance(value, Mapping):
        return {name: cast(each, dtype) for name, each in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        table = {field.name: getattr(value, field.name) for field in fields(value)}
        angles = {"rope": table["rope"]} if "rope" in table else {}  # float32 in every network
        return replace(value, **cast(table, dtype) | angles)
    return value


def narrowed(value: Any, dtype: torch.dtype, ends: bool = False) -> Any:
    """Results as the network has them: clipped to the range, or, where a norm comes next (which does not see it),
    scaled down as a whole by a power of two."""
    if isinstance(value, tuple):
        return tuple(narrowed(each, dtype, ends and isinstance(each, Tensor)) for each in value)
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.dtype == dtype:
        return value
    if dtype == torch.float16:
        most = torch.finfo(dtype).max
        if ends:
            peak = value.abs().amax(tuple(range(1, value.ndim)), keepdim=True).float()  # (B, 1, 1)
            value = value * torch.exp2(-(2 * peak / most).log2().ceil().clamp(min=0)).to(value.dtype)
        value = value.float().clamp(-most, most)  # in bfloat16 the end of the range would be rounded beyond it
    return value.to(dtype)
