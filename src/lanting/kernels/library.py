"""Loading the compiled kernels and how many threads they get.

The library is plain C++ behind a C interface and knows neither Python nor torch: tensors are handed over as addresses.
`LANTING_KERNELS` may name the instruction set to be used ("avx2", say), or "off". Nothing here imports torch, so that
rooms without it may ask.
"""

from __future__ import annotations

import ctypes
import os
import warnings
from ctypes import c_char_p, c_float, c_int, c_int32, c_int64, c_void_p
from functools import cache
from pathlib import Path
from typing import ClassVar

from lanting.kernels.build import LIBRARY, whole

ABI = 7
OFF = ("off", "0", "no")


class Matrix(ctypes.Structure):
    """See csrc/abi.h, as for all structures here."""

    _fields_: ClassVar = [
        ("data", c_void_p),
        ("rows", c_int64),
        ("columns", c_int64),
        ("stride", c_int64),
        ("period", c_int64),
        ("item_stride", c_int64),
        ("type", c_int32),
    ]


class PerRow(ctypes.Structure):
    _fields_: ClassVar = [
        ("data", c_void_p),
        ("stride", c_int64),
        ("period", c_int64),
        ("split", c_int64),
        ("each", c_int32),
    ]


class Codes(ctypes.Structure):
    _fields_: ClassVar = [
        ("data", c_void_p),
        ("scale", c_void_p),
        ("sum", c_void_p),
        ("rows", c_int64),
        ("columns", c_int64),
        ("type", c_int32),
        ("stride", c_int64),
    ]


class Weight(ctypes.Structure):
    _fields_: ClassVar = [
        ("data", c_void_p),
        ("scale", c_void_p),
        ("bound", c_void_p),
        ("rows", c_int64),
        ("columns", c_int64),
        ("row_bytes", c_int64),
        ("group", c_int64),
        ("kind", c_int32),
        ("scale_type", c_int32),
    ]


class Result(ctypes.Structure):
    _fields_: ClassVar = [("to", Matrix), ("bias", c_void_p), ("gate", PerRow), ("mode", c_int32)]


class Attention(ctypes.Structure):
    _fields_: ClassVar = [
        *((name, c_void_p) for name in ("q", "k", "v", "out", "mask")),
        *((name, c_int64) for name in ("items", "tokens", "keys", "heads", "width", "masked")),
        ("type", c_int32),
    ]


class Turn(ctypes.Structure):
    _fields_: ClassVar = [
        *((name, c_void_p) for name in ("q", "k", "cos", "sin", "first_q", "first_k", "rest_q", "rest_k")),
        *((name, c_int64) for name in ("items", "tokens", "heads", "width", "first")),
        ("eps", c_float),
        ("type", c_int32),
    ]


class ConvWeight(ctypes.Structure):
    _fields_: ClassVar = [
        *((name, c_void_p) for name in ("from_", "to")),
        *((name, c_int64) for name in ("in_", "out")),
        *((name, c_int32) for name in ("type", "grow")),
    ]


class Conv(ctypes.Structure):
    _fields_: ClassVar = [
        *((name, c_void_p) for name in ("x", "out", "add", "weight", "bias", "gamma")),
        *((name, c_int64) for name in ("items", "height", "width", "in_", "outs")),
        *((name, c_int32) for name in ("type", "grow")),
    ]


class Affine(ctypes.Structure):
    _fields_: ClassVar = [("weight", Weight), ("bias", c_void_p)]


class Stream(ctypes.Structure):
    _fields_: ClassVar = [
        ("rows", Matrix),
        ("vectors", PerRow),
        ("count", c_int64),
        ("type", c_int32),
        ("in_", Affine * 3),
        *((name, Affine) for name in ("out", "up", "down")),
    ]


class Block(ctypes.Structure):
    _fields_: ClassVar = [
        *((name, Stream) for name in ("txt", "img")),
        ("turn", Turn),
        ("attention", Attention),
        ("room", c_void_p),
    ]


