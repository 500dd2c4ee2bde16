"""What the CPU's kernels make of a Linear or a norm, once for each: the weight as they read it, a bias in float32.

It is kept in the module's own dictionary, where no state_dict looks, and found anew where the weight moved.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lanting.kernels import calls, library
from lanting.kernels.calls import Packed
from lanting.nn.linears import GgufLinear, Int4Linear, Int8Linear

KEPT = ("bound", "bias in float32", "weight in float32", "affine", "whole")


def packed(linear: nn.Module, dtype: torch.dtype | None = None) -> Packed | None:
    """The weight of a Linear as the kernels read it, None where they can't. A row's bound is found once: weights that
    stream come back the same. Plain ones only for activations in a `dtype` that is given."""
    if type(linear) is nn.Linear:
        return calls.dense(linear.weight, dtype) if dtype is not None else None
    if isinstance(linear, Int8Linear | Int4Linear):
        data, scale = linear.weight, linear.weight_scale
        scale = scale[:, None] if scale is not None and scale.ndim == 1 else scale
    elif isinstance(linear, GgufLinear):
        data, scale = linear.weight, None
    else:
        return None
    bound = linear.__dict__.get("bound")
    found = calls.packed(linear.kind, data, scale, linear.in_features, bound)
    if found is not None and bound is None:
        linear.__dict__["bound"] = found.bound
    return found


def floats(module: Any, name: str) -> Tensor | None:
    """A bias or a norm's weight in float32, made once: like bounds, it comes back the same."""
    x = getattr(module, name)
    if x is None or x.dtype == torch.float32:
        return x
    kept = module.__dict__.get(f"{name} in float32")
    if kept is None:
        kept = module.__dict__[f"{name} in float32"] = x.detach().float().contiguous()
    return kept


@dataclass(frozen=True, slots=True)
class Affine:
    """A Linear for C. It says where tensors lie and keeps none of them, so that streamed weights can go; a copy of the
    module makes its own."""

    at: object = None
    struct: Any = None
    dense: bool = False

    def __deepcopy__(self, memo: object) -> Affine:
        return Affine()


def lying(module: nn.Module) -> Iterator[tuple[Any, str, int]]:
    """A Linear's or a norm's tensors: the table, the name there, where it lies. A packed weight is a buffer, and its
    bias may be a parameter all the same."""
    for own in (module._parameters, module._buffers):
        for name, x in own.items():
            if x is not None:
                yield own, name, x.data_ptr()


def addresses(module: nn.Module) -> dict[str, int]:
    """Where a Linear's tensors lie."""
    return {name: at for _, name, at in lying(module)}


def affine(linear: Any, dtype: torch.dtype) -> Affine | None:
    """A Linear as part of a larger call, for activations in `dtype`; None where kernels can't multiply it as it is."""
    if getattr(linear, "weight", None) is None:  # a LoRA around a Linear
        return None
    kept, at = linear.__dict__.get("affine"), (dtype, addresses(linear))
    if kept is None or kept.at != at:
        found = packed(linear, dtype) if not getattr(linear, "rotate", 0) else None
        if found is None:
            return None
        bias = floats(linear, "bias")
        struct = library.Affine(found.struct(), None if bias is None else bias.data_ptr())
        kept = linear.__dict__["affine"] = Affine(at, struct, found.dense)
    return kept
