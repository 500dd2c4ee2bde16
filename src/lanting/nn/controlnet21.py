"""ControlNet for Qwen-Image-2.1 (VideoX-Fun's Union net): a chain (`nn.chains`) that is added to all tokens.

What it says is added to the target, to words and to reference pictures. Words and references see no target here either,
so their part of the chain is as constant as in the transformer and is kept with it: keys and values are the same, bit
for bit. What is added to them counts by the net's scale, though, so the transformer's prefix is another one with
another scale, or without the net.
Same tensor names as the released file. Facts: VideoX-Fun, `models/qwenimage21_transformer2d_control.py`;
DiffSynth-Studio, `models/qwen_image_21_controlnet.py`. Shapes as in `nn.single_stream`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

from lanting.nn.chains import ChainNet, Link, Streams, Told, check_layers
from lanting.nn.single_stream import Block, Context, SingleStreamConfig


@dataclass(frozen=True)
class ControlNet21Config(SingleStreamConfig):
    """The transformer's numbers, and two of the net's own: see `ChainNet`."""

    control_layers: tuple[int, ...] = tuple(range(0, 32, 2))
    control_in_dim: int = 129

    def __post_init__(self) -> None:
        super().__post_init__()
        check_layers(self.control_layers, self.num_layers)

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Self:
        """As `SingleStreamConfig.from_dict`."""
        return super().from_dict({**config, "control_layers": tuple(config["control_layers"])})


class ControlBlock(Link, Block):
    """One of the chain's."""

    def given(self, img: Tensor, txt: Tensor | None) -> tuple[Tensor | None, ...]:
        """Both streams, then what is said of each."""
        return img, txt, self.after_proj(img), None if txt is None else self.after_proj(txt)


class QwenImage21ControlNet(ChainNet):
    """Corrections for all tokens, behind some blocks. Streams: target (B, N, D); prefix (B, P, D), None if kept."""

    def __init__(self, config: ControlNet21Config):
        super().__init__(config, ControlBlock)

    def enter(self, seen: Tensor, img: Tensor, txt: Tensor | None) -> Streams:
        """As `ChainNet.enter`; of words and references nothing is seen."""
        project: Any = self.control_blocks[0].before_proj
        img = project(seen) + img.to(self.dtype)
        return img, None if txt is None else project(seen.new_zeros(1, 1, seen.shape[-1])) + txt.to(self.dtype)

    def link(self, place: int, streams: Streams, ctx: Context) -> tuple[Streams, Told]:
        img, txt, of_img, of_txt = self.control_blocks[place](*streams, in_type(ctx, self.dtype))
        return (img, txt), (of_img, of_txt)


def in_type(ctx: Context, dtype: torch.dtype) -> Context:
    """For a net of another type than the transformer's."""
    if ctx.modulation.dtype == dtype:
        return ctx
    return replace(ctx, modulation=ctx.modulation.to(dtype), prefix_modulation=ctx.prefix_modulation.to(dtype))
