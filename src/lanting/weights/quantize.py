"""Safetensors files of our own: a component packed tensor by tensor and written as it goes.

A form fixes what a tensor will measure, so the header is written first and memory holds one weight and its packed form
at most. The file gets its name when it is complete; a run that is killed leaves a hidden `.part` and nothing else.
fp8 and int8 are written as ComfyUI reads them; int4 is ours. The recipe and the config stand in the header.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lanting.core.errors import ModelError
from lanting.core.files import writing
from lanting.core.lang import Phrase
from lanting.weights.checkpoint import LAYER_NOTES, Checkpoint
from lanting.weights.form import Form
from lanting.weights.forms import read_forms, shapes
from lanting.weights.headers import BITS, read_header
from lanting.weights.kinds import ZERO_COND_T
from lanting.weights.single import OWN_NOTES
from lanting.weights.stored import Choose, Placing, expand, loaded, pack

FORMATS = {"int8": "int8_tensorwise", "int4": "lanting_int4", "fp8 e4m3": "float8_e4m3fn", "fp8 e5m2": "float8_e5m2"}
STORED = {"int8": "I8", "int4": "U8", "fp8 e4m3": "F8_E4M3", "fp8 e5m2": "F8_E5M2"}
FEW = 1024  # values; vectors this short keep float32 where they have it
Report = Callable[[int, int], None]
"""Called with bytes written and bytes in all."""


@dataclass(frozen=True)
class Entry:
    """One tensor to be written: what it measures, and its bytes when its turn comes."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        count = 1
        for side in self.shape:
            count *= side
        return count * BITS[self.dtype] // 8


@dataclass(frozen=True)
class Source:
    """One weight of the model: where its values are, and what they become."""

    name: str
    shape: tuple[int, ...]
    form: Form | None  # None: plain

    def entries(self, dtype: str) -> list[Entry]:
        if self.form is None:
            return [Entry(self.name, dtype, self.shape)]
        path, (rows, columns) = self.name.removesuffix(".weight"), self.form.shape
        width = columns // 2 if self.form.kind == "int4" else columns
        scales = "BF16" if self.form.kind == "int4" else "F32"
        return [
            Entry(self.name, STORED[self.form.kind], (rows, width)),
            Entry(f"{path}.weight_scale", scales, self.form.scale or ()),
        ]


def quantize_safetensors(
    checkpoint: Checkpoint, out: Path, choose: Choose | None, about: Mapping[str, Any], report: Report | None = None
) -> None:
    """A component as one file. What `choose` leaves becomes bfloat16.

    about   noted in the header: `component`, `release`, `to`, `config`
    Raises ModelError for weights that can't be read, OutputError for a place that can't be written.
    """
    stored = read_forms(checkpoint)
    sources = [Source(name, shape, _chosen(choose, name, shape)) for name, shape in shapes(checkpoint).items()]
    plan = [(source, source.entries(_plain_type(checkpoint, source, stored))) for source in sources]
    config = about.get("config") or {}
    if ZERO_COND_T in checkpoint.infos or (config.get("zero_cond_t") and about.get("component") == "transformer"):
        plan.append((Source(ZERO_COND_T, (0,), None), [Entry(ZERO_COND_T, "F32", (0,))]))

    def parts() -> Iterator[Tensor]:
        for source, entries in plan:
            yield from _values(checkpoint, source, entries, stored)

    layers = {source.name.removesuffix(".weight"): _note(source.form) for source, _ in plan if source.form is not None}
    notes = {"format": "pt", OWN_NOTES: json.dumps({"version": 1, **about}, ensure_ascii=False)}
    if layers:
        notes[LAYER_NOTES] = json.dumps({"format_version": "1.0", "layers": layers})
    write_safetensors(out, [entry for _, entries in plan for entry in entries], parts(), notes, report)


def dense_reader(checkpoint: Checkpoint, dtype: torch.dtype = torch.float32) -> Callable[[str], Tensor]:
    """name -> that weight's values as floats, expanded where they are packed; for writers of other formats."""
    stored = read_forms(checkpoint)
    return lambda name: _value(checkpoint, name, stored, dtype)


