"""What bitsandbytes writes beside its weights, told from headers and small notes, without torch.

diffusers and transformers save a quantized model with the package's own tensors. A weight of 4 bits is a column of
bytes whose shape says nothing; what it was is JSON in a tensor of bytes. A weight of 8 bits keeps its shape and has one
number for each row: the row's largest, 127 of the stored numbers.
"""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

from lanting.core.errors import ModelError
from lanting.weights.form import Form

if TYPE_CHECKING:
    from lanting.weights.checkpoint import Checkpoint

ROWS = "SCB"  # beside a weight of 8 bits
NOTES = {f"quant_state.bitsandbytes__{kind}": kind for kind in ("nf4", "fp4")}  # behind "X.weight."
PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
SIDES = (*(f"weight.{part}" for part in (*PARTS, *NOTES)), ROWS, "weight_format")  # what is no part of the network


def four_bits(checkpoint: Checkpoint, path: str) -> Form | None:
    """How the weight of `path` is stored, None where no note of bitsandbytes stands beside it. Raises ModelError for a
    note that can't be, or whose parts are not there."""
    name = next((name for note in NOTES if (name := f"{path}.weight.{note}") in checkpoint.infos), None)
    if name is None:
        return None
    try:
        note: dict[str, Any] = json.loads(checkpoint.raw(name))
        rows, columns = (int(side) for side in note["shape"])
        nested = (int(note["nested_blocksize"]), float(note["nested_offset"])) if "nested_blocksize" in note else None
        parts = PARTS if nested is not None else PARTS[:2]
        names = {"weight": f"{path}.weight"} | {part: f"{path}.weight.{part}" for part in parts}
        kind, group = str(note["quant_type"]), int(note["blocksize"])
        found = Form(kind, (rows, columns), group=group, nested=nested, names=names)
        if min(rows, columns, found.group) < 1 or found.kind not in NOTES.values() or not _fits(checkpoint, found):
            raise ValueError
    except (ValueError, KeyError, TypeError, RecursionError, OverflowError):
        raise ModelError(
            "the {label} says in {name} what can't be read: download it again", label=checkpoint.label, name=name
        ) from None
    return found


def in_rows(checkpoint: Checkpoint, path: str) -> bool:
    """Whether a weight of 8 bits is stored row by row; older versions had layouts of single GPUs."""
    name = f"{path}.weight_format"
    return name not in checkpoint.infos or not any(checkpoint.raw(name))


def _fits(checkpoint: Checkpoint, found: Form) -> bool:
    """Whether weight, scales and tables are there and as many as they must be."""
    values = math.prod(found.shape)
    scales = -(-values // found.group)
    counts = [values // 2, scales, 16]
    dtypes = ["U8", "F32" if found.nested is None else "U8", "F32"]
    if found.nested is not None:
        if found.nested[0] < 1 or not math.isfinite(found.nested[1]):
            return False
        counts, dtypes = [*counts, -(-scales // found.nested[0]), 256], [*dtypes, "F32", "F32"]
    infos = [checkpoint.infos.get(name) for name in found.names.values()]
    there = [(None, "") if info is None else (info.count, info.dtype) for info in infos]
    return values % 2 == 0 and there == list(zip(counts, dtypes, strict=True))
