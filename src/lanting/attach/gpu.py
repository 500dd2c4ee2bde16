"""Kernels at the three seams, on a GPU: products in 8 and 4 bits, attention by the best there is, fused blocks.

The same idea as `attach.compute` on a CPU. A block's norms, modulation, turns, GELU and gates become one pass over
memory each, in float32 inside; rounding activations to 8 bits is part of these passes. Without Triton, or detached,
torch does all of it. Detached, every bit is as before.

Modules stay where they are, so that streaming, tables and LoRAs find them: only their `forward` is another. The
modulation's Linears are left alone: one row a step, and its error would reach everything. Rejected: one Linear for
queries, keys and values. It needs a copy of their weights, and at 3072 columns each of them fills the GPU.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lanting.attach.compute import LEFT_ALONE
from lanting.attach.gpu_linears import (
    DTYPES,
    How,
    Rows,
    forget,
    form_of,
    graded,
    into,
    joined,
    product_of,
    project,
    raised,
)
from lanting.attach.gpu_single import fused_single
from lanting.core.errors import RequestError
from lanting.kernels.gpu import attention as attentions
from lanting.kernels.gpu.here import beside, meet, on
from lanting.kernels.gpu.rows import Gated, activate, turn
from lanting.kernels.gpu.twins import FP8
from lanting.nn.linears import PackedLinear
from lanting.nn.mmdit import Attend, Block, Context, FeedForward
from lanting.nn.regions import attended
from lanting.nn.rotate import LARGEST
from lanting.nn.single_stream import Attend as SingleAttend
from lanting.nn.single_stream import Block as SingleBlock

COMPUTE = {
    None: How(),
    "fp8": How(FP8),
    "int8": How(torch.int8),
    "int8 rotated": How(torch.int8, rotate=LARGEST),
}


def attach_gpu(net: nn.Module, compute: str | None = None, *, four: bool = False) -> None:
    """Let a network use the kernels. Undone by `detach_gpu`.

    compute  one of COMPUTE: plain Linears of blocks are computed in 8 bits too, from copies that are made when they are
             first used; None: as they are
    four     activations that meet 4-bit weights are rounded to 8 bits
    Raises RequestError when LANTING_ATTENTION names no attention.
    """
    check_attention()
    how = replace(COMPUTE[compute], four=torch.int8 if four else None)
    for path, module in net.named_modules():
        if isinstance(module, PackedLinear) and not any(part in path.split(".") for part in LEFT_ALONE):
            module.product = partial(product_of, how)
        elif isinstance(module, Attend | SingleAttend):
            module.__dict__["forward"] = partial(attend, module)
        elif isinstance(module, Block):
            module.__dict__["forward"] = partial(fused_block, module, how)
        elif isinstance(module, SingleBlock):
            module.__dict__["forward"] = partial(fused_single, module, how)


def detach_gpu(net: nn.Module) -> None:
    """Every module does its own work again."""
    for module in net.modules():
        forget(module)
        if isinstance(module, PackedLinear):
            module.product = None
        elif isinstance(module, Attend | SingleAttend | Block | SingleBlock):
            module.__dict__.pop("forward", None)


def check_attention() -> None:
    try:
        attentions.order(torch.device("cpu"))
    except ValueError as error:
        known = ", ".join(("auto", *attentions.WAYS))
        raise RequestError(
            "{variable} names {name}, which is no attention we know: use one of {known}",
            variable=attentions.VARIABLE,
            name=str(error),
            known=known,
        ) from None


def attend(module: Attend | SingleAttend, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """`Attend.forward`; masks of 2.1's texts are triangles, which are left to torch."""
    other = mask is not None and mask.ndim != 2
    if other or q.dtype not in DTYPES or q.dtype != k.dtype or q.dtype != v.dtype or q.requires_grad:
        plain: Any = type(module).forward
        return plain(module, q, k, v, mask)
    return attentions.choices()(q, k, v, mask)


def fused_block(block: Block, how: How, img: Tensor, txt: Tensor, ctx: Context) -> Any:
    """`Block.forward`; where gradients are wanted the block takes that itself."""
    if img.dtype not in DTYPES or txt.dtype != img.dtype or graded(block, img):
        return type(block).forward(block, img, txt, ctx)
    with on(img.device):
        return computed(block, how, img, txt, ctx)


def computed(block: Block, how: How, img: Tensor, txt: Tensor, ctx: Context) -> Any:
    """The text's work needs a small part of the GPU: it runs beside the picture's, where that can be said."""
    split, length, device = ctx.target_tokens, txt.shape[1], img.device
    shift1, scale1, gate1, shift2, scale2, gate2 = block.img_mod(ctx.temb).chunk(6, -1)  # (B, 1 or 2, D) each
    tshift1, tscale1, tgate1, tshift2, tscale2, tgate2 = block.txt_mod(ctx.temb[:, :1]).chunk(6, -1)
    attn: Any = block.attn
    out = attention(attn, Rows(img, (shift1, scale1), split), Rows(txt, (tshift1, tscale1)), ctx, how)
    with beside(device):
        rest = Rows(out[:, :length]), Gated(txt, tgate1), (tshift2, tscale2), tgate2
        txt = second_half(attn.to_add_out, block.txt_mlp, how, *rest)
    rest = Rows(out[:, length:]), Gated(img, gate1, split), (shift2, scale2), gate2
    img = second_half(attn.to_out[0], block.img_mlp, how, *rest)
    meet(device)
    return block.given(img, txt)


def second_half(
    linear: nn.Module,
    mlp: FeedForward,
    how: How,
    rows: Rows,
    gated: Gated,
    vectors: tuple[Tensor, Tensor],
    gate: Tensor,
) -> Tensor:
    """Of one stream: what attention found joins it, then what the MLP makes of it."""
    up: Any = mlp.net[0]
    x, normed = joined(project(linear, rows, how), gated, vectors, [up.proj], how)
    return feed_forward(mlp, normed, Gated(x, gate, gated.split), how)


def feed_forward(mlp: FeedForward, rows: Rows, gated: Gated, how: How) -> Tensor:
    """base + gate times D -> 4 D -> GELU -> D of the rows; written where the base is."""
    up: Any = mlp.net[0]
    down, base = mlp.net[2], gated.base
    form = form_of(down, how, base.device)
    read = Rows.of(base, raised(up.proj, rows, how, form), form)
    return activate(project(down, read, how), gated=gated, out=base)


def attention(attn: Any, img: Rows, txt: Rows, ctx: Context, how: How) -> Tensor:
    """Both streams' queries, keys and values side by side, normed and turned in place; (B, T + N, D)."""
    batch, length, width = txt.x.shape
    tokens = length + img.x.shape[1]
    q, k, v = (torch.empty(batch, tokens, width, dtype=img.x.dtype, device=img.x.device) for _ in range(3))
    places = (("q", q), ("k", k), ("v", v))
    with beside(q.device):
        for name, out in places:
            into(getattr(attn, f"add_{name}_proj"), txt, out[:, :length], how)
    for name, out in places:
        into(getattr(attn, f"to_{name}"), img, out[:, length:], how)
    meet(q.device)
    q, k, v = (x.unflatten(-1, (attn.heads, -1)) for x in (q, k, v))
    names = ("norm_added_q", "norm_added_k", "norm_q", "norm_k")
    norms: Any = tuple(getattr(attn, name).weight for name in names)
    turn(q, k, norms, ctx.rope, length, attn.norm_q.eps)
    return attended(attn.attend, q, k, v, ctx).flatten(2)
