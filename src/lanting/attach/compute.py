"""Native kernels at the three seams, on a CPU: Linears that compute in integers, attention in one pass, fused blocks.

A packed Linear (int8, int4, also with offsets, GGUF's Q4_0, Q8_0, Q4_K, Q6_K) rounds its inputs to int8, row by row,
and multiplies integers; its weight is read as it lies in memory or in a mapped file. A block's plain Linears are the
kernels' in bfloat16, where the processor multiplies that. Where it does not, torch's products in bfloat16 are ten times
slower than those in float32; there all plain Linears are the kernels', which multiply in float32. A block's norms,
modulation, rotary turns, GELU and gates become one pass over memory each, in float32 inside, where torch takes a dozen
in the dtype of the network. Without the kernels, or detached, every bit is as before.

Modules stay where they are, so that streaming, tables and LoRAs find them: only their `forward` is another. The
modulation's packed Linears are left alone: one row a step, and its error would reach everything.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lanting.attach.held import KEPT, floats, packed
from lanting.attach.modulation import Tabled
from lanting.attach.offsets import on_cpu, with_offsets
from lanting.attach.thin import thin_product
from lanting.attach.whole import APART, plan_for, whole_block
from lanting.kernels import calls
from lanting.kernels.calls import Packed, Rounded
from lanting.kernels.library import dense_bytes, ready
from lanting.nn.affine import AffineLinear
from lanting.nn.linears import PackedLinear
from lanting.nn.lowrank import LowRankLinear
from lanting.nn.mmdit import Attend, Block, Context, FeedForward
from lanting.nn.regions import attended
from lanting.nn.rotate import rotate_blocks
from lanting.nn.single_stream import Attend as SingleAttend

DTYPES = (torch.float32, torch.bfloat16)
LEFT_ALONE = ("img_mod", "txt_mod", "time_text_embed")
FEWEST = 16  # rows below which torch's own products are as fast, and exact
FEWEST_DENSE = 4  # rows of plain weights below which torch's are as fast


def attach_kernels(net: nn.Module) -> bool:
    """Let a network on the CPU use the kernels; False where there are none. Undone by `detach_kernels`."""
    if not ready():
        return False
    shared = any(isinstance(module, Block) for module in net.modules())
    for path, module in net.named_modules():
        parts = set(path.split("."))
        if isinstance(module, PackedLinear) and parts.isdisjoint(LEFT_ALONE):
            module.product = integer_product
        elif type(module) is nn.Linear and dense_bytes() == 4:
            in_rows = shared and not parts.isdisjoint((*LEFT_ALONE, "norm_out"))
            product = row_product if in_rows else partial(float_product, shared=shared)
            module.__dict__["forward"] = partial(product, module)
        elif isinstance(module, Attend | SingleAttend):
            module.__dict__["forward"] = partial(attend, module)
        elif isinstance(module, Block):
            module.__dict__["forward"] = partial(fused_block, module)
    return True


def detach_kernels(net: nn.Module) -> None:
    """Every module does its own work again."""
    for module in net.modules():
        for name in KEPT:
            module.__dict__.pop(name, None)
        if isinstance(module, PackedLinear):
            module.product = None
        elif isinstance(module, Attend | SingleAttend | Block | nn.Linear):
            module.__dict__.pop("forward", None)


def integer_product(linear: PackedLinear, x: Tensor) -> Tensor:
    """x W^T + b with x rounded to int8; as defined where that is no gain."""
    if isinstance(linear, AffineLinear):
        return with_offsets(linear, x, on_cpu)
    rows = x.numel() // max(1, x.shape[-1])
    if isinstance(linear, LowRankLinear) and rows >= FEWEST_DENSE:
        return thin_product(linear, x)
    weight = packed(linear) if rows >= FEWEST and x.dtype in DTYPES and x.device.type == "cpu" else None
    if weight is None:
        return linear.plain(x)
    return multiplied(linear, weight, rotate_blocks(x, linear.rotate) if linear.rotate else x)


def float_product(linear: nn.Linear, x: Tensor, shared: bool = False) -> Tensor:
    """x W^T + b in float32, of a weight in bfloat16; torch's where that is no gain. Weights in float32 where steps may
    be `shared`: torch sums other numbers of rows in another order."""
    away = x.device.type != "cpu" or (torch.is_grad_enabled() and (x.requires_grad or linear.weight.requires_grad))
    gains = linear.weight.dtype == torch.bfloat16 and x.numel() >= FEWEST_DENSE * x.shape[-1]
    alike = shared and linear.weight.dtype == torch.float32
    weight = packed(linear, x.dtype) if (gains or alike) and not away else None
    if weight is None:
        return nn.Linear.forward(linear, x)
    return multiplied(linear, weight, x)


def row_product(linear: nn.Linear, x: Tensor) -> Tensor:
    """The same of timesteps and modulations, a row for each picture or step: in float32 torch takes each by itself, as
    it takes one that is alone."""
    if linear.weight.dtype != torch.float32 or x.shape[-1] == x.numel() or torch.is_grad_enabled():
        return float_product(linear, x)
    return torch.cat([nn.Linear.forward(linear, row) for row in x.flatten(0, -2).split(1)]).unflatten(0, x.shape[:-1])


def multiplied(linear: PackedLinear | nn.Linear, weight: Packed, x: Tensor) -> Tensor:
    """x (..., in) times its weight as the kernels read it, plus its bias: (..., out)."""
    out = torch.empty(*x.shape[:-1], linear.out_features, dtype=x.dtype)
    codes = calls.quantize(x.flatten(0, -2).contiguous(), weight.dense)
    calls.product(codes, weight, out.flatten(0, -2), floats(linear, "bias"))
    return out


def attend(module: Attend | SingleAttend, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """`Attend.forward`; masks that differ from query to query (2.1's texts) are left to torch."""
    width = q.shape[-1]
    seen = mask[:, 0, 0] if mask is not None and mask.ndim == 4 and mask.shape[2] == 1 else mask  # (B, T)
    odd = seen is not None and (seen.ndim != 2 or len(seen) != len(q))
    away = q.device.type != "cpu" or q.dtype not in DTYPES or q.dtype != v.dtype
    if odd or away or width % 32 or width > calls.WIDEST:
        plain: Any = type(module).forward
        return plain(module, q, k, v, mask)
    return calls.attend(q, k, v, seen)


def at_its_own(module: Any) -> bool:
    """Whether it is `attend` and nobody listens: what is told to nobody can be part of a larger call."""
    own = getattr(module.__dict__.get("forward"), "func", None) is attend
    return own and not module._forward_hooks and not module._forward_pre_hooks


class Rows:
    """Rows (B, n, D) that several Linears read: each form of them is made when first asked for, and once."""

    def __init__(self, x: Tensor, shift: Tensor | None = None, scale: Tensor | None = None, split: int = 0):
        self.x, self.shift, self.scale, self.split = x, shift, scale, split
        self.forms: dict[object, Rounded] = {}
        self.kept: Tensor | None = x if shift is None else None

    def plain(self) -> Tensor:
        """In the network's dtype, normed and modulated."""
        if self.kept is None:
            assert self.shift is not None and self.scale is not None
            made = calls.norm(self.x, self.shift, self.scale, self.split, rounded=False)
            assert isinstance(made, Tensor)
            self.kept = made
        return self.kept

    def laid(self, linear: nn.Module) -> Rounded:
        """As a Linear's product wants them: int8, behind its rotation if it has one, or dense."""
        rotate = getattr(linear, "rotate", 0)
        dense = not isinstance(linear, PackedLinear)
        if (rotate, dense) not in self.forms:
            if rotate or self.kept is not None:
                x = self.plain()
                made: Any = calls.quantize(rotate_blocks(x, rotate) if rotate else x, dense)
            else:
                assert self.shift is not None and self.scale is not None
                made = calls.norm(self.x, self.shift, self.scale, self.split, rounded=True, dense=dense)
            self.forms[rotate, dense] = made
        return self.forms[rotate, dense]


def project(linear: nn.Module, rows: Rows, out: Tensor, gate: Tensor | None = None, split: int = 0) -> None:
    """out = the Linear of the rows, or out += gate times it; out (B, n, W) may be part of a larger tensor."""
    weight = packed(linear, out.dtype)
    if weight is None:
        y = linear(rows.plain())
        if gate is None:
            out.copy_(y)
        else:
            calls.activate(y, out, gate=gate, split=split)
        return
    calls.product(rows.laid(linear), weight, out, floats(linear, "bias"), gate=gate, split=split)


def feed_forward(mlp: FeedForward, rows: Rows, out: Tensor, gate: Tensor, split: int) -> None:
    """out += gate times D -> 4 D -> GELU -> D of the rows."""
    up: Any = mlp.net[0].proj  # type: ignore[union-attr]
    weight = packed(up, out.dtype)
    if weight is None:
        wide = up(rows.plain())
        calls.activate(wide, wide, gelu=True)
    else:
        wide = torch.empty(*out.shape[:2], up.out_features, dtype=out.dtype)
        calls.product(rows.laid(up), weight, wide, floats(up, "bias"), gelu=True)
    project(mlp.net[2], Rows(wide), out, gate, split)


def vectors(modulation: Any, temb: Tensor, batch: int) -> Tensor:
    """Six vectors in a row (B, 1 or 2, 6 D): shift, scale and gate of attention, then of the MLP."""
    if type(modulation) is Tabled and batch == 1 and temb.shape[1] == 1 and not modulation._forward_hooks:
        found = modulation.row()
        if found is not None:
            return found
    made = modulation(temb).contiguous()  # (B or 1, 1 or 2, 6 D)
    made = made if made.dtype in DTYPES else made.float()
    if len(made) != batch:
        made = made.expand(batch, -1, -1).contiguous()
    return made


def fused_block(block: Block, img: Tensor, txt: Tensor, ctx: Context) -> Any:
    """`Block.forward`; float16 and other devices take that itself."""
    if img.device.type != "cpu" or img.dtype not in DTYPES or txt.dtype != img.dtype or img.requires_grad:
        return type(block).forward(block, img, txt, ctx)
    # sums are added where they stand, and the caller may want the old ones
    img, txt = (x.clone(memory_format=torch.contiguous_format) for x in (img, txt))
    found = vectors(block.img_mod, ctx.temb, len(img)), vectors(block.txt_mod, ctx.temb[:, :1], len(txt))
    plan = plan_for(block, img.dtype) if at_its_own(block.attn.attend) and ctx.regions is None else None
    inside = APART.get()
    if plan is None:
        single_calls(block, (img, txt), found, ctx)
    elif inside is None:
        whole_block(plan, (img, txt), found, ctx)
    else:
        with inside():
            single_calls(block, (img, txt), found, ctx)
    return block.given(img, txt)


def single_calls(block: Block, streams: tuple[Tensor, Tensor], found: tuple[Tensor, Tensor], ctx: Context) -> None:
    """What `whole_block` does, kernel by kernel."""
    (img, txt), split = streams, ctx.target_tokens
    shift1, scale1, gate1, shift2, scale2, gate2 = found[0].float().chunk(6, -1)
    tshift1, tscale1, tgate1, tshift2, tscale2, tgate2 = found[1].float().chunk(6, -1)
    out = attention(block.attn, Rows(img, shift1, scale1, split), Rows(txt, tshift1, tscale1), ctx)
    length = txt.shape[1]
    project(block.attn.to_out[0], Rows(out[:, length:]), img, gate1, split)
    project(block.attn.to_add_out, Rows(out[:, :length]), txt, tgate1)
    feed_forward(block.img_mlp, Rows(img, shift2, scale2, split), img, gate2, split)
    feed_forward(block.txt_mlp, Rows(txt, tshift2, tscale2), txt, tgate2, 0)


def attention(attn: Any, img: Rows, txt: Rows, ctx: Context) -> Tensor:
    """Both streams' queries, keys and values side by side, normed and turned in place; (B, T + N, D)."""
    batch, length, width = txt.x.shape
    tokens = length + img.x.shape[1]
    q, k, v = (torch.empty(batch, tokens, width, dtype=img.x.dtype) for _ in range(3))
    for name, out in (("q", q), ("k", k), ("v", v)):
        project(getattr(attn, f"add_{name}_proj"), txt, out[:, :length])
        project(getattr(attn, f"to_{name}"), img, out[:, length:])
    q, k, v = (x.unflatten(-1, (attn.heads, -1)) for x in (q, k, v))
    cos, sin = ctx.rope
    names = ("norm_added_q", "norm_added_k", "norm_q", "norm_k")
    norms: Any = tuple(floats(getattr(attn, name), "weight") for name in names)
    calls.turn(q, k, norms, (cos.contiguous(), sin.contiguous()), length, attn.norm_q.eps)
    return attended(attn.attend, q, k, v, ctx).flatten(2)
