"""Packed weights of every kind for the kernels' tests, and what results must be, from integers in plain torch."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from lanting.kernels import calls
from lanting.kernels import library as lib
from lanting.kernels.build import compiler
from lanting.kernels.calls import Packed, Rounded
from lanting.nn.linears import GgufLinear, Int4Linear, Int8Linear, PackedLinear
from lanting.weights.kquants import quantize

SETS = lib.known_sets()  # the best first; empty where there is no compiler
INT8 = {"int8": 0, "int8 of 16": 16, "int8 of 48": 48, "int8 of 64": 64}
INT4 = {f"int4 of {group}": group for group in (16, 32, 64, 128)}
GGUF = {"Q4_0": 32, "Q8_0": 32, "Q4_K": 256, "Q6_K": 256}
KINDS = (*INT8, *INT4, *GGUF)


@contextmanager
def using(name: str) -> Iterator[None]:
    """Another instruction set for a while. Rounded rows must not leave: each set lays them out in its own way."""
    before = lib.instruction_set()
    lib.use(name)
    try:
        yield
    finally:
        lib.use(before)


def columns_of(name: str, least: int) -> int:
    """At least so many, as the kind can have them; not whole chunks of 64 where it allows that."""
    step = {**INT8, **INT4, **GGUF}[name] or 1
    return -(-least // step) * step


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@cache
def linear(name: str, rows: int, columns: int) -> PackedLinear:
    """A weight whose rows and groups differ in size; the last row is nothing but zeros."""
    dense = random(rows, columns, seed=rows) * 10.0 ** random(rows, 1, seed=columns)
    dense[:, : columns // 3] *= 0.1
    dense[-1] = 0
    return pack(name, dense)


def pack(name: str, dense: Tensor) -> PackedLinear:
    if name in INT8:
        return Int8Linear.from_dense(dense, group=INT8[name])
    if name in INT4:
        scales = torch.float16 if INT4[name] == 32 else torch.bfloat16
        return Int4Linear.from_dense(dense, group=INT4[name], scales=scales)
    return GgufLinear.from_packed(quantize(dense, name), name, dense.shape[1])


def weight(name: str, rows: int, columns: int) -> tuple[Packed, Tensor]:
    """As kernels read it, and the values it stands for."""
    found = linear(name, rows, columns)
    scale = None if name in GGUF else found.weight_scale
    made = calls.packed(found.kind, found.weight, scale, columns)  # type: ignore[arg-type]
    assert made is not None
    return made, found.values(torch.float32)


def codes_of(x: Rounded) -> Tensor:
    """Rounded rows as integers (rows, columns), whatever their layout: what ones on a diagonal make of them."""
    size = x.columns
    ones = calls.packed("int8", torch.eye(size, dtype=torch.int8), torch.ones(size, 1), size)
    assert ones is not None
    scaled = calls.product(x, ones, torch.empty(x.rows, size)).double()
    codes = scaled / x.scale.double().clamp(min=1e-30)[:, None]
    assert ((codes - codes.round()).abs() < 1e-4).all()
    return codes.round().long()


def exact(x: Rounded, weight: Packed, bias: Tensor | None = None, codes: Tensor | None = None) -> Tensor:
    """The product (rows, W's rows) in float64, its sums whole numbers, of which float64 loses none. `codes` where they
    are known: finding them takes columns times columns."""
    sums = (codes_of(x) if codes is None else codes).double() @ calls.expanded(weight).double().T
    out = sums * x.scale.double()[:, None] * (weight.bound.double() / 127)
    return out if bias is None else out + bias.double()


def sanitizer(name: str) -> str:
    """Where the runtime of one of the compiler's sanitizers is ("libasan.so"); "" where there is none."""
    if (command := compiler()) is None:
        return ""
    asked = subprocess.run([*command, f"-print-file-name={name}"], capture_output=True, text=True)
    found = asked.stdout.strip()
    return found if asked.returncode == 0 and Path(found).is_absolute() else ""
