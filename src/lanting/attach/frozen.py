"""Frozen references: pictures that are only looked at are not computed in every step.

What the target sees of a reference picture are its keys and values, block by block. In releases with `zero_cond_t` the
references are modulated at time zero, so these change from step to step only through what the references themselves
see of the target. They are kept, and in the steps between two refreshes the references' tokens do not run at all: the
target's queries meet the kept keys and values. (In other releases the references are told the time, and what is kept
is wrong in the next step.) A judge (`flow.frugal`) decides when to refresh. What the kept ones would have cost is
measured at every refresh, in three blocks: attention with the old keys and values against attention with the new ones.

It attaches at two seams, Stack and Attend, and works with plain blocks and with the fused ones of `attach.compute`
alike: those compute everything but attention, which PyTorch does in these steps, since the kernels want as many keys
as queries. Memory: `kept_bytes`; 3 GB a megapixel of references and branch in the full model at 16 bits. On a GPU both
kinds of call are recorded, until the drawing ends (`attach.pieces`); what is kept stays at one place for that.
Rejected: keys and values of one branch for both. It halves the memory, but references see the text, too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from lanting.attach.caches import ResidualCache, ratio, restore
from lanting.attach.pieces import Pieces
from lanting.nn.mmdit import Attend, Context

SAMPLED = (1, 2, 3)  # quarters of the stack in which errors are measured
COUPLING = 2.0  # a velocity's error by the attention's: 0.3 to 1 in nano told to use zero_cond_t, 3 in its last steps


class Judge(Protocol):
    """Who decides; `lanting.flow.frugal.Frugal` is one and says what the numbers mean."""

    def frozen(self, branch: str) -> bool: ...

    def refreshed(self, branch: str, error: float) -> None: ...


def kept_bytes(config: Any, tokens: int, calls: int, itemsize: int) -> int:
    """What is kept of `tokens` reference tokens, for so many branches times pictures."""
    return 2 * config.num_layers * config.width * tokens * calls * itemsize


class Frozen:
    """In place of the `forward` of a Stack and of its blocks' Attends, for one drawing."""

    def __init__(self, net: Any, judge: Judge):
        stack: Any = net.transformer_blocks
        cache = stack.__dict__.get("forward")
        self.stack, self.judge = stack, judge
        self.pieces = cache.pieces if isinstance(cache, ResidualCache) else Pieces(net)
        self.pieces.after = self._ran
        self.inner = cache or self.pieces
        count = len(stack)
        self.sampled = {count * quarter // 4 for quarter in SAMPLED}
        self.kept: dict[str, dict[int, tuple[Tensor, Tensor]]] = {}  # branch -> block -> keys, values (B, R, H, E)
        self.branch, self.split = "", 0  # of the present call; where the references begin, text included
        self.beside = False  # the present call runs beside kept references
        self.made: list[int] = []  # blocks whose keys and values were made in this call
        self.errors: list[Tensor] = []  # what the kept ones would have cost in some of them; no dimensions

    def __call__(self, img: Tensor, txt: Tensor, ctx: Context) -> tuple[Tensor, Tensor]:
        """`Stack.forward`; without the references' tokens where they are frozen."""
        target = ctx.target_tokens
        if img.shape[1] == target:
            return self.inner(img, txt, ctx)
        self.branch, self.split = ctx.branch, txt.shape[1] + target
        self.beside, self.made, self.errors = self.judge.frozen(ctx.branch), [], []
        if self.beside:
            img, ctx = img[:, :target], without_references(ctx, self.split)
        self.pieces.kind = (self.branch, self.beside, len(self.kept.setdefault(self.branch, {})))
        try:
            out = self.inner(img, txt, ctx)
        finally:
            self.split, self.beside, self.pieces.kind = 0, False, ()
        if len(self.made) == len(self.stack):
            whole = len(self.errors) == len(self.sampled)
            self.judge.refreshed(ctx.branch, COUPLING * float(torch.stack(self.errors).max()) if whole else torch.inf)
        return out

    def _ran(self, blocks: Iterable[int], noted: Sequence[Tensor]) -> None:
        """These blocks were computed, or played back."""
        if self.split and not self.beside:
            self.made += blocks
            self.errors += noted

    def attend(self, index: int, inner: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """`Attend.forward` of block `index`."""
        if not self.split:
            return inner(q, k, v, mask)
        kept = self.kept.setdefault(self.branch, {})
        if self.beside:
            old_k, old_v = kept[index]
            return inner(q, torch.cat([k, old_k], 1), torch.cat([v, old_v], 1), mask)
        out, new = inner(q, k, v, mask), (k[:, self.split :], v[:, self.split :])
        if index not in kept:
            kept[index] = new[0].clone(), new[1].clone()
            return out
        if index in self.sampled:
            self.pieces.noted.append(self._error(inner, (q, k, v, mask), kept[index], out))
        for place, value in zip(kept[index], new, strict=True):
            place.copy_(value)
        return out

    def _error(self, inner: Any, now: tuple[Any, ...], kept: tuple[Tensor, Tensor], out: Tensor) -> Tensor:
        """How far the text's and the target's attention would have been off."""
        (q, k, v), end = (x[:, : self.split] for x in now[:3]), self.split
        old = inner(q, torch.cat([k, kept[0]], 1), torch.cat([v, kept[1]], 1), now[3])
        return ratio((old - out[:, :end]).flatten(2), out[:, :end].flatten(2))


def without_references(ctx: Context, split: int) -> Context:
    """The context of text and target alone, `split` tokens in all."""
    cos, sin = ctx.rope
    control = tuple(residual[:, : ctx.target_tokens] for residual in ctx.control)
    return replace(ctx, temb=ctx.temb[:, :1], rope=(cos[:split], sin[:split]), control=control)


@contextmanager
def frozen_references(net: Any, judge: Judge) -> Iterator[Frozen]:
    """Frozen references on a transformer; off again afterwards, and every bit as before. Attach it after a cache."""
    stack: Any = net.transformer_blocks
    attends: list[Any] = [block.attn.attend for block in stack]
    assert all(isinstance(attend, Attend) for attend in attends)
    old = [module.__dict__.get("forward") for module in (stack, *attends)]
    frozen = Frozen(net, judge)
    tapes = frozen.pieces.apart()
    stack.__dict__["forward"] = frozen
    for index, attend in enumerate(attends):
        attend.__dict__["forward"] = partial(frozen.attend, index, attend.forward)
    try:
        yield frozen
    finally:
        for module, forward in zip((stack, *attends), old, strict=True):
            restore(module, forward)
        if tapes is not None:
            tapes.forget()