CALLS = {
    "lt_bounds": (Weight, c_void_p),
    "lt_expand": (Weight, c_void_p),
    "lt_quantize": (Matrix, Codes),
    "lt_norm": (Matrix, PerRow, PerRow, Matrix, Codes),
    "lt_product": (Codes, Weight, Result),
    "lt_turn": (Turn,),
    "lt_attend": (Attention,),
    "lt_activate": (Matrix, Result),
    "lt_norm_silu": (Matrix, c_void_p, Matrix, c_int),
    "lt_conv_bytes": (c_int,),
    "lt_conv_weight": (ConvWeight,),
    "lt_convolve": (Conv,),
    "lt_block": (Block,),
    "lt_block_bytes": (Block,),
}


@cache
def library(path: Path = LIBRARY) -> ctypes.CDLL | None:
    """The compiled kernels, or None where they are not built, not whole, do not load or are of another version."""
    if os.environ.get("LANTING_KERNELS", "").lower() in OFF or not whole(path):
        return None
    try:
        found = ctypes.CDLL(str(path))
        if found.lt_abi() != ABI:
            return None
    except (OSError, AttributeError):
        return None
    found.lt_name.restype = found.lt_known.restype = c_char_p
    found.lt_known.argtypes, found.lt_use.argtypes, found.lt_threads.argtypes = [c_int], [c_char_p], [c_int]
    for name, kinds in CALLS.items():
        call = getattr(found, name)
        call.argtypes = [k if k in (c_void_p, c_int) else ctypes.POINTER(k) for k in kinds]
    found.lt_block_bytes.restype = found.lt_codes_bytes.restype = c_int64
    found.lt_codes_bytes.argtypes = [c_int64, c_int64, c_int]
    if (asked := os.environ.get("LANTING_KERNELS", "")) and found.lt_use(asked.lower().encode()):
        warnings.warn(f"LANTING_KERNELS: no {asked} runs here, {found.lt_name().decode()} does", stacklevel=2)
    found.lt_threads(thread_count())
    return found


def ready() -> bool:
    return library() is not None


def dense_bytes() -> int:
    """Of a number of rows that meet plain weights: 2 bfloat16, 4 float32, 0 where those products are torch's."""
    found = library()
    return 0 if found is None else found.lt_dense()


def multiplies_bfloat16() -> bool:
    """Whether the processor does, and kernels that use it are there."""
    return dense_bytes() == 2


def instruction_set() -> str:
    """The one in use, "" where there are no kernels."""
    found = library()
    return "" if found is None else found.lt_name().decode()


def known_sets() -> tuple[str, ...]:
    """Instruction sets that are compiled in and run on this processor, the best first."""
    found, names = library(), []
    while found is not None and (name := found.lt_known(len(names))):
        names.append(name.decode())
    return tuple(names)


def use(name: str) -> None:
    """Use another instruction set, for tests and measurements. Raises ValueError for one that does not run here."""
    found = library()
    if found is None or found.lt_use(name.encode()):
        raise ValueError(f"there are no kernels for {name} here")


def use_threads(count: int) -> None:
    if (found := library()) is not None:
        found.lt_threads(count)


def thread_count() -> int:
    """As many as OMP_NUM_THREADS says, else as there are processors that this process may use."""
    asked = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
    if asked.isdigit() and int(asked) > 0:
        return int(asked)
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(allowed, quota()))


def quota(root: Path = Path("/sys/fs/cgroup")) -> int:
    """Processors' worth of time that the control group allows, rounded up; many where there is no limit."""
    try:
        limit, period = (root / "cpu.max").read_text(encoding="ascii").split()[:2]
        if limit != "max":
            return max(1, -(-int(limit) // int(period)))
    except (OSError, ValueError):
        pass
    try:
        limit, period = (
            int((root / "cpu" / f"cpu.cfs_{name}_us").read_text(encoding="ascii")) for name in ("quota", "period")
        )
        if limit > 0:
            return max(1, -(-limit // period))
    except (OSError, ValueError):
        pass
    return 1 << 16
