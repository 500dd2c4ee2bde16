"""The autoencoder's decoder with random weights: latents to a picture, in one piece."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch

from lanting.attach.vae import attach_vae, multiplies_tiles
from lanting.bench.subject import Subject
from lanting.bench.work import decoding
from lanting.nn.vae import AutoencoderKLQwenImage, VAEConfig
from lanting.plan.geometry import Vae

SEED = 0


def make(net: Vae, native: bool = True) -> AutoencoderKLQwenImage:
    """A whole autoencoder in bfloat16, as the engine runs the published one on a processor; with kernels where they
    may be: `native`."""
    torch.manual_seed(SEED)
    vae = AutoencoderKLQwenImage(VAEConfig(**asdict(net))).eval().requires_grad_(False).bfloat16()
    if native:
        attach_vae(vae)
    return vae


def saves(vae: Any) -> bool:
    """Whether kernels do its convolutions, which need fewer products and so a shorter time at best."""
    tiles = next(vae.parameters()).dtype == torch.bfloat16 and multiplies_tiles()
    return "forward" in vae.decoder.__dict__ and not tiles


def subject(net: Vae, vae: AutoencoderKLQwenImage, side: int) -> Subject:
    """It decodes a square picture."""
    scale = vae.config.downscale
    latents = torch.randn(1, net.z_dim, side // scale, side // scale, dtype=torch.bfloat16)
    work = decoding(net, (side, side), "bfloat16", saves(vae))
    return Subject("bf16", work, lambda _: vae.decode(latents))
