"""ControlNet for Qwen-Image (VideoX-Fun's Union nets): a chain (`nn.chains`) that is added to the target alone.

Its words are the transformer's at first, and then its own: what its blocks make of them is handed on in the chain and
told to nobody. It reads the time as the transformer does, and has no embedding of its own. The reference knows no
reference pictures; beside such, the chain sees the target and the words, as ComfyUI has it.
Same tensor names as the released file. Facts: VideoX-Fun, `models/qwenimage_transformer2d_control.py`; ComfyUI,
`ldm/qwen_image/controlnet.py`. Shapes as in `nn.mmdit`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

from lanting.nn.chains import ChainNet, Link, Streams, Told, check_layers
from lanting.nn.mmdit import Block, Context, TransformerConfig


@dataclass(frozen=True)
class FunConfig(TransformerConfig):
    """The transformer's numbers, and two of the net's own: see `ChainNet`."""

    control_layers: tuple[int, ...] = tuple(range(0, 60, 12))
    control_in_dim: int = 132

    def __post_init__(self) -> None:
        check_layers(self.control_layers, self.num_layers)

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Self:
        """As `TransformerConfig.from_dict`."""
        return super().from_dict({**config, "control_layers": tuple(config["control_layers"])})


class ControlBlock(Link, Block):
    """One of the chain's."""

    def given(self, img: Tensor, txt: Tensor) -> tuple[Tensor, ...]:
        """Both streams, then what is said of the picture's."""
        return img, txt, self.after_proj(img)


class QwenImageFunControlNet(ChainNet):
    """Corrections for the target's tokens, behind some blocks. Streams: target (B, N, D), words (B, T, D)."""

    def __init__(self, config: FunConfig):
        super().__init__(config, ControlBlock)

    def enter(self, seen: Tensor, img: Tensor, txt: Tensor | None) -> Streams:
        """As `ChainNet.enter`."""
        assert txt is not None
        project: Any = self.control_blocks[0].before_proj
        return project(seen) + img[:, : seen.shape[1]].to(self.dtype), txt.to(self.dtype)

    def link(self, place: int, streams: Streams, ctx: Context) -> tuple[Streams, Told]:
        img, txt = streams
        assert txt is not None
        img, txt, told = self.control_blocks[place](img, txt, narrowed(ctx, txt.shape[1] + img.shape[1], self.dtype))
        return (img, txt), (told, None)


def narrowed(ctx: Context, tokens: int, dtype: torch.dtype) -> Context:
    """For the first `tokens` of words and pictures, which are the words and the target, and a net of this type."""
    cos, sin = (table[:tokens] for table in ctx.rope)
    return replace(ctx, temb=ctx.temb[:, :1].to(dtype), rope=(cos, sin))
