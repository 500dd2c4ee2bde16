"""What makes the network of `model` fast on a GPU; nothing here changes what it computes beyond rounding.

A GPU waits for its host at every number that comes from a list or is asked for, so none may: neither for an index, nor
for how many tokens are pictures. That is also what allows a step to be recorded (`graphs`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from lanting.core.lang import Phrase
from lanting.nn.mmdit import Attend, Context
from lanting.nn.qwen_language import Attend as CausalAttend
from lanting.nn.qwen_language import expand_cache
from lanting.nn.swap import swap
from lanting.train.graphs import Attempt
from lanting.train.model import NanoNet, PlainAttend, PlainCausalAttend, WatchedStack, plain_block
from lanting.train.replay import Batch
from lanting.train.ring import Pictured
from lanting.train.sight import TogetherVision

TABLES = 8192  # rotary tables kept: one per canvas and width of prompts. Recordings read them where they are
Run = Callable[[nn.Module, Tensor, Tensor, Context], tuple[Tensor, Tensor]]


def prepare_for_gpu(net: NanoNet) -> NanoNet:
    """Fused attention instead of the products that suit a CPU, and one pass of the vision tower for all pictures."""
    swap(net, PlainAttend, lambda path, old: Attend())
    swap(net, PlainCausalAttend, lambda path, old: CausalAttend())
    net.visual.__dict__["forward"] = TogetherVision(net.visual)
    net.__dict__["embed"] = partial(embed, net)
    net.transformer.rope.size = TABLES
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    return net


def embed(net: NanoNet, prefix: Tensor, batch: Batch) -> Tensor:
    """`NanoNet.embed` where the tokens of pictures stand in the same columns of all rows."""
    _, cache = net.language(prefix)
    cache = expand_cache(cache, batch.ids.shape[0])
    if batch.patches is None:
        return net.language(batch.ids, cache=cache)[0]
    if not isinstance(batch, Pictured):
        raise TypeError("pictures for a network on a GPU come from a ring")
    embeds = net.language.embed_tokens(batch.ids)
    count = batch.patches.shape[0] * batch.patches.shape[1]
    seen = net.visual(batch.patches.flatten(0, 2), [batch.patch_grid] * count).to(embeds.dtype)
    embeds = embeds.index_copy(1, batch.columns, seen.view(len(batch.ids), -1, seen.shape[-1]))
    return net.language(embeds, batch.positions, cache=cache)[0]


def compile_for_gpu() -> None:
    """Compile the blocks: one graph for all of them and for all sizes, in about a minute."""
    WatchedStack.run = staticmethod(compiled_block(plain_block))


def compiled_block(plain: Run) -> Run:
    """The compiled `plain`; where compiling fails (no compiler on the machine, say) `plain` itself from then on.

    The first block would be compiled apart from the others, since it gets views: it gets copies instead.
    """
    compiled: Run = torch.compile(plain, dynamic=True)
    return Attempt(
        lambda block, img, txt, ctx: compiled(block, whole(img), whole(txt), ctx), plain, Phrase("the blocks are")
    )


def whole(x: Tensor) -> Tensor:
    """x, copied where it is a view."""
    return x.clone() if x._is_view() else x
