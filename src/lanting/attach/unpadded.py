"""Attention of a padded batch, row by row without the padding: what a row gets does not depend on the others' length.

A mask gives the same numbers up to rounding: padding stands between text and picture and shifts which keys are summed
together. Rows that share a batch for speed are to be the same bits as alone, so each attends over its own tokens only,
and everything else in a transformer is row by row anyway. Costs a copy of queries, keys and values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from lanting.attach.caches import restore

Attends = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


def row_by_row(attend: Attends, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """`Attend.forward` with another meaning of `mask` (B, T): texts are shorter, and not just invisible. Neighbours of
    the same length go together. What stands where padding was is 0."""
    if mask is None:
        return attend(q, k, v, None)
    text, out = mask.shape[1], torch.zeros_like(q)  # (B, T + N, H, E)
    for length, rows in groupby(enumerate(mask.sum(1).tolist()), key=lambda row: row[1]):
        numbers = [number for number, _ in rows]
        own = slice(numbers[0], numbers[-1] + 1)
        short = [torch.cat([x[own, :length], x[own, text:]], 1) for x in (q, k, v)]  # (b, length + N, H, E)
        found = attend(short[0], short[1], short[2], None)
        out[own, :length], out[own, text:] = found[:, :length], found[:, length:]
    return out


@contextmanager
def unpadded(net: Any) -> Iterator[None]:
    """On all blocks of a network; off again afterwards."""
    attends: list[Any] = [block.attn.attend for block in net.transformer_blocks]
    old = [attend.__dict__.get("forward") for attend in attends]
    for attend in attends:
        attend.__dict__["forward"] = partial(row_by_row, attend.forward)
    try:
        yield
    finally:
        for attend, forward in zip(attends, old, strict=True):
            restore(attend, forward)
