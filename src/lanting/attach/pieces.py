"""Runs of blocks, recorded where they can be: for whoever decides in Python between the blocks of a step.

A step that is spared asks between the first block and the rest whether the rest is needed. The question waits for a
number from the GPU, so it stays outside, and the two runs of blocks are recordings of their own (`attach.tapes`): the
same for a step in full and for one that ends early. What frozen references change inside of blocks is part of a
recording's key, and its kept keys and values are memory that recordings read where it lies.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor

from lanting.attach.graphs import graphs_of, moved, repeatable, steered
from lanting.attach.tapes import Tapes
from lanting.nn.mmdit import Context, through


class Pieces:
    """In place of `through`, for one network and one drawing."""

    def __init__(self, net: Any):
        self.net, self.stack, self.graphs = net, net.transformer_blocks, graphs_of(net)
        self.tapes = self.graphs.tapes if self.graphs is not None else None
        self.basis: object = None  # what recordings of one's own were made with
        self.kind: Hashable = ()  # what else decides what blocks do
        self.noted: list[Tensor] = []  # what somebody inside the last run wants to be told, in order
        self.after: Callable[[Iterable[int], Sequence[Tensor]], None] | None = None  # and who: blocks that ran, notes

    def apart(self) -> Tapes | None:
        """From now on with recordings that end with this drawing: they will read memory that does."""
        if self.graphs is not None:
            self.tapes = Tapes(self.graphs.tapes.recorder.fresh(), self.graphs.tapes.most)
            return self.tapes
        return None

    def __call__(
        self, img: Tensor, txt: Tensor, ctx: Context, first: int = 0, last: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Blocks `first` to `last` (not included)."""
        self.noted = []
        plain = ctx.regions is None and ctx.beside is None  # a chain keeps its own streams from run to run
        if plain and repeatable(ctx.steer) and self.recordable(img):
            img, txt, *self.noted = self.recorded(img, txt, ctx, first, last)
        else:
            img, txt = through(self.stack, img, txt, ctx, first, last)
        if self.after is not None:
            self.after(range(len(self.stack))[first:last], self.noted)
        return img, txt

    def recordable(self, img: Tensor) -> bool:
        graphs, tapes = self.graphs, self.tapes
        if graphs is None or tapes is None or tapes.failed:
            return False
        return graphs_of(self.net) is graphs and graphs.able(img)

    def recorded(self, img: Tensor, txt: Tensor, ctx: Context, first: int, last: int | None) -> tuple[Tensor, ...]:
        """Both streams, then what was noted."""
        graphs, tapes = self.graphs, self.tapes
        assert graphs is not None and tapes is not None
        rows = getattr(graphs.table.clock, "rows", None) if graphs.table is not None else None
        tensors = [img, txt, ctx.temb, *ctx.rope, *([] if ctx.mask is None else [ctx.mask]), *ctx.control]
        seen, told, own = steered(ctx.steer)
        tensors += seen
        before = len(tensors)
        tensors += [] if rows is None else [rows]
        graphs.check()
        if tapes is not graphs.tapes and self.basis is not graphs.basis:
            tapes.forget()
        self.basis = graphs.basis
        key = ("blocks", first, last, ctx.target_tokens, ctx.mask is not None, before, self.kind, told)
        return tapes(key, tensors, partial(self.work, ctx, first, last), own)

    def work(self, ctx: Context, first: int, last: int | None, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The blocks on the memory of a recording."""
        assert self.graphs is not None
        img, txt, temb, cos, sin, *rest = inputs
        mask = rest.pop(0) if ctx.mask is not None else None
        control = tuple(rest.pop(0) for _ in ctx.control)
        ctx = replace(ctx, temb=temb, rope=(cos, sin), mask=mask, control=control, steer=moved(ctx.steer, rest))
        self.noted = []
        with self.graphs.at(rest[0] if rest else None):
            img, txt = through(self.stack, img, txt, ctx, first, last)
        return (img, txt, *self.noted)
