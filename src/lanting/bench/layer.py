"""One full-width block of the transformer with random weights, as torch runs it and as the kernels do.

Its modulation comes out of a table, as it does when a model runs, so a block is 226 million weights. Packed ones are
random bytes: what they are worth changes no time.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lanting.attach.compute import attach_kernels
from lanting.attach.quant import GROUP
from lanting.bench.subject import Subject
from lanting.bench.work import block as block_work
from lanting.kernels.library import ready
from lanting.nn.linears import Int4Linear, Int8Linear, PackedLinear
from lanting.nn.mmdit import Block, Context, TransformerConfig
from lanting.nn.rope import RopeCache
from lanting.nn.swap import swap
from lanting.plan.geometry import Transformer
from lanting.plan.kinds import KINDS

FORMS = (("bf16", False), ("bf16", True), ("int8", True), ("int4", True))  # what weights are held in, with kernels?
SIZE = 0.02  # of weights, so that numbers stay ordinary


class Given(nn.Module):
    """Modulation out of a table: six vectors (1, 1, 6 D)."""

    def __init__(self, width: int):
        super().__init__()
        self.rows = torch.full((1, 1, 6 * width), 0.1, dtype=torch.bfloat16)

    def forward(self, temb: Tensor) -> Tensor:
        return self.rows


def forms() -> tuple[tuple[str, bool], ...]:
    """Those that differ here: plain weights without kernels come first, so that there is something to compare."""
    return tuple(form for form in FORMS if ready() or form != ("bf16", True))


def make(net: Transformer, kind: str, native: bool = True) -> tuple[nn.Module, bool]:
    """(a block, whether kernels run it), where they may: `native`."""
    width, head = net.width, net.attention_head_dim
    config = TransformerConfig(num_layers=1, num_attention_heads=width // head, attention_head_dim=head)
    with torch.device("meta"):
        block = Block(config).requires_grad_(False).eval()
        block.img_mod, block.txt_mod = nn.Identity(), nn.Identity()  # type: ignore[assignment]
        if kind != "bf16":
            swap(block, nn.Linear, partial(empty, kind))
    block = block.to_empty(device="cpu")
    block = block.bfloat16()
    fill(block)
    block.img_mod, block.txt_mod = Given(width), Given(width)  # type: ignore[assignment]
    return block, native and attach_kernels(nn.ModuleList([block]))


def empty(kind: str, path: str, old: nn.Module) -> PackedLinear:
    """A packed Linear of the same shape, without contents."""
    shape: Any = old
    if kind == "int4":
        return Int4Linear(shape.in_features, shape.out_features, group=GROUP)
    return Int8Linear(shape.in_features, shape.out_features, scale=(shape.out_features, 1))


def fill(block: nn.Module) -> None:
    """Random weights, quickly: a few thousand numbers over and over."""
    source = torch.Generator().manual_seed(0)
    numbers = torch.randn(4099, generator=source)
    for name, tensor in block.state_dict().items():
        count = tensor.numel()
        if tensor.dtype in (torch.int8, torch.uint8):
            few = (numbers * 40).to(torch.int8).view(tensor.dtype)
        elif name.endswith("weight_scale"):
            few = numbers * 0 + SIZE / 40
        else:
            few = numbers * SIZE if tensor.ndim > 1 or name.endswith("bias") else numbers * 0 + 1
        tensor.flatten().copy_(few.repeat(-(-count // len(few)))[:count])


def subject(net: Transformer, pictures: int, text: int, kind: str, made: tuple[nn.Module, bool]) -> Subject:
    """The block at work on so many tokens."""
    block, native = made
    product = "int8" if native and kind != "bf16" else "bfloat16"
    side = max(1, int(pictures**0.5))
    grid = (1, side, pictures // side)
    img, txt, temb = (torch.randn(1, n, net.width, dtype=torch.bfloat16) for n in (pictures, text, 1))
    time = net.attention_head_dim // 8
    place = (net.attention_head_dim - time) // 2
    rope = RopeCache((time, place, place), False)
    context = Context(temb, pictures, rope((grid,), text, torch.device("cpu")))
    work = block_work(net, pictures, text, KINDS[kind], ("bfloat16", product))
    return Subject(kind, work, lambda _: block(img, txt, context))
