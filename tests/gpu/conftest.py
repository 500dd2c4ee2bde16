"""Triton's kernels run here on the CPU, in Triton's interpreter; where there is a GPU they are compiled and run on it.

The interpreter has to be asked for before Triton is imported. It cuts off what a GPU rounds when it makes 16 or 8 bits
of a float, and multiplies the bits of bfloat16 as if they were whole numbers; both are put right here. And it exchanges
all functions of the language again for every call of a function inside a kernel: once a kernel is enough. It also makes
up every type and shape anew, a third of its time: each is made once.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

GPU = torch.cuda.is_available()
if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"

import numpy as np  # noqa: E402
import triton.language as tl  # noqa: E402
from triton.runtime import interpreter  # noqa: E402

TORCH = {
    tl.float32: torch.float32,
    tl.float16: torch.float16,
    tl.bfloat16: torch.bfloat16,
    tl.float8e4nv: torch.float8_e4m3fn,
}
BITS = {1: np.uint8, 2: np.uint16, 4: np.uint32}


def convert(data, from_, to, rounding=None):
    """Bits of one type of floats to bits of another, to the nearest."""
    size = from_.primitive_bitwidth // 8
    raw = torch.from_numpy(np.frombuffer(data.tobytes(), dtype=BITS[size]).copy())
    values = raw.view(TORCH[from_]).to(TORCH[to])
    size = to.primitive_bitwidth // 8
    return values.view(getattr(torch, f"uint{8 * size}")).numpy().view(BITS[size]).reshape(data.shape)


def dot(self, a, b, d, input_precision, max_num_imprecise_acc):
    a_data, b_data = (
        convert(x.data, x.dtype.scalar, tl.float32).view(np.float32) if x.dtype.scalar in TORCH else x.data
        for x in (a, b)
    )
    return interpreter.TensorHandle(np.matmul(a_data, b_data, dtype=d.data.dtype) + d.data, d.dtype.scalar)


class Patches:
    """What the interpreter exchanges, once for all that a kernel calls."""

    def __init__(self):
        self.real, self.done = interpreter._patch_lang, set()

    def __call__(self, fn):
        wanted = {value.__name__ for value in fn.__globals__.values() if value is tl or value is tl.core}
        if wanted <= self.done:
            return None  # nobody puts back what a function inside a kernel exchanged
        scope = self.real(fn)
        self.done |= wanted
        back = scope.restore

        def restore():
            self.done.clear()
            back()

        scope.restore = restore
        return scope


def remembered(kind: type, key: Callable[..., Any], *own: str) -> Callable[..., None]:
    """An `__init__` that copies what it made of the like before, but for the attributes that are each one's own."""
    init, kept = kind.__init__, {}

    def quick(self, *given, **named):
        known = key(*given, **named)
        if known in kept:
            vars(self).update(kept[known])
            vars(self).update(zip(own, given, strict=False))
        else:
            init(self, *given, **named)
            kept[known] = dict(vars(self))

    return quick


def by_name(ask: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A question about a type that is asked once."""
    kept: dict[str, Any] = {}

    def answer(kind):
        if kind.name not in kept:
            kept[kind.name] = ask(kind)
        return kept[kind.name]

    return answer


NUMPY_TYPE = by_name(interpreter._get_np_dtype)
TENSOR = remembered(tl.core.tensor, lambda handle, type: type.name, "handle", "type")
BLOCK = remembered(
    tl.core.block_type, lambda of, shape: (of.name, *(getattr(s, "value", s) for s in shape)), "element_ty"
)


@pytest.fixture(autouse=True)
def rounding(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The interpreter computes as a GPU does."""
    if not GPU:
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        monkeypatch.setattr(interpreter, "_convert_float", convert)
        monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", dot)
        monkeypatch.setattr(interpreter, "_patch_lang", Patches())
        monkeypatch.setattr(interpreter, "_get_np_dtype", NUMPY_TYPE)
        monkeypatch.setattr(tl.core.tensor, "__init__", TENSOR)
        monkeypatch.setattr(tl.core.block_type, "__init__", BLOCK)
    yield


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda", 0) if GPU else torch.device("cpu")
