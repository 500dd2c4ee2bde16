"""Blockwise ControlNet for Qwen-Image (DiffSynth's Canny, Depth and Inpaint nets): a correction behind each block.

Unlike the nets of `nn.controlnet`, it knows neither time nor words, and what it adds behind a block depends on the
stream there, which what it added before has changed. So there are no residuals to compute beforehand: it is handed to
the Stack as a function and asked block by block. Same tensor names as the released files. Facts: DiffSynth-Studio,
`models/qwen_image_controlnet.py`. Rejected: forward hooks on the blocks, which whoever shares the network would hear.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lanting.nn.chains import gathered
from lanting.nn.mmdit import RMSNorm


@dataclass(frozen=True)
class BlockwiseConfig:
    """One block for each of the transformer's; `in_channels` is 64, or 68 with the mask of the Inpaint net."""

    num_layers: int = 60
    width: int = 3072
    in_channels: int = 64


class BlockwiseBlock(nn.Module):
    """Norm both, add, Linear, exact GELU, Linear."""

    def __init__(self, width: int):
        super().__init__()
        self.x_rms, self.y_rms = RMSNorm(width), RMSNorm(width)
        self.input_proj, self.output_proj = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, img: Tensor, seen: Tensor) -> Tensor:
        """img (B, N, D) behind the transformer's block, seen (B or 1, N, D) of the control picture; -> (B, N, D)."""
        return self.output_proj(F.gelu(self.input_proj(self.x_rms(img) + self.y_rms(seen))))


class BlockwiseControlNet(nn.Module):
    """Corrections for the target's tokens."""

    along = False  # it is asked behind blocks (`nn.chains` says what is not)

    def __init__(self, config: BlockwiseConfig):
        super().__init__()
        self.config = config
        self.img_in = nn.Linear(config.in_channels, config.width)
        self.controlnet_blocks = nn.ModuleList(BlockwiseBlock(config.width) for _ in range(config.num_layers))

    @property
    def entrance(self) -> nn.Module:
        """What takes a picture in."""
        return self.img_in

    @property
    def dtype(self) -> torch.dtype:
        first: BlockwiseBlock = self.controlnet_blocks[0]  # type: ignore[assignment]
        return first.x_rms.weight.dtype  # a norm's: `img_in` may be packed

    def steer(
        self, hints: Sequence[tuple[Tensor, float]], beside: Sequence[tuple[BlockwiseControlNet, Tensor, float]] = ()
    ) -> Behind:
        """What a Stack is to do behind its blocks. `hints`: packed latents (B or 1, N, in_channels) of each control
        picture, and how much it counts; `beside`: those that other nets see. All corrections are added up."""
        return Behind(*gathered([*((self, *hint) for hint in hints), *beside]))


@dataclass(frozen=True)
class Behind:
    """What nets do behind a Stack's blocks. A value and no closure: who records steps has to know what differs.

    nets    the net of each control picture
    seen    (B or 1, N, D), what that net makes of the picture at first
    scales  how much each counts
    """

    nets: tuple[BlockwiseControlNet, ...]
    seen: tuple[Tensor, ...]
    scales: tuple[float, ...]

    def __call__(self, index: int, img: Tensor, target_tokens: int) -> Tensor:
        """The picture stream (B, N + R, D) behind block `index`, corrected where the target is; every net is asked of
        the stream as the block left it."""
        target, every = img[:, :target_tokens], zip(self.nets, self.seen, self.scales, strict=True)
        each = (net.controlnet_blocks[index](target, one) * scale for net, one, scale in every)
        steered = target + sum(each, start=torch.zeros_like(target)).to(target.dtype)
        return steered if target_tokens == img.shape[1] else torch.cat([steered, img[:, target_tokens:]], 1)
