"""ControlNets that are a chain of copies of some of the transformer's blocks (VideoX-Fun's), for both builds of it.

The chain begins with what the transformer's first block is given, and what the control picture says is added to the
target there. Each of its blocks belongs to one of the transformer's; what it says is added behind that. Which streams
that is added to, and what a block reads, is the build's own matter (`nn.controlnet_fun`, `nn.controlnet21`).
Chain and transformer compute in turns. (Rejected: the chain first, as the reference has it. At 2048 x 2048 pixels the
16 results of 2.1's take 2.1 GB, and a step that leaves blocks out would compute them in vain.)
Shapes: B batch, N target tokens, D width; streams are the picture's and the words', as a block has them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

Streams = tuple[Tensor, Tensor | None]  # of words None where they are kept
Told = tuple[Tensor, Tensor | None]  # what a chain's block says of each; None: nothing
Beside = Callable[[int, Any, Any, Any], Any]  # see `Companion.begin`


class Companion(Protocol):
    """What computes beside a transformer's blocks and is added to their streams."""

    @property
    def prefix(self) -> object:
        """What it changes of a prefix that may be kept; equal where that is the same."""
        ...

    @property
    def blocks(self) -> int:
        """How many of its own keep a prefix's keys and values."""
        ...

    def begin(self) -> Beside:
        """For one pass: (index, both streams before a block, and after it, the blocks' context) -> both."""
        ...


class Shape(Protocol):
    """What a net's config tells the chain."""

    @property
    def width(self) -> int: ...

    @property
    def control_layers(self) -> tuple[int, ...]: ...

    @property
    def control_in_dim(self) -> int: ...


def check_layers(layers: Sequence[int], depth: int) -> None:
    """Raises ValueError where a chain can't be added behind these blocks of `depth`."""
    if tuple(layers[:1]) != (0,) or list(layers) != sorted(set(layers)) or layers[-1] >= depth:
        raise ValueError(f"control_layers {list(layers)} must rise from 0 to at most {depth - 1}")


class Link(nn.Module):
    """In front of a transformer's block among the bases: that is one of a chain's, a layer and what it says (`given`).
    `first`: it also takes the picture in."""

    def __init__(self, config: Shape, first: bool = False):
        super().__init__(config)
        if first:
            self.before_proj = nn.Linear(config.width, config.width)
        self.after_proj = nn.Linear(config.width, config.width)


class ChainNet(nn.Module):
    """Corrections behind some blocks. `block`: what makes one of the chain's; (config, is it the first).

    control_layers   behind which of the transformer's blocks it is added, the first one 0
    control_in_dim   channels of a hint: twice a picture's latents and a mask
    """

    along = True  # it computes beside the blocks, and not behind them

    def __init__(self, config: Shape, block: Callable[[Any, bool], nn.Module]):
        super().__init__()
        self.config: Any = config
        self.place = {layer: place for place, layer in enumerate(config.control_layers)}
        self.control_img_in = nn.Linear(config.control_in_dim, config.width)
        self.control_blocks = nn.ModuleList(block(config, layer == 0) for layer in config.control_layers)

    @property
    def entrance(self) -> nn.Module:
        """What takes a picture in."""
        return self.control_img_in

    @property
    def dtype(self) -> torch.dtype:
        first: Any = self.control_blocks[0]
        return first.attn.norm_q.weight.dtype  # a norm's: Linears may be packed

    def enter(self, seen: Tensor, img: Tensor, txt: Tensor | None) -> Streams:
        """Where the chain begins: seen (B or 1, N, D) of the picture joins what the transformer's first block reads."""
        raise NotImplementedError

    def link(self, place: int, streams: Streams, ctx: Any) -> tuple[Streams, Told]:
        """A block of the chain: the streams behind it, and what it says."""
        raise NotImplementedError

    def steer(
        self, hints: Sequence[tuple[Tensor, float]], beside: Sequence[tuple[ChainNet, Tensor, float]] = ()
    ) -> Chains:
        """What a transformer is to do along. `hints`: (B or 1, N, control_in_dim) of each control picture, and how much
        it counts; `beside`: those of other nets. All that is said is added up."""
        return Chains(*gathered([*((self, *hint) for hint in hints), *beside]))


def gathered(
    parts: Sequence[tuple[Any, Tensor, float]],
) -> tuple[tuple[Any, ...], tuple[Tensor, ...], tuple[float, ...]]:
    """(net, hint, scale) of each control picture as nets, what each makes of its hint at first, and scales; of nets of
    any build that acts inside of a transformer."""
    nets, hints, scales = zip(*parts, strict=True)
    return nets, tuple(net.entrance(x.to(net.dtype)) for net, x in zip(nets, hints, strict=True)), scales


@dataclass(frozen=True)
class Chains:
    """What nets do beside a transformer (a `Companion`): a value, of which each pass makes a `Pass`.

    nets    the net of each control picture
    seen    (B or 1, N, D), what that net makes of the picture at first
    scales  how much each counts
    """

    nets: tuple[ChainNet, ...]
    seen: tuple[Tensor, ...]
    scales: tuple[float, ...]

    @property
    def prefix(self) -> object:
        return [*zip(self.nets, self.scales, strict=True)]

    @property
    def blocks(self) -> int:
        """Those of each net once."""
        return sum(len(net.control_blocks) for net in dict.fromkeys(self.nets))

    def begin(self) -> Pass:
        return Pass(self)


class Pass:
    """The chains of one pass, which grow as the transformer's blocks compute."""

    def __init__(self, chains: Chains):
        self.chains = chains
        self.streams: list[Streams] = []

    def __call__(self, index: int, before: Streams, after: Streams, ctx: Any) -> Streams:
        """The transformer's streams behind its block `index`, from what they were before it and after it."""
        chains = self.chains
        if index == 0:
            self.streams = [net.enter(seen, *before) for net, seen in zip(chains.nets, chains.seen, strict=True)]
        img, txt = after
        for number, (net, scale) in enumerate(zip(chains.nets, chains.scales, strict=True)):
            if (place := net.place.get(index)) is None:
                continue
            self.streams[number], (of_img, of_txt) = net.link(place, self.streams[number], ctx)
            img = joined(img, of_img, scale)
            txt = txt if txt is None or of_txt is None else joined(txt, of_txt, scale)
        return img, txt


def joined(stream: Tensor, told: Tensor, scale: float) -> Tensor:
    """A stream and what is said of its first tokens, which are all of them unless pictures stand behind the target."""
    told = (told * scale).to(stream.dtype)
    tokens = told.shape[1]
    if tokens == stream.shape[1]:
        return stream + told
    return torch.cat([stream[:, :tokens] + told, stream[:, tokens:]], 1)
