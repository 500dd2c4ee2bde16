"""Blocks behind torch.compile, in place of kernels of ours: an option, and never needed.

For GPUs that our kernels don't know, and for comparison. All blocks are one function to the compiler. It is compiled
when it meets a first shape and, with lengths left open, at the second; each takes a minute or more. Where that fails,
for want of a C compiler, say, blocks run by PyTorch as it comes, which is told once. Rejected: the network as a whole,
which takes sixty times as long to compile.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lanting.core.errors import RequestError
from lanting.core.lang import say
from lanting.nn.mmdit import Block, Context

VARIABLE = "LANTING_COMPILE"
USUAL = "inductor"
Streams = tuple[Tensor, Tensor]


class Compiler:
    """What all blocks of a network share: the compiled function, or why there is none."""

    def __init__(self, backend: str = USUAL):
        self.failed = ""
        self.work: Callable[..., Streams] = torch.compile(Block.forward, backend=backend)

    def __call__(self, block: Block, img: Tensor, txt: Tensor, ctx: Context) -> Streams:
        """`Block.forward`. Raises what that raises."""
        if not self.failed and ctx.regions is None:  # what sees what is another for every drawing
            try:
                plain = replace(ctx, branch="", control=(), steer=None, beside=None)  # a block reads none
                return self.work(block, img, txt, plain)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                inner = getattr(error, "inner_exception", error)  # what a backend raised, without a page of advice
                failed = f"{type(inner).__name__}: {(str(inner).strip().splitlines() or [''])[0]}"
            found = Block.forward(block, img, txt, ctx)  # and raise what is no fault of the compiler's
            self.failed = failed
            print(say("blocks are not compiled: {reason}", reason=failed), file=sys.stderr, flush=True)
            return found
        return Block.forward(block, img, txt, ctx)


def backend_of(asked: str) -> str | None:
    """What LANTING_COMPILE names: None for nothing and off, a backend of torch.compile otherwise.
    Raises RequestError for a name that is none."""
    name = asked.strip().lower()
    if name in ("", "off", "0", "false", "no"):
        return None
    if name in ("on", "1", "true", "yes"):
        return USUAL
    import torch._dynamo as dynamo

    known = dynamo.list_backends(None)
    if name not in known:
        raise RequestError(
            "LANTING_COMPILE names {name}, which is no backend of torch.compile: use on, off, or one of {known}",
            name=asked,
            known=", ".join(known),
        )
    return name


def attach_compiled(net: nn.Module, backend: str = USUAL) -> Compiler:
    """Let a network's blocks run compiled. Undone by `detach_compiled`."""
    compiler: Any = Compiler(backend)
    for module in net.modules():
        if isinstance(module, Block):
            module.__dict__["forward"] = partial(compiler, module)
    return compiler


def detach_compiled(net: nn.Module) -> None:
    """Blocks run as they come again."""
    for module in net.modules():
        if isinstance(module, Block):
            module.__dict__.pop("forward", None)
