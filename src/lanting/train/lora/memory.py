"""What training a LoRA takes of a device, before anything is read, and what to do where that is too much.

Weights are counted from the files' headers, what learns from its shapes, the rest from the tokens of the largest
example. The numbers of a block were counted on meta tensors (tests/unit/test_train_lora.py counts them again).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lanting.core.errors import RequestError
from lanting.engine.models import Models
from lanting.engine.placement import LIVE
from lanting.nn.linears import LINEARS, PackedLinear
from lanting.nn.swap import outermost
from lanting.specs import Defaults
from lanting.specs.sizes import reference_size
from lanting.train.lora.dataset import Example
from lanting.train.lora.net import none_called, pattern_of
from lanting.weights.build import store_transformer
from lanting.weights.pull import gigabytes
from lanting.weights.stored import Stored

KINDS = ("none", "int8", "int4")  # what packs weights, the most exact first
LEARNT = 16  # bytes of a number that learns: itself, its gradient, AdamW's two averages, all float32
BLOCK, MODULATED = 28, 40  # numbers of a block's width that one of its tokens needs while its gradients are computed:
# as usual, and where every token has a modulation of its own (references of zero_cond_t)
WORDS = 512  # tokens that a caption may have
PER_WORD = 28 * 28  # square pixels of a picture that the reader makes a token of
CUDA = 700 << 20  # bytes of a process on a GPU before it has done anything
TOKEN = 16 * 16  # square pixels


@dataclass(frozen=True, slots=True)
class Need:
    """Bytes on the device, and how they come about."""

    kind: str  # what Linears are packed as while they are loaded
    resident: int | None  # blocks that stay; None: all
    weights: int
    learning: int
    activations: int
    total: int


def tokens_of(example: Example, own: Defaults) -> int:
    """Of pictures and words, at most."""
    count = example.size[0] * example.size[1] // TOKEN + WORDS
    for path in example.references:
        width, height = reference_size(*picture_size(path), own)
        count += width * height // TOKEN + own.vl_area // PER_WORD
    return count


def picture_size(path: Any) -> tuple[int, int]:
    from PIL import Image

    with Image.open(path) as image:
        return image.size


def choose(models: Models, asked: str, budget: int, tokens: int, run: Any) -> Need:
    """The most exact weights that fit `budget` bytes; where none do, int4 with as many blocks as fit.

    asked   "auto", or one kind: then blocks stream where it does not fit
    tokens  of one step: the largest example's, times the batch
    Raises RequestError where nothing fits.
    """
    every = [Needs(models, kind, tokens, run) for kind in (KINDS if asked == "auto" else (asked,))]
    last = every[-1]
    streamed = (last.with_resident(count) for count in range(len(last.blocks) - LIVE - 1, -1, -1))
    for one in (*(needs.with_resident(None) for needs in every), *streamed):
        if one.total <= budget:
            return one
    raise RequestError(
        "training needs {need} of memory here and {free} are free: take a smaller --resolution, --batch 1, a lower "
        "--rank or --targets attention",
        **{"need": gigabytes(last.with_resident(0).total), "free": gigabytes(budget)},
    )


def need(models: Models, kind: str, tokens: int, run: Any, resident: int | None = None) -> Need:
    """What training takes with Linears packed as `kind` and so many blocks resident."""
    return Needs(models, kind, tokens, run).with_resident(resident)


class Needs:
    """What training takes with Linears packed as `kind`, for any number of resident blocks: the network is built (of
    tensors without memory) and counted once."""

    def __init__(self, models: Models, kind: str, tokens: int, run: Any):
        found, size = stored(models, kind), models.dtype.itemsize
        net, self.kind = found.module, kind
        self.weights, self.blocks = bytes_of(net, size), [bytes_of(block, size) for block in blocks_of(found)]
        self.learning = LEARNT * learnt(net, run.targets, run.rank)
        width, zero_cond_t = int(net.config.width), getattr(net.config, "zero_cond_t", False)
        packed = any(isinstance(module, PackedLinear) for module in net.modules())
        numbers = (len(self.blocks) + (MODULATED if zero_cond_t else BLOCK)) * tokens * width  # kept, and worked with
        self.activations = (numbers + (2 * largest(net) if packed else 0)) * size
        self.process = CUDA if models.device.type == "cuda" else 0

    def with_resident(self, count: int | None) -> Need:
        """`count`: blocks that stay; None: all."""
        away = [] if count is None else self.blocks[count:]
        weights = self.weights - sum(away) + (LIVE * max(away) if away else 0)
        total = weights + self.learning + self.activations + self.process
        return Need(self.kind, count, weights, self.learning, self.activations, total)


def stored(models: Models, kind: str) -> Stored[Any]:
    """The transformer with nothing read, its Linears packed as `kind`."""
    before, models.quant = models.quant, kind
    try:
        placing = models.placing("transformer")
    finally:
        models.quant = before
    return store_transformer(models.checkpoints["transformer"], models.folder.configs["transformer"], placing)


def blocks_of(found: Stored[Any]) -> list[nn.Module]:
    return list(found.module.transformer_blocks.children())


def bytes_of(module: nn.Module, size: int) -> int:
    """Of all weights below a module; plain ones take `size` bytes a number."""
    return sum(t.numel() * (size if isinstance(t, nn.Parameter) else t.element_size()) for t in tensors(module))


def tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    saved: Mapping[str, Any] = module.state_dict(keep_vars=True)
    yield from (t for t in saved.values() if not isinstance(t, nn.Parameter))


def learnt(module: nn.Module, targets: str, rank: int) -> int:
    """Numbers of the LoRAs. Raises RequestError where there would be none, before an example is prepared."""
    wanted = pattern_of(targets)
    linears = [m for path, m in outermost(module, LINEARS) if wanted.fullmatch(path)]
    if not linears:
        raise none_called(targets)
    return sum(rank * (int(m.in_features) + int(m.out_features)) for m in linears)  # type: ignore[call-overload]


def largest(module: nn.Module) -> int:
    """Numbers of the largest Linear's weight, which is expanded where it is packed."""
    linears = [m for m in module.modules() if isinstance(m, LINEARS)]
    return max((int(m.in_features) * int(m.out_features) for m in linears), default=0)  # type: ignore[call-overload]
