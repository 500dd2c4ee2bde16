"""What a safetensors file says it holds, read from its header alone and believed only after checking.

A weights file comes from strangers and travels over cut connections, so each claim is compared with the file:
the header's length with its size, each tensor's shape and dtype with its bytes, all of them together with the
data, which they must cover without a gap or an overlap. Rejected: the safetensors library here, because its
errors do not tell a person what to do; loading still goes through it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lanting.core.errors import ModelError
from lanting.core.lang import Phrase

LARGEST_HEADER = 100_000_000  # bytes; the format's own ceiling
LARGEST_SIZE = 2**60  # elements of one tensor; far above any file, far below what could overflow
BITS = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "C64": 64,
    "F64": 64,
    "I64": 64,
    "U64": 64,
}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a file. `start` and `end` are byte positions in the whole file, `end` exclusive."""

    dtype: str  # the format's own words: "BF16", "F32", ...
    shape: tuple[int, ...]
    start: int
    end: int
    axes: tuple[int, ...] = ()  # which of the file's axes those of `shape` are; (): in the same order

    @property
    def count(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def size(self) -> int:
        """Number of bytes."""
        return self.end - self.start


def read_file(path: Path | str) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Every tensor of a safetensors file in the order of its bytes, and the file's own notes (`__metadata__`, empty
    where it has none). A ModelError says what is wrong."""
    path = Path(path)
    table, begin, size = _read_table(path)
    notes = _notes(path, table.pop("__metadata__", {}))
    found = {name: _tensor(path, name, entry, begin, size) for name, entry in table.items()}
    ordered = dict(sorted(found.items(), key=lambda item: (item[1].start, item[1].end)))
    _check_cover(path, ordered, begin, size)
    return ordered, notes


def read_header(path: Path | str) -> dict[str, TensorInfo]:
    """The tensors of `read_file` alone."""
    return read_file(path)[0]


def read_metadata(path: Path | str) -> dict[str, str]:
    """The notes of `read_file` alone; the tensors are not looked at."""
    path = Path(path)
    return _notes(path, _read_table(path)[0].get("__metadata__", {}))


def _notes(path: Path, notes: Any) -> dict[str, str]:
    if isinstance(notes, dict) and all(isinstance(value, str) for value in notes.values()):
        return notes
    raise damaged(path, "its notes are not a table of texts")


def _read_table(path: Path) -> tuple[dict[str, Any], int, int]:
    """The header as a table, where the data begins, and the file's size."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            first = file.read(8)
            length = int.from_bytes(first, "little")
            if first == b"version ":  # "version https://git-lfs.github.com/spec/v1"
                raise ModelError("{path} is a Git LFS pointer and not the weights: run git lfs pull", path=str(path))
            if len(first) < 8:
                raise damaged(path, "it has only {size} bytes", size=size)
            if length > min(LARGEST_HEADER, size - 8):
                raise damaged(
                    path, "its header claims {length:,} bytes and the file has {size:,}", length=length, size=size
                )
            raw = file.read(length)
    except OSError as error:
        raise unreadable(path, error) from None
    try:
        table = json.loads(raw.decode("utf-8"), object_pairs_hook=_no_twins)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        if isinstance(error, _TwinError):
            raise damaged(path, "its header names the same thing twice") from None
        raise damaged(path, "its header is not JSON") from None
    if not isinstance(table, dict):
        raise damaged(path, "its header is not a table")
    return table, 8 + length, size


class _TwinError(ValueError):
    """The same name twice in one JSON table."""


def _no_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise _TwinError
    return table


def _tensor(path: Path, name: str, entry: Any, begin: int, size: int) -> TensorInfo:
    """One checked entry; positions in the header count from the data's beginning."""
    if not isinstance(entry, Mapping) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise damaged(path, "the entry of {name} has not just dtype, shape and data_offsets", name=name)
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise damaged(path, "{name} has the unknown dtype {dtype}", name=name, dtype=repr(dtype))
    if not _whole_numbers(shape) or math.prod(shape) > LARGEST_SIZE:
        raise damaged(path, "{name} has no usable shape", name=name)
    if not _whole_numbers(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise damaged(path, "{name} has no usable data_offsets", name=name)
    start, end = begin + offsets[0], begin + offsets[1]
    if end > size:
        raise damaged(
            path,
            "{name} ends at byte {end:,} and the file at {size:,}, so it is cut short",
            name=name,
            end=end,
            size=size,
        )
    bits = math.prod(shape) * BITS[dtype]
    if bits != (end - start) * 8:
        raise damaged(
            path,
            "{name} is {dtype} {shape} and can't have {size:,} bytes",
            **{"name": name, "dtype": dtype, "shape": tuple(shape), "size": end - start},
        )
    return TensorInfo(dtype, tuple(shape), start, end)


def _check_cover(path: Path, ordered: Mapping[str, TensorInfo], begin: int, size: int) -> None:
    """In the order of their bytes each begins where the one before ended, and the last one ends the file."""
    place = begin
    for name, info in ordered.items():
        if info.start != place:
            if info.start < place:
                raise damaged(path, "{name} overlaps another tensor", name=name)
            raise damaged(path, "{name} leaves a gap before it", name=name)
        place = info.end
    if place != size:
        raise damaged(path, "{count:,} bytes at its end belong to no tensor", count=size - place)


def _whole_numbers(value: Any) -> bool:
    if not isinstance(value, list) or len(value) > 32:
        return False
    return all(isinstance(n, int) and not isinstance(n, bool) and 0 <= n <= LARGEST_SIZE for n in value)


def unreadable(path: Path, error: OSError) -> ModelError:
    """The sentence for a file that isn't there, or that the system refuses."""
    if isinstance(error, FileNotFoundError):
        return ModelError("{path} does not exist", path=str(path))
    return ModelError("{path} can't be read: {reason}", path=str(path), reason=error.strerror or str(error))


def damaged(path: Path, reason: str, **values: object) -> ModelError:
    """The sentence for a file that contradicts itself, to be raised by the caller; `values` fill the reason."""
    told = Phrase(reason, **values)
    return ModelError("{path} is damaged: {reason}; download it again", path=str(path), reason=told)
