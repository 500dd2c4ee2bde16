"""ControlNet for Qwen-Image-2.1 (VideoX-Fun's Union net): copies of some of the transformer's blocks, in a chain.

The chain begins with what the transformer's first block is given, and what the control picture says is added to the
target there. Each of its blocks belongs to one of the transformer's; what it says is added behind that, to the target,
to words and to reference pictures. Words and references see no target here either, so their part of the chain is as
constant as in the transformer and is kept with it: keys and values are the same, bit for bit. What is added to them
counts by the net's scale, though, so the transformer's prefix is another one with another scale, or without the net.
Chain and transformer compute in turns. (Rejected: the chain first, as the reference has it. At 2048 x 2048 pixels its
16 results take 2.1 GB, and a step that leaves blocks out would compute them in vain.)
Same tensor names as the released file. Facts: VideoX-Fun, `models/qwenimage21_transformer2d_control.py`;
DiffSynth-Studio, `models/qwen_image_21_controlnet.py`. Shapes as in `nn.single_stream`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from lanting.nn.single_stream import Block, Context, SingleStreamConfig

Streams = tuple[Tensor, Tensor | None]  # target (B, N, D); prefix (B, P, D), None where it is kept


@dataclass(frozen=True)
class ControlNet21Config(SingleStreamConfig):
    """The transformer's numbers, and two of the net's own.

    control_layers  behind which of the transformer's blocks it is added, the first one 0
    control_in_dim  channels of a hint: twice a picture's latents and a mask
    """

    control_layers: tuple[int, ...] = tuple(range(0, 32, 2))
    control_in_dim: int = 129

    def __post_init__(self) -> None:
        super().__post_init__()
        layers = self.control_layers
        if layers[:1] != (0,) or list(layers) != sorted(set(layers)) or layers[-1] >= self.num_layers:
            raise ValueError(f"control_layers {list(layers)} must rise from 0 to at most {self.num_layers - 1}")

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Self:
        """As `SingleStreamConfig.from_dict`."""
        return super().from_dict({**config, "control_layers": tuple(config["control_layers"])})


class ControlBlock(Block):
    """One of the chain's: a layer as the transformer's, and what it says. `first`: it also takes the picture in."""

    def __init__(self, config: ControlNet21Config, first: bool = False):
        super().__init__(config)
        if first:
            self.before_proj = nn.Linear(config.width, config.width)
        self.after_proj = nn.Linear(config.width, config.width)

    def given(self, img: Tensor, txt: Tensor | None) -> tuple[Tensor | None, ...]:
        """Both streams, then what is said of each."""
        return img, txt, self.after_proj(img), None if txt is None else self.after_proj(txt)


class QwenImage21ControlNet(nn.Module):
    """Corrections for all tokens, behind some blocks."""

    def __init__(self, config: ControlNet21Config):
        super().__init__()
        self.config = config
        self.place = {layer: place for place, layer in enumerate(config.control_layers)}
        self.control_img_in = nn.Linear(config.control_in_dim, config.width)
        self.control_blocks = nn.ModuleList(ControlBlock(config, layer == 0) for layer in config.control_layers)

    @property
    def dtype(self) -> torch.dtype:
        first: Any = self.control_blocks[0]
        return first.attn.norm_q.weight.dtype  # a norm's: Linears may be packed

    def enter(self, seen: Tensor, img: Tensor, txt: Tensor | None) -> Streams:
        """Where the chain begins. seen (B or 1, N, D) of the picture; of words and references nothing is seen."""
        project: Any = self.control_blocks[0].before_proj
        img = project(seen) + img.to(self.dtype)
        return img, None if txt is None else project(seen.new_zeros(1, 1, seen.shape[-1])) + txt.to(self.dtype)

    def steer(
        self, hints: Sequence[tuple[Tensor, float]], beside: Sequence[tuple[QwenImage21ControlNet, Tensor, float]] = ()
    ) -> Chains:
        """What a transformer is to do along. `hints`: (B or 1, N, control_in_dim) of each control picture, and how much
        it counts; `beside`: those of other nets. All that is said is added up."""
        every = [*((self, *hint) for hint in hints), *beside]
        nets, hints_of, scales = zip(*every, strict=True)
        return Chains(
            nets, tuple(net.control_img_in(x.to(net.dtype)) for net, x in zip(nets, hints_of, strict=True)), scales
        )


@dataclass(frozen=True)
class Chains:
    """What nets do beside a transformer: a value, of which each pass makes a `Pass`.

    nets    the net of each control picture
    seen    (B or 1, N, D), what that net makes of the picture at first
    scales  how much each counts
    """

    nets: tuple[QwenImage21ControlNet, ...]
    seen: tuple[Tensor, ...]
    scales: tuple[float, ...]

    @property
    def prefix(self) -> object:
        """What words and references depend on."""
        return [*zip(self.nets, self.scales, strict=True)]

    @property
    def blocks(self) -> int:
        """How many keep keys and values of a prefix: those of each net once."""
        return sum(len(net.control_blocks) for net in dict.fromkeys(self.nets))

    def begin(self) -> Pass:
        return Pass(self)


class Pass:
    """The chains of one pass, which grow as the transformer's blocks compute."""

    def __init__(self, chains: Chains):
        self.chains = chains
        self.streams: list[Streams] = []

    def __call__(self, index: int, before: Streams, after: Streams, ctx: Context) -> Streams:
        """The transformer's streams behind its block `index`, from what they were before it and after it."""
        chains = self.chains
        if index == 0:
            self.streams = [net.enter(seen, *before) for net, seen in zip(chains.nets, chains.seen, strict=True)]
        img, txt = after
        for number, (net, scale) in enumerate(zip(chains.nets, chains.scales, strict=True)):
            if (place := net.place.get(index)) is None:
                continue
            found = net.control_blocks[place](*self.streams[number], in_type(ctx, net.dtype))
            self.streams[number] = found[:2]
            img = img + (found[2] * scale).to(img.dtype)
            txt = txt if txt is None or found[3] is None else txt + (found[3] * scale).to(txt.dtype)
        return img, txt


def in_type(ctx: Context, dtype: torch.dtype) -> Context:
    """For a net of another type than the transformer's."""
    if ctx.modulation.dtype == dtype:
        return ctx
    return replace(ctx, modulation=ctx.modulation.to(dtype), prefix_modulation=ctx.prefix_modulation.to(dtype))
