"""Bytes of a model's weights: every tensor of every network, from its geometry or from a file's header.

The list of tensors follows from a few numbers, so a release that is not downloaded yet is known to the byte. What the
planner needs are sums: a block, its modulation (nothing, where all blocks share one), the rest, and the largest Linear,
which is expanded while it is used.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache

import lanting.plan.tensors as first
import lanting.plan.tensors21 as second
from lanting.plan.geometry import Body, Coder, Eye, Geometry, Language, Transformer, Vae, Vision, Words
from lanting.plan.kinds import Kind
from lanting.plan.tensors import Tensor

BLOCK = re.compile(r"transformer_blocks\.(\d+)\.")
MODULATION = re.compile(r"\.(img|txt)_mod\.")
LIVE_FRAME = {(3, 3, 3): 9, (1, 1, 1): 1}  # elements of a VAE kernel that one frame meets


@dataclass(frozen=True, slots=True)
class Sizes:
    """Bytes of the transformer, held in one kind.

    block       of one block without modulation (the mean, where a file mixes kinds)
    modulation  of one block
    rest        outside the blocks
    linear      weights in the largest Linear of a block, modulation aside
    mod_linear  weights in a modulation Linear
    """

    blocks: int
    block: int
    modulation: int
    rest: int
    linear: int
    mod_linear: int

    @property
    def total(self) -> int:
        return self.blocks * (self.block + self.modulation) + self.rest


def transformer_tensors(net: Body) -> Iterator[Tensor]:
    """Every tensor of the checkpoint, by its official name."""
    return first.transformer_tensors(net) if isinstance(net, Transformer) else second.transformer_tensors(net)


def vae_tensors(net: Coder) -> Iterator[Tensor]:
    """Those of the autoencoder."""
    return first.vae_tensors(net) if isinstance(net, Vae) else second.vae_tensors(net)


def language_tensors(net: Words, head: bool) -> Iterator[Tensor]:
    """The reader's language model; `head`: with the matrix that writes words."""
    if isinstance(net, Language):
        return first.language_tensors(net, head)
    return second.language_tensors(net, head)


def vision_tensors(net: Eye) -> Iterator[Tensor]:
    """The reader's eye."""
    return first.vision_tensors(net) if isinstance(net, Vision) else second.vision_tensors(net)


def count(tensors: Iterable[Tensor]) -> int:
    """Parameters."""
    return sum(math.prod(shape) for _, shape in tensors)


@cache
def live_weights(net: Coder) -> int:
    """Parameters of the VAE that a single picture meets: the last frame of every kernel, no time convolutions."""
    total = 0
    for name, shape in vae_tensors(net):
        if ".time_conv." not in name:
            total += math.prod(shape[:2]) * LIVE_FRAME[shape[2:]] if len(shape) == 5 else math.prod(shape)  # type: ignore[index]
    return total


def tensor_bytes(name: str, shape: tuple[int, ...], kind: Kind, other: Kind) -> int:
    """Of one tensor where `kind` packs the Linears of blocks and layers, and everything else is `other`."""
    inside = name.startswith(("transformer_blocks.", "model.layers."))
    if kind.packed and inside and len(shape) == 2:
        return kind.bytes(*shape)
    return math.prod(shape) * other.stored


@cache
def transformer_sizes(net: Body, kind: Kind, other: Kind) -> Sizes:
    """By arithmetic: the transformer with its Linears as `kind` and the rest as `other`."""
    held = {name: tensor_bytes(name, shape, kind, other) for name, shape in transformer_tensors(net)}
    return sum_up(held, net)


def sum_up(held: Mapping[str, int], net: Body) -> Sizes:
    """From the bytes of every tensor (of a file's header, say), by official names."""
    block = modulation = rest = 0
    for name, size in held.items():
        if not BLOCK.match(name):
            rest += size
        elif MODULATION.search(name):
            modulation += size
        else:
            block += size
    layers = max(net.num_layers, 1)
    return Sizes(net.num_layers, block // layers, modulation // layers, rest, net.largest, net.modulating)


@dataclass(frozen=True, slots=True)
class Reader:
    """Bytes of the text encoder as it is loaded: all of it, its layers, and the table of words."""

    every: int
    layers: int
    words: int


@cache
def reader_bytes(geometry: Geometry, kind: Kind, other: Kind, sees: bool, writes: bool) -> Reader:
    """By arithmetic: with its eye where pictures are read, with its head where it writes."""
    tensors = [*language_tensors(geometry.language, not geometry.tied), *vision_tensors(geometry.vision)]
    return sum_reader({name: tensor_bytes(name, shape, kind, other) for name, shape in tensors}, sees, writes)


def sum_reader(held: Mapping[str, int], sees: bool, writes: bool) -> Reader:
    """From the bytes of every tensor, by official names."""
    every = layers = words = 0
    for name, size in held.items():
        if (name.startswith("lm_head.") and not writes) or ("visual." in name and not sees):
            continue
        every += size
        if "visual." not in name:
            layers += size if ".layers." in name else 0
            words += size if "embed_tokens." in name else 0
    return Reader(every, layers, words)


@cache
def parameters(geometry: Geometry) -> dict[str, int]:
    """Parameters of every component as it is published."""
    reader = count(language_tensors(geometry.language, not geometry.tied)) + count(vision_tensors(geometry.vision))
    return {
        "transformer": count(transformer_tensors(geometry.transformer)),
        "text_encoder": reader,
        "vae": count(vae_tensors(geometry.vae)),
    }