def _value(checkpoint: Checkpoint, name: str, stored: Mapping[str, Form], dtype: torch.dtype) -> Tensor:
    """One tensor of the network, expanded to `dtype` where it is packed."""
    path, _, part = name.rpartition(".")
    if path in stored and part == "weight":
        return expand(stored[path], checkpoint, Placing(dtype, torch.device("cpu")))
    if path in stored and part in stored[path].names:  # a bias in the layout of its weight
        bias = loaded(stored[path], checkpoint, Placing(dtype, torch.device("cpu"))).bias
        assert bias is not None
        return bias
    return checkpoint.read([name])[name]


def write_safetensors(
    out: Path, entries: list[Entry], parts: Iterable[Tensor], notes: Mapping[str, str], report: Report | None = None
) -> None:
    """A file of these tensors, in their order, under its name only once it is complete and its header checked."""
    table: dict[str, Any] = {"__metadata__": dict(notes)}
    place = 0
    for entry in entries:
        table[entry.name] = {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "data_offsets": [place, place + entry.size],
        }
        place += entry.size
    header = json.dumps(table, ensure_ascii=False, separators=(",", ":")).encode()
    header += b" " * (-(len(header) + 8) % 64)  # data begin where any number may
    total = len(header) + 8 + place
    with writing(out, total) as scratch:
        with scratch.open("wb") as file:
            file.write(struct.pack("<Q", len(header)) + header)
            for entry, tensor in zip(entries, parts, strict=True):
                if tensor.numel():
                    file.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
                if file.tell() > total:
                    raise ModelError("{name} is not what its header says: the model is damaged", name=entry.name)
                if report is not None:
                    report(file.tell(), total)
        read_header(scratch)


def _chosen(choose: Choose | None, name: str, shape: tuple[int, ...]) -> Form | None:
    if choose is None or len(shape) != 2 or not name.endswith(".weight"):
        return None
    return choose(name.removesuffix(".weight"), (shape[0], shape[1]))


def _plain_type(checkpoint: Checkpoint, source: Source, stored: Mapping[str, Form]) -> str:
    """bfloat16; but float16 stays what it is, and so do short vectors in float32."""
    path = source.name.removesuffix(".weight")
    dtype = "" if path in stored and path != source.name else checkpoint.infos[source.name].dtype
    short = len(source.shape) < 2 and checkpoint.infos[source.name].count <= FEW
    return dtype if dtype == "F16" or (dtype == "F32" and short) else "BF16"


def _values(
    checkpoint: Checkpoint, source: Source, entries: list[Entry], stored: Mapping[str, Form]
) -> Iterator[Tensor]:
    """The tensors of `entries`, one source's: packed, or cast."""
    if source.name == ZERO_COND_T:
        yield torch.empty(0)
        return
    values = _value(checkpoint, source.name, stored, torch.float32 if source.form is not None else torch.bfloat16)
    if not values.is_floating_point():
        raise ModelError(
            "the {label} holds {name} as {dtype}, which is no weight type: get another",
            **{"label": checkpoint.label, "name": source.name, "dtype": values.dtype},
        )
    if source.form is None:
        yield values.to({"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}[entries[0].dtype])
        return
    wide = values if values.dtype.itemsize > 1 else values.float()  # torch asks that of no 8-bit floats
    if not torch.isfinite(wide).all():  # a whole row's scale would be no number, or the weight another one
        raise ModelError(
            "{name} can't be written as {kind}: {error}",
            **{"name": source.name, "kind": source.form.kind, "error": Phrase("it has weights that are not finite")},
        )
    linear = pack(source.form, values)
    yield linear.weight
    yield linear.state_dict()["weight_scale"]


def _note(form: Form) -> dict[str, Any]:
    """How ComfyUI (and we) say what a layer is."""
    note: dict[str, Any] = {"format": FORMATS[form.kind]}
    if form.group:
        note["group_size"] = form.group
    if form.rotate:
        note |= {"convrot": True, "convrot_groupsize": form.rotate}
    return note
