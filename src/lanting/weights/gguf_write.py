"""Writing GGUF files: all sizes first, then tensor after tensor, a few thousand rows at a time.

A type fixes a tensor's size, so the header can be written before any weight is read, and memory never holds more than
the tensor that is being read and some rows of its packed form. The file gets its name when it is complete; a run that
is stopped leaves nothing under it.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from lanting.core.errors import ModelError
from lanting.core.files import writing
from lanting.core.lang import Phrase
from lanting.nn.blocks import TYPES
from lanting.weights.gguf import ALIGNMENT, ARRAY, MAGIC, TEXT
from lanting.weights.gguf_mix import MIXES, tensor_bytes, tensor_types
from lanting.weights.kinds import ZERO_COND_T
from lanting.weights.kquants import can_quantize, quantize

ROWS = 1 << 22  # weights packed at a time
FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

Value = str | bool | int | float | Sequence[str] | Sequence[int] | Sequence[float]
Report = Callable[[int, int], None]
"""Called with bytes written and bytes in all."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor to be written: its values are asked for when its turn comes. Values are floats of `shape`, or bytes
    (uint8) that are packed as `kind` already."""

    name: str
    shape: tuple[int, ...]
    kind: str  # of `nn.blocks.TYPES`
    values: Callable[[], Tensor]


def write_transformer(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    read: Callable[[str], Tensor],
    mix: str,
    about: Mapping[str, object],
    report: Report | None = None,
) -> dict[str, str]:
    """A transformer as one GGUF file in one of `gguf_mix.MIXES`.

    shapes  official name -> shape of the values, in the order in which they are to be written
    read    name -> those values, in any floating type, or packed already (uint8) as `tensor_types` says
    about   `config` (transformer/config.json), `release` and `name` are kept, where given

    Returns name -> type. Raises ModelError for weights that can't be written, OutputError for a place that can't.
    """
    config = about.get("config")
    types = tensor_types(shapes, mix)
    entries = [Entry(name, shape, types[name], lambda name=name: read(name)) for name, shape in shapes.items()]
    metadata: dict[str, Value] = {
        "general.architecture": "qwen_image",
        "general.type": "model",
        "general.name": str(about.get("name") or about.get("release") or "qwen-image"),
        "general.quantization_version": 2,
        "general.file_type": MIXES[mix].number,
        "lanting.mix": mix,
    }
    if about.get("release"):
        metadata["lanting.release"] = str(about["release"])
    if isinstance(config, Mapping):
        metadata["lanting.config"] = json.dumps(dict(config), ensure_ascii=False, sort_keys=True)
        if config.get("zero_cond_t") and ZERO_COND_T not in shapes:
            entries.append(Entry(ZERO_COND_T, (1,), "F32", lambda: torch.zeros(1)))
    write_gguf(path, metadata, entries, report)
    return types


def write_gguf(
    path: Path, metadata: Mapping[str, Value], entries: Sequence[Entry], report: Report | None = None
) -> None:
    """A GGUF file of these notes and tensors, under its name only once it is complete.

    `metadata` takes whole numbers as 32 bits, other numbers as float32. Raises ModelError for a tensor that is not
    what its entry says or has values that are not finite, OutputError where the file can't be written.
    """
    header, places, end = layout(metadata, entries)
    with writing(path, end) as part, part.open("wb") as file:
        file.write(header)
        for entry, place in zip(entries, places, strict=True):
            file.write(bytes(place - file.tell()))
            _write_tensor(file, entry, path, end, report)
        file.write(bytes(end - file.tell()))


def layout(metadata: Mapping[str, Value], entries: Sequence[Entry]) -> tuple[bytes, list[int], int]:
    """(the header's bytes, where each tensor begins in the file, the file's size)."""
    pieces = [MAGIC, struct.pack("<IQQ", 3, len(entries), len(metadata))]
    for key, value in metadata.items():
        pieces += [text(key), typed(value)]
    offsets, offset = [], 0
    for entry in entries:
        sides = tuple(reversed(entry.shape))
        pieces += [text(entry.name), struct.pack(f"<I{len(sides)}Q", len(sides), *sides)]
        pieces.append(struct.pack("<IQ", TYPES[entry.kind].code, offset))
        offsets.append(offset)
        offset = aligned(offset + tensor_bytes(entry.shape, entry.kind))
    header = b"".join(pieces)
    begin = aligned(len(header))
    return header, [begin + offset for offset in offsets], begin + offset


def aligned(place: int) -> int:
    """The next place where a tensor may begin."""
    return -(-place // ALIGNMENT) * ALIGNMENT


def text(value: str) -> bytes:
    """A string as the format has it: its length, its bytes."""
    raw = value.encode("utf-8")
    return struct.pack("<Q", len(raw)) + raw


def typed(value: Value) -> bytes:
    """A note's value with its type before it."""
    if isinstance(value, str):
        return struct.pack("<I", TEXT) + text(value)
    if isinstance(value, bool):
        return struct.pack("<I?", 7, value)
    if isinstance(value, int):
        return struct.pack("<II", 4, value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    items = list(value)
    if items and isinstance(items[0], str):
        return struct.pack("<IIQ", ARRAY, TEXT, len(items)) + b"".join(text(str(item)) for item in items)
    kind, form = (6, "f") if any(isinstance(item, float) for item in items) else (5, "i")
    return struct.pack(f"<IIQ{len(items)}{form}", ARRAY, kind, len(items), *items)


def encode(values: Tensor, kind: str) -> Tensor:
    """Values (rows, columns) or (n,) as the bytes of a type, uint8 (n,). Raises ValueError where they don't fit it."""
    if kind in FLOATS:
        cast = values.to("cpu", FLOATS[kind]).contiguous().view(-1)
        if not torch.isfinite(cast).all():
            raise ValueError(Phrase("it has weights that are not finite"))
        return cast.view(torch.uint8)
    return quantize(values, kind).view(-1)


def _write_tensor(file: BinaryIO, entry: Entry, path: Path, end: int, report: Report | None) -> None:
    values = entry.values()
    if values.dtype == torch.uint8 and values.numel() == tensor_bytes(entry.shape, entry.kind):
        file.write(values.contiguous().view(-1).numpy().data)
        if report is not None:
            report(min(file.tell(), end), end)
        return
    if tuple(values.shape) != entry.shape or not values.is_floating_point():
        found = f"{values.dtype} {tuple(values.shape)}"
        raise ModelError(
            "{name} is {found} and should be floats of {shape}: the model is damaged",
            **{"name": entry.name, "found": found, "shape": entry.shape},
        )
    if entry.kind not in FLOATS and not can_quantize(entry.kind):
        raise ModelError(
            "{kind} is a type we read and don't write: choose another for {name}", kind=entry.kind, name=entry.name
        )
    rows = values.reshape(-1, entry.shape[-1]) if entry.shape else values.reshape(1, 1)
    step = max(1, ROWS // max(1, rows.shape[1]))
    for first in range(0, rows.shape[0], step):
        try:
            packed = encode(rows[first : first + step], entry.kind)
        except ValueError as error:
            raise ModelError(
                "{name} can't be written as {kind}: {error}", name=entry.name, kind=entry.kind, error=error.args[0]
            ) from None
        file.write(packed.numpy().data)
        if report is not None:
            report(min(file.tell(), end), end)
