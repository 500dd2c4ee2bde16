"""ControlNet for Qwen-Image (the InstantX Union and Inpainting nets): a short copy of the transformer's stack.

It reads the noisy target and the control picture's latents and returns one residual per block, which the
transformer's Stack spreads over its own blocks. Same tensor names as the released files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from lanting.nn.mmdit import Block, Context, RMSNorm, TimestepEmbedding, TransformerConfig
from lanting.nn.rope import Grid, RopeCache


@dataclass(frozen=True)
class ControlNetConfig(TransformerConfig):
    """`num_layers` is 5 (Union) or 6 (Inpainting); the inpainting net reads a mask: 4 extra packed channels."""

    num_layers: int = 5
    extra_condition_channels: int = 0


class QwenImageControlNet(nn.Module):
    """Residuals for the transformer's picture stream."""

    def __init__(self, config: ControlNetConfig):
        super().__init__()
        width, text = config.width, config.joint_attention_dim
        self.config = config
        self.img_in = nn.Linear(config.in_channels, width)
        self.txt_norm, self.txt_in = RMSNorm(text), nn.Linear(text, width)
        self.time_text_embed = TimestepEmbedding(config)
        self.transformer_blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.controlnet_blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(config.num_layers))
        self.controlnet_x_embedder = nn.Linear(config.in_channels + config.extra_condition_channels, width)
        self.rope = RopeCache(config.axes_dims_rope, layered=False)

    def forward(
        self,
        latents: Tensor,
        control_latents: Tensor,
        timestep: Tensor,
        prompt_embeds: Tensor,
        prompt_mask: Tensor | None,
        grids: Sequence[Grid],
    ) -> list[Tensor]:
        """latents (B, N, in_channels) of the target alone; control_latents (B, N, in_channels [+ 4 per extra
        condition channel / 4]); timestep (B,) in [0, 1]. Returns one (B, N, D) residual per block."""
        img = self.img_in(latents) + self.controlnet_x_embedder(control_latents)
        txt = self.txt_in(self.txt_norm(prompt_embeds))
        temb = self.time_text_embed(timestep.to(img.dtype)[:, None], img.dtype)  # (B, 1, D)
        rope = self.rope(tuple(grids), txt.shape[1], img.device)
        mask = None if prompt_mask is None else prompt_mask.bool()
        ctx = Context(temb, img.shape[1], rope, mask)
        residuals = []
        for block, out in zip(self.transformer_blocks, self.controlnet_blocks, strict=True):
            img, txt = block(img, txt, ctx)
            residuals.append(out(img))
        return residuals
