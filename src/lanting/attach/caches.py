"""Residual caches: all blocks but the first are left out where what they add is known well enough from earlier steps.

The first block's residual tells how much the rest's will have changed. A judge (`flow.frugal`) hears that number and
decides; when all blocks were computed it hears what leaving them out would have cost. Branches of the guidance keep
states of their own. Only the target's tokens are kept: whatever stands behind them is of no use after the last block.
After "First Block Cache" (ParaAttention) and "TaylorSeer" (the line through two residuals); what is new is that
errors are measured, and not set equal to a threshold.

The Stack stays where it is and calls its blocks as before, so streaming, kernels and LoRAs see nothing but fewer calls:
the next call is again of the first block, which is what streaming expects after a first block, too. On a GPU the first
block and the others are recorded apart (`attach.pieces`).
Rejected: caches of single layers inside a block, whose keys at full size take more memory than the blocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from lanting.attach.pieces import Pieces
from lanting.nn.mmdit import Context, Stack


class Judge(Protocol):
    """Who decides; `lanting.flow.frugal.Frugal` is one and says what the numbers mean."""

    def watches(self, branch: str) -> bool: ...

    def reuse(self, branch: str, change: float) -> float | None: ...

    def ahead(self, branch: str) -> float: ...

    def computed(self, branch: str, change: float, same: float, line: float) -> None: ...


@dataclass
class State:
    """Of one branch, when all blocks were last computed; all (B, N, D), the target's tokens only."""

    first: Tensor  # residual of the first block
    rest: Tensor  # residual of all others
    before: Tensor | None = None  # `rest` of the time before

    def guess(self, ahead: float) -> Tensor:
        """The residual of all blocks but the first, on the line through the last two."""
        return self.rest if self.before is None or ahead == 0 else torch.lerp(self.before, self.rest, 1 + ahead)


class ResidualCache:
    """In place of a Stack's `forward`, for one drawing."""

    def __init__(self, net: Any, judge: Judge):
        self.stack: Stack = net.transformer_blocks
        self.pieces, self.judge = Pieces(net), judge
        self.states: dict[str, State] = {}

    def __call__(self, img: Tensor, txt: Tensor, ctx: Context) -> tuple[Tensor, Tensor]:
        if not self.judge.watches(ctx.branch) or len(self.stack) < 2:
            return self.pieces(img, txt, ctx)
        here, there = self.pieces(img, txt, ctx, 0, 1)
        state = self.states.get(ctx.branch)
        after = here[:, : ctx.target_tokens]
        first = after - img[:, : ctx.target_tokens]
        change = 0.0 if state is None else relative(first - state.first, state.first)
        ahead = None if state is None else self.judge.reuse(ctx.branch, change)
        if state is not None and ahead is not None:
            return after + state.guess(ahead), there
        img, txt = self.pieces(here, there, ctx, 1)
        rest = img[:, : ctx.target_tokens] - after
        self._report(ctx, change, rest, img)
        self.states[ctx.branch] = State(first, rest, None if state is None else state.rest)
        return img, txt

    def _report(self, ctx: Context, change: float, rest: Tensor, img: Tensor) -> None:
        """What leaving the blocks out would have cost: relative to the stream, since its norm is what comes next."""
        state, same, line = self.states.get(ctx.branch), torch.inf, torch.inf
        if state is not None:
            of = img[:, : ctx.target_tokens]
            same = relative(rest - state.rest, of)
            if state.before is not None:
                line = relative(rest - state.guess(self.judge.ahead(ctx.branch)), of)
        self.judge.computed(ctx.branch, change, same, line)


def ratio(error: Tensor, of: Tensor) -> Tensor:
    """Length of `error` (B, N, D) by length of `of`; of the worst picture of a batch, no dimensions."""
    lengths = [torch.linalg.vector_norm(x, dim=(1, 2), dtype=torch.float32) for x in (error, of)]  # (B,)
    return (lengths[0] / lengths[1].clamp(min=1e-12)).max()


def relative(error: Tensor, of: Tensor) -> float:
    """`ratio` as a number, for which a GPU is waited for."""
    return float(ratio(error, of))


@contextmanager
def residual_cache(net: Any, judge: Judge) -> Iterator[ResidualCache]:
    """A cache on the network's `transformer_blocks`; off again afterwards, and every bit as before."""
    stack: Any = net.transformer_blocks
    cache, old = ResidualCache(net, judge), stack.__dict__.get("forward")
    stack.__dict__["forward"] = cache
    try:
        yield cache
    finally:
        restore(stack, old)


def restore(module: Any, old: Any) -> None:
    """Give a module the `forward` it had: one of its own, or None for that of its class."""
    module.__dict__.pop("forward", None)
    if old is not None:
        module.__dict__["forward"] = old
