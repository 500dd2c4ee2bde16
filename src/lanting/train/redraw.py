"""How well a VAE redraws designs: the loss that trains it, its PSNR, and the statistics of its latents."""

from __future__ import annotations

import math
import random

import numpy as np
import torch
from torch import Tensor

from lanting.nn.vae import AutoencoderKLQwenImage
from lanting.train.design import SQUARE, WIDE
from lanting.train.draw import render
from lanting.train.scraps import held_out_pictures, lettering


def to_tensor(pictures: np.ndarray) -> Tensor:
    """(B, H, W, 3) uint8 -> (B, 3, H, W) in [-1, 1], channels last."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1


def reconstruction_loss(drawn: Tensor, wanted: Tensor, gradient_weight: float) -> Tensor:
    """L1 + L2 + L1 of the horizontal and vertical differences, which is what keeps the edges of letters."""
    error = drawn - wanted
    edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
    return error.abs().mean() + error.square().mean() + gradient_weight * edges


@torch.no_grad()
def psnr(vae: AutoencoderKLQwenImage, pictures: list[Tensor]) -> float:
    """Mean over pictures (1, 3, H, W) of 10 log10(1 / mean square error), pixels in 0..1, in dB."""
    values = []
    for picture in pictures:
        error = (vae.decode(vae.encode(picture)[0]) - picture) / 2
        values.append(-10 * math.log10(error.square().mean().item() + 1e-10))
    return sum(values) / len(values)


def held_out_designs(count: int, seed: int = 77) -> list[Tensor]:
    """Pictures (1, 3, H, W) in [-1, 1] of designs that training never draws, half of them wide."""
    return [to_tensor(picture.numpy()) for picture in held_out_pictures(count, seed)]


@torch.no_grad()
def latent_statistics(vae: AutoencoderKLQwenImage, count: int, seed: int = 5) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each latent channel over training designs, both (z,)."""
    maker, rng = lettering(seed), random.Random(seed)
    device, rows = next(vae.parameters()).device, []
    for i in range(count):
        picture = render([maker.sample(rng, (WIDE, SQUARE)[i % 2]).design])
        mean = vae.encode(to_tensor(picture.numpy()).to(device))[0]
        rows.append(mean.flatten(2)[0].T)
    values = torch.cat(rows).cpu()  # (positions, z)
    return values.mean(0), values.std(0)
