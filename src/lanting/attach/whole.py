"""A whole block in one call of the kernels.

A small model's block is twenty kernels of some microseconds each, and preparing the calls took Python longer than
computing took them: a third of the time of a picture of 256 x 256, half of one of 224 x 96. The same kernels in the
same order, so the bits are those of single calls. What is not a plain row of Linears (LoRAs, rotated weights, kinds
that the kernels don't multiply, attention that others look into) takes the single calls.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor

from lanting.attach.held import Affine, affine, floats
from lanting.kernels import calls, library
from lanting.nn.mmdit import Block, Context

ALIGN = 64  # bytes; where rooms begin
KEPT_ROOM = 8 << 20  # bytes of a room that is kept
ROOMS = threading.local()


def whole_block(block: Block, streams: tuple[Tensor, Tensor], vectors: tuple[Tensor, Tensor], ctx: Context) -> bool:
    """Change both streams, pictures (B, N, D) and text (B, T, D), where they are; False where that takes single calls.

    `vectors` (B, 1 or 2, 6 D) float32 are the modulation of either.
    """
    img, txt = streams
    attn: Any = block.attn
    width = txt.shape[-1] // attn.heads
    if width % 32 or width > calls.WIDEST:
        return False
    of_img = linears(img.dtype, (attn.to_q, attn.to_k, attn.to_v, attn.to_out[0]), block.img_mlp)
    of_txt = linears(img.dtype, (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj, attn.to_add_out), block.txt_mlp)
    if of_img is None or of_txt is None:
        return False
    call = library.Block(stream(txt, vectors[1], 0, of_txt), stream(img, vectors[0], ctx.target_tokens, of_img))
    kept = joint(call, attn, txt.shape[1], img, ctx)
    room = room_of(calls.block_bytes(call) + ALIGN)
    call.room = -(-room.data_ptr() // ALIGN) * ALIGN
    calls.call("lt_block", call)
    del kept  # whose memory the call has read
    return True


def room_of(size: int) -> Tensor:
    """Bytes to work in. A small room stays with its thread: new memory costs a fault for every page of it."""
    room = getattr(ROOMS, "kept", None)
    if room is None or len(room) < size:
        room = torch.empty(size, dtype=torch.uint8)
        if size <= KEPT_ROOM:
            ROOMS.kept = room
    return room


def linears(dtype: torch.dtype, attention: tuple[Any, ...], mlp: Any) -> list[Affine] | None:
    """Six Linears of a stream in the kernels' order; None where one does not fit, or those that share rows differ."""
    found = [affine(linear, dtype) for linear in (*attention, mlp.net[0].proj, mlp.net[2])]
    fit = [one for one in found if one is not None and one.weight is not None]
    if len(fit) < len(found) or len({one.weight.kind == "bf16" for one in fit[:3] if one.weight}) > 1:
        return None
    return fit


def stream(rows: Tensor, vectors: Tensor, split: int, found: list[Affine]) -> library.Stream:
    first = calls.per_row(vectors[..., : rows.shape[-1]], rows, split)
    query, key, value, out, up, down = (one.struct for one in found)
    return library.Stream(calls.matrix(rows), first, (query, key, value), out, up, down)


def joint(call: library.Block, attn: Any, length: int, img: Tensor, ctx: Context) -> list[Tensor]:
    """Set what both streams share: norms, turns and attention. Returns the tensors whose addresses were given."""
    batch, tokens, kind = len(img), length + img.shape[1], calls.TYPES[img.dtype]
    size = (batch, tokens, attn.heads, img.shape[-1] // attn.heads)
    names = ("norm_added_q", "norm_added_k", "norm_q", "norm_k")
    norms = [floats(getattr(attn, name), "weight") for name in names]
    given = [*(angle.contiguous() for angle in ctx.rope), *(norm for norm in norms if norm is not None)]
    call.turn = library.Turn(None, None, *(x.data_ptr() for x in given), *size, length, attn.norm_q.eps, kind)
    seen = None if ctx.mask is None else ctx.mask.to(torch.uint8).contiguous()
    mask, masked = (None, 0) if seen is None else (seen.data_ptr(), seen.shape[1])
    call.attention = library.Attention(None, None, None, None, mask, *size, masked, kind)
    return given if seen is None else [*given, seen]
