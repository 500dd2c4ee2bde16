"""Linears on a GPU: rows that are laid out once for all that read them, and products of whatever kind a weight is.

    Int8Linear          int8 times int8, a scale for each row of either
    Fp8Linear, e4m3     e4m3 times e4m3, likewise
    Int4Linear          16 bits times 4; or int8 times 4 where that is asked for
    AffineLinear, 4     16 bits times 4, and what its offsets add
    nn.Linear           torch's own; or a copy in 8 bits, made once, where that is asked for
    everything else     as its class defines it
A LoRA is added to what its base computes. What is made of a weight for a product is kept with the module for as long as
the weight is the same tensor: streamed weights leave nothing behind.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lanting.attach.offsets import on_gpu, with_offsets
from lanting.kernels.gpu.here import available, has_floats, on
from lanting.kernels.gpu.products import Weight, four_bit, four_by_eight, gelu_by_torch, product, with_gelu
from lanting.kernels.gpu.rows import Gated, activate, join_norm, norm, quantize
from lanting.kernels.gpu.twins import FP8, Codes, Form, Sums, parted
from lanting.nn.affine import AffineLinear
from lanting.nn.linears import Fp8Linear, Int4Linear, Int8Linear, PackedLinear
from lanting.nn.lora import LoraLinear
from lanting.nn.rotate import largest_block, rotate_blocks

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FEWEST = 16  # rows outside of blocks below which a weight is expanded, and exact
MADE = ("gpu scale", "gpu scale in full", "gpu copy")  # what is kept with a module


@dataclass(frozen=True, slots=True)
class How:
    """What may be computed in fewer bits than it is stored in."""

    plain: torch.dtype | None = None  # plain Linears of blocks: int8, e4m3, or None: as they are
    rotate: int = 0  # the largest block in which those, and what they read, are rotated first
    four: torch.dtype | None = None  # activations that meet 4-bit weights: int8, or None: as they are


def kept(module: nn.Module, name: str, source: Tensor, make: Callable[[Tensor], Any]) -> Any:
    """make(source), remembered with the module while `source` is the same tensor."""
    found = module.__dict__.get(name)
    if found is None or found[0]() is not source:
        found = module.__dict__[name] = (weakref.ref(source), make(source))
    return found[1]


def forget(module: nn.Module) -> None:
    """Drop what was made of a module's weights."""
    for name in MADE:
        module.__dict__.pop(name, None)


def weight_of(linear: nn.Module, how: How, device: torch.device) -> tuple[Weight, torch.dtype | None] | None:
    """A Linear's weight as products take it, and what activations become; None where it computes by itself."""
    if isinstance(linear, Int4Linear):
        fits = linear.weight.is_contiguous() and linear.weight_scale.is_contiguous()
        whole = linear.group in (64, 128) and how.four is not None
        return (Weight(linear.weight, linear.weight_scale), how.four if whole else None) if fits else None
    if isinstance(linear, Int8Linear | Fp8Linear):
        form = linear.weight.dtype
        scale = row_scales(linear) if form == torch.int8 or (form == FP8 and has_floats(device)) else None
        return None if scale is None else (Weight(linear.weight, scale), form)
    if type(linear) is nn.Linear and how.plain is not None and (how.plain != FP8 or has_floats(device)):
        rows, depth = linear.weight.shape
        if rows % 16 == 0 and depth % 16 == 0:
            return kept(linear, "gpu copy", linear.weight, lambda w: rounded(w, how)), how.plain
    return None


def turn_of(linear: nn.Module, how: How) -> int:
    """The block in which a Linear's weight is rotated; 0: not at all."""
    if type(linear) is nn.Linear and how.plain is not None and how.rotate:
        return largest_block(linear.in_features, how.rotate)
    return getattr(linear, "rotate", 0)


def rounded(weight: Tensor, how: How) -> Weight:
    """A plain weight in 8 bits."""
    assert how.plain is not None
    turn = largest_block(weight.shape[1], how.rotate) if how.rotate else 0
    codes = quantize(rotate_blocks(weight.detach().float(), turn) if turn else weight.detach(), how.plain)
    return Weight(codes.data, codes.scale.flatten())


def row_scales(linear: Int8Linear | Fp8Linear) -> Tensor | None:
    """One scale (out,) float32 for each row; None where a row has several."""
    rows, scale = linear.out_features, linear.weight_scale
    if scale is None:
        return kept(linear, "gpu scale", linear.weight, lambda w: torch.ones(rows, device=w.device))
    if scale.numel() == 1:
        return kept(linear, "gpu scale in full", scale, lambda s: s.float().reshape(1).expand(rows).contiguous())
    if scale.shape not in ((rows,), (rows, 1)):
        return None
    if scale.dtype == torch.float32 and scale.is_contiguous():
        return scale.flatten()
    return kept(linear, "gpu scale in full", scale, lambda s: s.float().flatten().contiguous())


Vectors = tuple[Tensor | None, Tensor]  # shift, if there is one, and scale behind a norm


