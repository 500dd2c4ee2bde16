"""A whole block in one call of the kernels.

A small model's block is twenty kernels of some microseconds each, and preparing the calls took Python longer than
computing took them: a third of the time of a picture of 256 x 256, half of one of 224 x 96. The same kernels in the
same order, so the bits are those of single calls. What is not a plain row of Linears (LoRAs, rotated weights, kinds
that the kernels don't multiply, attention that others look into) takes the single calls, and so does every block while
somebody looks into it (`apart`).

What a block looks like to C is put together once and copied for each call: only addresses of activations are new. Of
weights it knows where they lay, and is made again when one is elsewhere.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lanting.attach.held import Affine, affine, floats, lying
from lanting.kernels import calls, library
from lanting.nn.mmdit import Block, Context

ALIGN = 64  # bytes; where rooms begin
KEPT_ROOM = 8 << 20  # bytes of a room that is kept
KEPT_SIZES = 8  # of pictures and texts, for which calls are kept
ROOMS = threading.local()
APART: ContextVar[Callable[[], AbstractContextManager[object]] | None] = ContextVar("apart", default=None)
TEXT = ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
PICTURE = ("to_q", "to_k", "to_v", "to_out")
NORMS = ("norm_added_q", "norm_added_k", "norm_q", "norm_k")


@contextmanager
def apart(inside: Callable[[], AbstractContextManager[object]]) -> Iterator[None]:
    """For who wants to see into blocks: in this thread each takes its single calls meanwhile, under `inside()`."""
    before = APART.set(inside)
    try:
        yield
    finally:
        APART.reset(before)


@dataclass(frozen=True, slots=True)
class Seen:
    """A block as it was when a plan was made. Tables and what is in them, since modules answer slowly."""

    things: list[tuple[Any, str, object]]  # modules, and what was made of them
    lie: list[tuple[Any, str, int]]  # tensors, and where

    def add(self, place: Any, name: str, made: str) -> None:
        """One of the modules of a table, of which something was made."""
        module = place[name]
        self.things.extend([(place, name, module), (vars(module), made, vars(module).get(made))])
        self.lie.extend(lying(module))

    def still(self) -> bool:
        """Whether all of that is as it was."""
        for table, key, thing in self.things:
            if table.get(key) is not thing:
                return False
        for table, key, at in self.lie:
            x = table.get(key)
            if x is None or x.data_ptr() != at:
                return False
        return True


@dataclass(slots=True)
class Plan:
    """A block for C. `calls`, by the sizes of what is given: the structure, and the bytes of room it needs."""

    dtype: torch.dtype
    seen: Seen
    linears: tuple[list[Affine], list[Affine]]  # of pictures, of text
    norms: list[Tensor]
    heads: int
    eps: float
    calls: dict[object, tuple[Any, int]] = field(default_factory=dict)

    def __deepcopy__(self, memo: object) -> None:
        """A copy of the block makes its own."""

    def call(self, img: Tensor, txt: Tensor, vectors: tuple[Tensor, Tensor], ctx: Context) -> tuple[Any, int]:
        """The structure for a call with such sizes, and the bytes of room; addresses of activations are missing."""
        masked = 0 if ctx.mask is None else ctx.mask.shape[1]
        given = *(v.shape for v in vectors), *(v.dtype for v in vectors)
        key = (*img.shape, txt.shape[1], *given, ctx.target_tokens, masked)
        found = self.calls.get(key)
        if found is None:
            if len(self.calls) >= KEPT_SIZES:
                self.calls.clear()
            found = self.calls[key] = self._made(img, txt, vectors, ctx, masked)
        return library.Block.from_buffer_copy(found[0]), found[1]

    def _made(
        self, img: Tensor, txt: Tensor, vectors: tuple[Tensor, Tensor], ctx: Context, masked: int
    ) -> tuple[Any, int]:
        length, kind = txt.shape[1], calls.TYPES[img.dtype]
        size = (len(img), length + img.shape[1], self.heads, img.shape[-1] // self.heads)
        norms = [norm.data_ptr() for norm in self.norms]
        made = library.Block(
            stream(txt, vectors[1], 0, self.linears[1]),
            stream(img, vectors[0], ctx.target_tokens, self.linears[0]),
            library.Turn(None, None, None, None, *norms, *size, length, self.eps, kind),
            library.Attention(None, None, None, None, None, *size[:2], *size[1:], masked, kind),
        )
        return made, calls.block_bytes(made)


def whole_block(plan: Plan, streams: tuple[Tensor, Tensor], vectors: tuple[Tensor, Tensor], ctx: Context) -> None:
    """Change both streams, pictures (B, N, D) and text (B, T, D), where they are.

    Streams are contiguous; `vectors` (B or 1, 1 or 2, 6 D) are the modulation of either, contiguous, too.
    """
    img, txt = streams
    call, size = plan.call(img, txt, vectors, ctx)
    cos, sin = (angle.contiguous() for angle in ctx.rope)
    mask = None if ctx.mask is None else ctx.mask.to(torch.uint8).contiguous()
    room = room_of(size + ALIGN)
    call.img.rows.data, call.txt.rows.data = img.data_ptr(), txt.data_ptr()
    call.img.vectors.data, call.txt.vectors.data = vectors[0].data_ptr(), vectors[1].data_ptr()
    call.turn.cos, call.turn.sin = cos.data_ptr(), sin.data_ptr()
    call.attention.mask = None if mask is None else mask.data_ptr()
    call.room = -(-room.data_ptr() // ALIGN) * ALIGN
    calls.call("lt_block", call)


def room_of(size: int) -> Tensor:
    """Bytes to work in. A small room stays with its thread: new memory costs a fault for every page of it."""
    room = getattr(ROOMS, "kept", None)
    if room is None or len(room) < size:
        room = torch.empty(size, dtype=torch.uint8)
        if size <= KEPT_ROOM:
            ROOMS.kept = room
    return room


def plan_for(block: Block, dtype: torch.dtype) -> Plan | None:
    """The plan that is kept, if it still holds, or a new one; None where the block takes single calls."""
    plan: Plan | None = block.__dict__.get("whole")
    if plan is None or plan.dtype != dtype or not plan.seen.still():
        plan = block.__dict__["whole"] = plan_of(block, dtype)
    return plan


def plan_of(block: Block, dtype: torch.dtype) -> Plan | None:
    """None where a Linear does not fit, or those that share rows differ."""
    attn: Any = block.attn
    width = len(attn.norm_q.weight)  # of a head; a Linear may be a LoRA, which knows no sizes
    if width % 32 or width > calls.WIDEST:
        return None
    seen = Seen([], [])
    found: list[list[Affine]] = []
    for names, mlp in ((PICTURE, block.img_mlp), (TEXT, block.txt_mlp)):
        mine = [affine(place[name], dtype) for place, name in places(attn, names, mlp)]
        fit = [one for one in mine if one is not None]
        if len(fit) < len(mine) or len({one.dense for one in fit[:3]}) > 1:
            return None
        for place, name in places(attn, names, mlp):
            seen.add(place, name, "affine")
        found.append(fit)
    for name in NORMS:
        floats(getattr(attn, name), "weight")
        seen.add(attn._modules, name, "weight in float32")
    norms = [made for name in NORMS if (made := floats(getattr(attn, name), "weight")) is not None]
    return Plan(dtype, seen, (found[0], found[1]), norms, attn.heads, attn.norm_q.eps)


def places(attn: Any, names: tuple[str, ...], mlp: Any) -> list[tuple[Any, str]]:
    """Where a stream's six Linears are, in the kernels' order: tables of modules, and names in them."""
    out = getattr(attn, names[3])
    last = (out._modules, "0") if isinstance(out, nn.ModuleList) else (attn._modules, names[3])
    up, down = (mlp.net[0]._modules, "proj"), (mlp.net._modules, "2")
    return [*((attn._modules, name) for name in names[:3]), last, up, down]


def stream(rows: Tensor, vectors: Tensor, split: int, found: list[Affine]) -> library.Stream:
    first = calls.per_row(vectors.float()[..., : rows.shape[-1]], rows, split)
    query, key, value, out, up, down = (one.struct for one in found)
    count, kind = vectors.shape[:2].numel(), calls.TYPES[vectors.dtype]
    return library.Stream(calls.matrix(rows), first, count, kind, (query, key, value), out, up, down)
