"""Qwen-Image-2.1's blocks on a GPU: what the target goes through in every step, in one pass over memory each.

The prefix, read once a drawing, stays torch's: kept or computed anew, it gives the target the same keys and values, and
the target does the same with them. Without Triton, or where gradients are wanted, the target is torch's too.
Shapes as in `nn.single_stream`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lanting.attach.gpu_linears import DTYPES, How, Rows, form_of, graded, into, joined, project
from lanting.kernels.gpu.here import available, on
from lanting.kernels.gpu.rows import Gated, activate, swiglu, turn
from lanting.kernels.gpu.twins import Sums
from lanting.nn.single_layout import Turn
from lanting.nn.single_stream import Block, Context, FeedForward, KeysValues


def fused_single(block: Block, how: How, img: Tensor, txt: Tensor | None, ctx: Context) -> tuple[Tensor, Tensor | None]:
    """`Block.forward`."""
    before, txt = block.behind(txt, ctx)
    if not fits(block, img, before):
        return block.given(block.ahead(img, before, ctx), txt)
    with on(img.device):
        return block.given(ahead(block, how, img, before, ctx), txt)


def fits(block: Block, img: Tensor, before: KeysValues) -> bool:
    """Whether kernels are there and know all this."""
    alike = {x.dtype for x in (img, *before)} == {img.dtype} and img.dtype in DTYPES
    return alike and available(img.device) and not graded(block, img, *before)


def ahead(block: Block, how: How, img: Tensor, before: KeysValues, ctx: Context) -> Tensor:
    """`Block.ahead`."""
    scale1, _, scale2, _ = ctx.modulation.chunk(4, -1)  # (B, 1, D)
    _, gate1, _, gate2 = ctx.modulation.tanh().chunk(4, -1)  # strided as the scales are, which spares copies
    attn: Any = block.attn
    mlp, eps = block.img_mlp, block.eps
    found = Rows(attention(attn, Rows(img, (None, scale1), eps=eps), before, ctx, how))
    made, readers = project(attn.to_out[0], found, how), (mlp.gate_layer, mlp.proj)
    x, rows = joined(made, Gated(img, gate1), (None, scale2), readers, how, eps)
    return feed_forward(mlp, rows, Gated(x, gate2), how)


def attention(attn: Any, rows: Rows, before: KeysValues, ctx: Context, how: How) -> Tensor:
    """The target's keys and values go behind the prefix's, and are normed and turned where they are; (B, N, D)."""
    (batch, tokens, width), length = rows.x.shape, before[0].shape[1]
    q, k, v = (
        torch.empty(batch, first + tokens, width, dtype=rows.x.dtype, device=rows.x.device)
        for first in (0, length, length)
    )
    for every, old in zip((k, v), before, strict=True):
        every[:, :length] = old.flatten(2)
    for linear, out in ((attn.to_q, q), (attn.to_k, k[:, length:]), (attn.to_v, v[:, length:])):
        into(linear, rows, out, how)
    q, k, v = (x.unflatten(-1, (attn.heads, -1)) for x in (q, k, v))
    turned(attn, q, k[:, length:], ctx.layout.target)
    return attn.attend(q, k, v, ctx.mask).flatten(2)


def turned(attn: Any, q: Tensor, k: Tensor, place: Turn) -> None:
    """Row by row: each is contiguous even where it is the end of a longer one, and may stand at places of its own."""
    norms: Any = (attn.norm_q.weight, attn.norm_k.weight)
    for row in range(len(q)):
        cos, sin = place if place[0].ndim == 2 else (table[row] for table in place)
        turn(q[row : row + 1], k[row : row + 1], (*norms, *norms), (cos, sin), 0, attn.norm_q.eps)


def feed_forward(mlp: FeedForward, rows: Rows, gated: Gated, how: How) -> Tensor:
    """base + gate times D -> 3 D -> SwiGLU -> D of the rows; written where the base is, as the SwiGLU is where its gate
    was."""
    base = gated.base
    form = form_of(mlp.out, how, base.device)
    gate, up = (project(linear, rows, how) for linear in (mlp.gate_layer, mlp.proj))
    place = None if form is not None or isinstance(gate, Sums) else gate
    read = Rows.of(base, swiglu(gate, up, form, place, base.dtype), form)
    return activate(project(mlp.out, read, how), gated=gated, out=base)
