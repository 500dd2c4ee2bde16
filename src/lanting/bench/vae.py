"""The autoencoder's decoder with random weights: latents to a picture, in one piece."""

from __future__ import annotations

from dataclasses import asdict

import torch

from lanting.bench.subject import Subject
from lanting.bench.work import decoding
from lanting.nn.vae import AutoencoderKLQwenImage, VAEConfig
from lanting.plan.geometry import Vae

SEED = 0


def make(net: Vae) -> AutoencoderKLQwenImage:
    """A whole autoencoder in bfloat16, as the engine runs the published one on a processor."""
    torch.manual_seed(SEED)
    made = AutoencoderKLQwenImage(VAEConfig(**asdict(net))).eval().requires_grad_(False)
    return made.bfloat16()


def subject(net: Vae, made: AutoencoderKLQwenImage, side: int) -> Subject:
    """It decodes a square picture."""
    scale = made.config.downscale
    latents = torch.randn(1, net.z_dim, side // scale, side // scale, dtype=torch.bfloat16)
    return Subject("bf16", decoding(net, (side, side), "bfloat16"), lambda _: made.decode(latents))