class Rows:
    """Rows (B, n, D) that several Linears read: each form of them is made when first asked for, and once."""

    def __init__(self, x: Tensor, vectors: Vectors | None = None, split: int = 0, eps: float = 1e-6):
        self.x, self.vectors, self.split, self.eps = x, vectors, split, eps
        self.forms: dict[tuple[torch.dtype | None, int], Any] = {} if vectors else {(None, 0): x}

    @classmethod
    def of(cls, x: Tensor, made: Tensor | Codes, form: Form) -> Rows:
        """Rows that are there already, in one form."""
        rows = cls(x)
        rows.forms = {parted(form): made}
        return rows

    def plain(self) -> Tensor:
        """In the network's dtype, normed and modulated."""
        return self.laid(None, 0)

    def laid(self, form: torch.dtype | None, rotate: int) -> Any:
        """`Codes` in 8 bits, or as they are for None; behind a rotation if there is one."""
        key = (form, rotate)
        if key not in self.forms:
            if (None, 0) in self.forms:
                self.forms[key] = activate(self.forms[None, 0], form=key)
            else:
                assert self.vectors is not None
                self.forms[key] = norm(self.x, *self.vectors, self.split, key, self.eps)
        return self.forms[key]


def form_of(linear: nn.Module, how: How, device: torch.device) -> Form:
    """What the only reader of some rows wants them as; None: as they are."""
    found = weight_of(linear, how, device)
    form = (None, 0) if found is None else (found[1], turn_of(linear, how))
    return None if form == (None, 0) else form


def form_for(readers: Sequence[nn.Module], how: How, device: torch.device) -> Form:
    """What all readers of some rows want them as; None, from which everything can be made, where they differ."""
    wanted = {form_of(reader, how, device) for reader in readers}
    return wanted.pop() if len(wanted) == 1 else None


def project(linear: nn.Module, rows: Rows, how: How, out: Tensor | None = None) -> Tensor | Sums:
    """The Linear of the rows (B, n, W), in `out` (n, W) if that is given and serves."""
    if isinstance(linear, LoraLinear) and not len(linear.changes):
        thin = F.linear(rows.plain(), linear.down)
        added = F.linear((thin * linear.scales).to(thin.dtype), linear.up)
        return whole(project(linear.base, rows, how), added.dtype) + added
    dtype, rotate, found = rows.x.dtype, turn_of(linear, how), weight_of(linear, how, rows.x.device)
    if found is None:
        return by_itself(linear, rows.plain(), out)
    weight, form = found
    bias: Any = linear.bias
    if not isinstance(linear, Int4Linear):
        assert form is not None
        return product(rows.laid(form, rotate), weight, bias, dtype, out)
    if form is not None:
        return four_by_eight(rows.laid(form, rotate), weight, bias, dtype)
    return four_bit(rows.laid(None, rotate), weight, bias)


def by_itself(linear: Any, x: Tensor, out: Tensor | None) -> Tensor:
    """torch's product, straight to its place where there is one."""
    if out is None or type(linear) is not nn.Linear or linear.weight.dtype != x.dtype:
        return linear(x)
    rows = x.reshape(-1, x.shape[-1])
    if linear.bias is None:
        return torch.mm(rows, linear.weight.T, out=out)
    return torch.addmm(linear.bias, rows, linear.weight.T, out=out)


def ends_with_gelu(linear: nn.Module, how: How, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch multiplies a Linear and ends with a GELU, in one."""
    if type(linear) is not nn.Linear or linear.bias is None or linear.weight.dtype != dtype:
        return False
    return weight_of(linear, how, device) is None and gelu_by_torch(device, dtype)


def raised(linear: Any, rows: Rows, how: How, form: Form) -> Tensor | Codes:
    """gelu(the Linear of the rows), as their reader wants it."""
    device, dtype = rows.x.device, rows.x.dtype
    if form is None and ends_with_gelu(linear, how, device, dtype):
        return with_gelu(rows.plain(), linear.weight, linear.bias)
    made = project(linear, rows, how)
    place = None if form is not None or isinstance(made, Sums) else made
    return activate(made, gelu=True, form=form, out=place, dtype=dtype)


def into(linear: nn.Module, rows: Rows, out: Tensor, how: How) -> None:
    """out (B, n, W) = the Linear of the rows; `out` may be part of a larger tensor."""
    place = out[0] if len(out) == 1 else None
    made = project(linear, rows, how, place)
    if isinstance(made, Sums):
        activate(made, out=out)
    elif made is not place:
        out.copy_(made)


def whole(made: Tensor | Sums, dtype: torch.dtype) -> Tensor:
    return activate(made, dtype=dtype) if isinstance(made, Sums) else made


def joined(
    made: Tensor | Sums, gated: Gated, vectors: Vectors, readers: Sequence[nn.Module], how: How, eps: float = 1e-6
) -> tuple[Tensor, Rows]:
    """(x, its normed rows) for x = base + gate * what a Linear made; `readers` are the Linears that read the rows."""
    if isinstance(made, Sums):
        x = activate(made, gated=gated)
        return x, Rows(x, vectors, gated.split, eps)
    form = form_for(readers, how, made.device)
    x, normed = join_norm(made, gated, *vectors, form, eps)
    return x, Rows.of(x, normed, form)


def graded(module: nn.Module, *given: Tensor) -> bool:
    """Whether gradients are wanted, which kernels don't have."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in (*given, *module.parameters()))


def product_of(how: How, linear: PackedLinear, x: Tensor) -> Tensor:
    """x W^T + b of a packed Linear wherever it is; as defined where that is no gain."""
    if isinstance(linear, AffineLinear):
        return with_offsets(linear, x, on_gpu)
    rows = x.numel() // max(1, x.shape[-1])
    if rows < FEWEST or x.dtype not in DTYPES or weight_of(linear, how, x.device) is None or x.requires_grad:
        return linear.plain(x)
    if isinstance(linear, Int4Linear) and not available(x.device):
        return linear.plain(x)
    flat = x.reshape(1, rows, x.shape[-1])
    with on(x.device):
        return whole(project(linear, Rows(flat), how), x.dtype).reshape(*x.shape[:-1], linear.out_features)
