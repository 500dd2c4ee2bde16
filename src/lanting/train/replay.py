"""Latent replay: signs are drawn and encoded once, then met several times with fresh noise.

Encoding a picture costs about a quarter of a training step on it, and the noise is different at every meeting, so
reuse is nearly free variety. The buffer is a ring: old signs make room for new ones.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from lanting.flow.latents import pack
from lanting.nn.rope import Grid
from lanting.nn.vae import AutoencoderKLQwenImage
from lanting.text.templates import fill, load_template, opening
from lanting.train.signs import Sign, SignMaker

TOKEN = 16  # pixels per token and side


@dataclass(frozen=True)
class Batch:
    """What one training step on one canvas size needs."""

    latents: Tensor  # (B, N, 64) normalised
    ids: Tensor  # (B, T) behind the prefix, right-padded
    mask: Tensor  # (B, T) bool
    labels: Tensor  # (B, N) character class per token, 0 = none
    grid: Grid


class Reader:
    """Prompts to token ids in the official template, with the constant prefix kept apart."""

    def __init__(self, tokenizer: Tokenizer, template: str = "text-to-image"):
        self.tokenizer, self.template = tokenizer, load_template(template)
        self.prefix: list[int] = tokenizer.encode(opening(self.template), add_special_tokens=False).ids
        self.pad = tokenizer.token_to_id("<|endoftext|>")

    def ids(self, prompts: Sequence[str]) -> list[list[int]]:
        whole = [fill(self.template, p) for p in prompts]
        encoded = self.tokenizer.encode_batch(whole, add_special_tokens=False)
        return [e.ids[len(self.prefix) :] for e in encoded]

    def padded(self, rows: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
        """(ids (B, T), mask (B, T))."""
        longest = max(map(len, rows))
        ids = torch.tensor([row + [self.pad] * (longest - len(row)) for row in rows])
        lengths = torch.tensor([len(row) for row in rows])
        return ids, torch.arange(longest)[None] < lengths[:, None]


@torch.no_grad()
def encode_pictures(vae: AutoencoderKLQwenImage, pixels: np.ndarray) -> Tensor:
    """uint8 (B, H, W, 3) -> packed, normalised latents (B, N, 64)."""
    mean = torch.tensor(vae.config.latents_mean).view(1, -1, 1, 1)
    std = torch.tensor(vae.config.latents_std).view(1, -1, 1, 1)
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
    x = x.to(next(vae.parameters()).dtype, memory_format=torch.channels_last)
    latents = torch.cat([vae.encode(part)[0].float() for part in x.split(16)])
    return pack((latents - mean) / std)


class Replay:
    """A ring of encoded signs of one canvas size."""

    def __init__(
        self,
        vae: AutoencoderKLQwenImage,
        reader: Reader,
        maker: SignMaker,
        size: tuple[int, int],
        capacity: int,
    ):
        self.vae, self.reader, self.maker, self.size, self.capacity = vae, reader, maker, size, capacity
        self.grid: Grid = (1, size[1] // TOKEN, size[0] // TOKEN)
        tokens = self.grid[1] * self.grid[2]
        self.latents = torch.zeros(capacity, tokens, 64, dtype=torch.float16)
        self.labels = torch.zeros(capacity, tokens, dtype=torch.uint8)
        self.rows: list[list[int]] = []
        self.next = 0
        self.silent = reader.ids([" "])[0]

    def add(self, count: int, rng: random.Random) -> None:
        """Draw, encode and keep `count` new signs."""
        signs: list[Sign] = [self.maker.sample(rng, size=self.size) for _ in range(count)]
        pixels = np.stack([self.maker.pixels(s) for s in signs])
        latents = encode_pictures(self.vae, pixels).half()
        labels = torch.from_numpy(np.stack([self.maker.labels(s) for s in signs])).flatten(1)
        for row, latent, label in zip(self.reader.ids([s.prompt for s in signs]), latents, labels, strict=True):
            if len(self.rows) < self.capacity:
                self.rows.append(row)
            else:
                self.rows[self.next] = row
            self.latents[self.next], self.labels[self.next] = latent, label
            self.next = (self.next + 1) % self.capacity

    def draw(self, count: int, rng: random.Random, silence: float = 0.05) -> Batch:
        """A random batch; `silence` is the share of prompts replaced by one space, for classifier-free guidance."""
        chosen = [rng.randrange(len(self.rows)) for _ in range(count)]
        quiet = torch.tensor([rng.random() < silence for _ in chosen])
        rows = [self.silent if q else self.rows[i] for i, q in zip(chosen, quiet.tolist(), strict=True)]
        ids, mask = self.reader.padded(rows)
        labels = self.labels[chosen].long().masked_fill(quiet[:, None], -1)
        return Batch(self.latents[chosen].float(), ids, mask, labels, self.grid)
