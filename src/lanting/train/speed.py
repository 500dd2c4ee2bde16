"""What makes the network of `model` fast on a GPU; nothing here changes what it computes beyond rounding."""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch import Tensor, nn

from lanting.nn.mmdit import Attend, Context
from lanting.nn.qwen_language import Attend as CausalAttend
from lanting.nn.swap import swap
from lanting.train.model import NanoNet, PlainAttend, PlainCausalAttend, WatchedStack, plain_block
from lanting.train.sight import TogetherVision

TABLES = 256  # rotary tables kept: one per canvas and width of prompts
Run = Callable[[nn.Module, Tensor, Tensor, Context], tuple[Tensor, Tensor]]


def prepare_for_gpu(net: NanoNet) -> NanoNet:
    """Fused attention instead of the products that suit a CPU, and one pass of the vision tower for all pictures."""
    swap(net, PlainAttend, lambda path, old: Attend())
    swap(net, PlainCausalAttend, lambda path, old: CausalAttend())
    net.visual.__dict__["forward"] = TogetherVision(net.visual)
    net.transformer.rope.size = TABLES
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    return net


def compile_for_gpu() -> None:
    """Compile the blocks: one graph for all of them and for all sizes, in about a minute."""
    WatchedStack.run = staticmethod(compiled_block(plain_block))


def compiled_block(plain: Run) -> Run:
    """The compiled `plain`; where compiling fails (no compiler on the machine, say) `plain` itself from then on."""
    fast: Run = torch.compile(plain, dynamic=True)
    failed = False

    def run(block: nn.Module, img: Tensor, txt: Tensor, ctx: Context) -> tuple[Tensor, Tensor]:
        nonlocal failed
        if not failed:
            try:
                return fast(block, img, txt, ctx)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                failed = True
                words = str(error).strip().splitlines()[:1]
                print(f"the blocks are not compiled ({type(error).__name__}: {words})", file=sys.stderr, flush=True)
        return plain(block, img, txt, ctx)

    return run
