"""A trained transformer made wider without forgetting: more heads, the same answers to begin with.

New channels of the stream are read at random and written with zeros, new heads and hidden units likewise, so they
change nothing until they are trained. Zeros beside the old channels make a layer norm scale its input up by the root
of new / old width; the modulation behind it takes that back. What is left comes from the stream's mean, which is small.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

CHUNKS = {"img_mod.1": 6, "txt_mod.1": 6, "norm_out.linear": 2}  # outputs are so many vectors of the stream's width
GATES = {"img_mod.1": (2, 5), "txt_mod.1": (2, 5)}  # of them: gates, slightly open for new channels or nothing learns
SCALES = {"img_mod.1": (1, 4), "txt_mod.1": (1, 4), "norm_out.linear": (0,)}  # of them: 1 + scale behind a norm
HEADS = ("what", "where", "ink", "drawn", "scene")  # on the transformer's streams
FIXED_OUT = ("proj_out", *(f"{head}.out" for head in HEADS))
FIXED_IN = ("img_in", "txt_in", "timestep_embedder.linear_1")
WRITES = ("img_in", "txt_in", "to_out.0", "to_add_out", "net.2")  # Linears that write to the stream
INTO_TIME = "timestep_embedder.linear_2"


def widen(tensors: Mapping[str, Tensor], old: int, new: int, seed: int = 0) -> dict[str, Tensor]:
    """The state of a `NanoNet` of transformer width `old` as one of width `new`, both multiples of the head size.

    Tensors outside transformer and helper heads are the same. Raises ValueError where `new` is not larger.
    """
    if new <= old:
        raise ValueError(f"a network of width {old} can't be widened to {new}")
    generator = torch.Generator().manual_seed(seed)
    return {name: _wider(name, value, old, new, generator) for name, value in tensors.items()}


def _wider(name: str, value: Tensor, old: int, new: int, generator: torch.Generator) -> Tensor:
    parts = name.split(".")
    module, kind = ".".join(parts[:-1]), parts[-1]
    inside = parts[0] == "transformer" or parts[0] in HEADS
    if not inside or module.endswith(("norm_q", "norm_k", "norm_added_q", "norm_added_k", "txt_norm")):
        return value
    if parts[0] != "transformer" and "norm" in parts:
        keep = (old / new) ** 0.5 if kind == "weight" else 1.0
        return torch.cat([value * keep, value.new_full((new - old,), keep if kind == "weight" else 0.0)])
    chunks = next((n for end, n in CHUNKS.items() if module.endswith(end)), 1)
    fixed = module.endswith(FIXED_OUT)
    rows = value.shape[0] if fixed else value.shape[0] // chunks * new // old
    pieces = [_piece(part, module, rows, old, new, generator) for part in value.chunk(chunks)]
    for i in next((g for end, g in GATES.items() if module.endswith(end) and kind == "bias"), ()):
        pieces[i][old:] = 0.2
    for i in next((s for end, s in SCALES.items() if module.endswith(end)), ()):
        keep = (old / new) ** 0.5
        pieces[i] = pieces[i] * keep + (keep - 1 if kind == "bias" else 0.0)
    return torch.cat(pieces)


def _piece(value: Tensor, module: str, rows: int, old: int, new: int, generator: torch.Generator) -> Tensor:
    """One vector's worth of a Linear: weight (r, c) or bias (r,) with `rows` rows."""
    own = value.shape[0]
    if value.ndim == 1:
        return torch.cat([value, value.new_zeros(rows - own)])
    columns = value.shape[1] if module.endswith(FIXED_IN) else value.shape[1] * new // old
    grown = torch.randn(rows, columns, generator=generator).to(value) * columns**-0.5
    if module.endswith(WRITES):
        grown.zero_()  # new heads and hidden units say nothing yet, and nothing is written to new channels
    if module.endswith(INTO_TIME) or module.endswith(tuple(CHUNKS)):
        grown[:own, value.shape[1] :] = 0.0
    if module.endswith(tuple(CHUNKS)):
        grown[own:] = 0.0
    grown[:own, : value.shape[1]] = value
    return grown


__all__ = ["widen"]
