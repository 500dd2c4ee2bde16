"""One forward of the transformer over several devices: each has a part of the picture's tokens, attention is exchanged.

Everything in a block but attention works token by token, so a device runs the usual network on its own tokens. Around
attention tokens become heads: every device receives all tokens of some heads, attends, and sends each its tokens back.
Text is short and is computed on all devices alike; only its attention is gathered, since each has a few heads of it.
It hangs at one seam, Attend, so blocks of any kind (fused, streamed, packed, with LoRAs) notice nothing; positions are
cut where the network looks them up. After "DeepSpeed Ulysses"; tokens and heads need not divide evenly.

Rejected: keys and values passed round in a ring, which hides traffic behind attention, but needs attention that
combines partial sums, and ours is whichever kernel is fastest. Rejected: a split of each matrix, whose sums would have
to be added up over all devices four times a block.
Shapes: B batch, T text tokens, N picture tokens in all and n on this device, H heads in all and h here, E head width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor

from lanting.attach.caches import restore
from lanting.nn.mmdit import Attend, QwenImageTransformer
from lanting.nn.rope import Grid


class Swap(Protocol):
    """How devices give one another tensors; `attach.parallel_group.Group` is one."""

    def __call__(self, parts: Sequence[Tensor], shapes: Sequence[Sequence[int]]) -> list[Tensor]:
        """`parts[i]` goes to device i; what comes from it has `shapes[i]`. All devices call it at the same time."""
        ...


@dataclass(frozen=True)
class Seat:
    """One device's place among `size` that share a forward of `tokens` picture tokens."""

    rank: int
    size: int
    tokens: int

    @property
    def bounds(self) -> list[tuple[int, int]]:
        """Every device's tokens: from, to."""
        return shares(self.tokens, self.size)

    def own(self, x: Tensor) -> Tensor:
        """(B, N, ...) -> (B, n, ...)"""
        start, stop = self.bounds[self.rank]
        return x[:, start:stop]

    def targets(self, count: int) -> int:
        """How many of the first `count` tokens, which are the target's, are this device's."""
        start, stop = self.bounds[self.rank]
        return min(max(count - start, 0), stop - start)


def shares(count: int, size: int) -> list[tuple[int, int]]:
    """`count` things for `size` devices in order, as evenly as may be: from, to."""
    edges = [count * i // size for i in range(size + 1)]
    return list(pairwise(edges))


class Shared:
    """A transformer's forward on one of several devices. It hangs on the network only while it is called."""

    def __init__(self, net: QwenImageTransformer, seat: Seat, swap: Swap):
        self.net, self.seat, self.swap = net, seat, swap

    def __call__(
        self,
        latents: Tensor,
        timestep: Tensor,
        prompt_embeds: Tensor,
        prompt_mask: Tensor | None,
        grids: Sequence[Grid],
        target_tokens: int,
        **more: Any,
    ) -> Tensor:
        """As `QwenImageTransformer.forward`, with all tokens' latents (B, N, C) and this device's part of control
        residuals (B, n, D); returns this device's part of the target (B, targets, C)."""
        seat, forward = self.seat, type(self.net).forward  # of the class: recordings are of the whole
        targets = seat.targets(target_tokens)
        with self._hung():
            found = forward(self.net, seat.own(latents), timestep, prompt_embeds, prompt_mask, grids, targets, **more)
        return found[:, :targets]

    @contextmanager
    def _hung(self) -> Iterator[None]:
        stack: Any = self.net.transformer_blocks
        attends: list[Any] = [block.attn.attend for block in stack]
        assert all(isinstance(attend, Attend) for attend in attends)
        old, rope = [attend.__dict__.get("forward") for attend in attends], self.net.rope
        self.net.rope = Cut(rope, self.seat)  # type: ignore[assignment]
        for attend in attends:
            attend.__dict__["forward"] = Exchange(attend.forward, self.seat, self.swap)
        try:
            yield
        finally:
            self.net.rope = rope
            for attend, forward in zip(attends, old, strict=True):
                restore(attend, forward)


class Cut:
    """Positions of the text and of this device's tokens, in place of a `RopeCache`."""

    def __init__(self, inner: Any, seat: Seat):
        self.inner, self.seat = inner, seat

    def __call__(self, grids: tuple[Grid, ...], text: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """((T + n, E/2) cosines, the same of sines), text first."""
        start, stop = self.seat.bounds[self.seat.rank]
        cos, sin = self.inner(grids, text, device)
        return tuple(torch.cat([x[:text], x[text + start : text + stop]]) for x in (cos, sin))  # type: ignore[return-value]


class Exchange:
    """In place of an Attend's `forward`: this device's tokens of all heads in, and out again; between, all tokens of
    its heads."""

    def __init__(self, inner: Any, seat: Seat, swap: Swap):
        self.inner, self.seat, self.swap = inner, seat, swap

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """q, k, v (B, T + n, H, E), text first; mask (B, T) -> (B, T + n, H, E)"""
        seat, (batch, rows, count, width) = self.seat, q.shape
        tokens, heads = seat.bounds, shares(count, seat.size)
        mine = slice(*heads[seat.rank])
        text = rows - (tokens[seat.rank][1] - tokens[seat.rank][0])
        every = torch.stack([x[:, text:] for x in (q, k, v)])  # (3, B, n, H, E)
        shapes = [(3, batch, b - a, mine.stop - mine.start, width) for a, b in tokens]
        pictures = self.swap([every[:, :, :, a:b] for a, b in heads], shapes)
        whole = [torch.cat([x[:, :text, mine], *(part[i] for part in pictures)], 1) for i, x in enumerate((q, k, v))]
        out = self.inner(*whole, mask)  # (B, T + N, h, E)
        parts = [torch.cat([out[:, :text], out[:, text + a : text + b]], 1) for a, b in tokens]
        return torch.cat(self.swap(parts, [(batch, rows, b - a, width) for a, b in heads]), 2)
