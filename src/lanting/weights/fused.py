"""Two Linears that a file keeps as one: 2.1's feed-forward in ComfyUI's files, whose gate and value share their input.

Rows of a matrix lie one behind the other in a file, so each half is a tensor of its own at its own place: nothing is
read or copied. Scales of whole weights belong to both halves, scales of rows are parted as well.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from lanting.core.errors import ModelError
from lanting.weights.checkpoint import Checkpoint
from lanting.weights.headers import TensorInfo

FUSED = ".img_mlp.gate_up."
HALVES = (".img_mlp.gate_layer.", ".img_mlp.proj.")  # in this order, top to bottom


def parted(checkpoint: Checkpoint) -> Checkpoint:
    """The same tensors with every fused one as its two halves. Raises ModelError where one has no halves."""
    stems = {name: name.partition(FUSED)[0] + FUSED for name in checkpoint.infos if FUSED in name}
    if not stems:
        return checkpoint
    infos, where, layers = dict(checkpoint.infos), dict(checkpoint.where), dict(checkpoint.layers)
    for name, stem in stems.items():
        info, place, weight = infos.pop(name), where.pop(name), checkpoint.infos.get(f"{stem}weight")
        rows = weight.shape[0] if weight is not None and weight.shape else 0  # where it is missing, loading says so
        for half, part in zip(HALVES, halves(checkpoint, name, info, rows), strict=True):
            ours = name.replace(FUSED, half)
            infos[ours], where[ours] = part, place
    for stem in set(stems.values()):
        if (note := layers.pop(stem.rstrip("."), None)) is not None:
            layers |= {stem.replace(FUSED, half).rstrip("."): note for half in HALVES}
    return replace(checkpoint, infos=infos, where=where, layers=layers)


def halves(checkpoint: Checkpoint, name: str, info: TensorInfo, rows: int) -> Iterator[TensorInfo]:
    """Upper and lower half of a tensor that has a row for each output; all of any other, twice."""
    if not info.shape or info.shape[0] != rows:
        yield from (info, info)
        return
    if rows % 2 or info.size % 2:
        raise ModelError(
            "the {label} has {name} of shape {shape}, which has no halves: get another",
            **{"label": checkpoint.label, "name": name, "shape": info.shape},
        )
    middle, shape = info.start + info.size // 2, (rows // 2, *info.shape[1:])
    yield replace(info, shape=shape, end=middle)
    yield replace(info, shape=shape, start=middle)
