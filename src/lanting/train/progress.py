"""What a run looks like while it trains: a sheet of samples and a reading score, drawn from the running average."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lanting.core.lang import Phrase
from lanting.flow.latents import unpack
from lanting.train.design import SQUARE, WIDE, place
from lanting.train.designs import DesignMaker, Labelled
from lanting.train.draw import render
from lanting.train.model import NanoConfig, NanoNet, plain_block
from lanting.train.precision import cast
from lanting.train.replay import Batch, Reader, statistics

if TYPE_CHECKING:
    import numpy as np

    from lanting.nn.vae import AutoencoderKLQwenImage
    from lanting.train.loop import Trainer

STEPS = 8


Velocity = Callable[[Tensor, Tensor, Tensor, "Batch"], tuple[Tensor, Any]]  # as NanoNet is called


def levels(steps: int = STEPS, shift: float = 1.0) -> list[float]:
    """Noise levels from 1 to 0, evenly spaced, then shifted towards noise."""
    even = torch.linspace(1, 0, steps + 1)
    return (shift * even / (1 + (shift - 1) * even)).tolist()


@torch.no_grad()
def sample(net: Velocity, batch: Batch, prefix: Sequence[int], sigmas: Sequence[float], seed: int = 0) -> Tensor:
    """Latents (B, N, 64) for the prompts of a batch: an Euler step from each noise level to the next."""
    device = batch.latents.device
    x = torch.randn(batch.latents.shape, generator=torch.Generator().manual_seed(seed)).to(device)
    start = torch.tensor([list(prefix)], device=device)
    for now, then in pairwise(sigmas):
        t = torch.full((x.shape[0],), now, device=device)
        with cast(device):
            velocity = net(x, t, start, batch)[0]
        x = x + (then - now) * velocity.float()
    return x


@torch.no_grad()
def decode(vae: AutoencoderKLQwenImage, latents: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """Packed, normalised latents (B, N, 64) -> (B, H, W, 3) uint8."""
    parameter = next(vae.parameters())
    mean, std = statistics(vae.config.latents_mean, vae.config.latents_std, parameter.device)
    raw = unpack(latents, grid) * std + mean
    pixels = torch.cat([vae.decode(part.to(parameter.dtype)).float() for part in raw.split(8)])
    return ((pixels * 0.5 + 0.5).clamp(0, 1) * 255).round().permute(0, 2, 3, 1).to(torch.uint8)


def prompts_batch(reader: Reader, drawn: Sequence[Labelled], size: tuple[int, int]) -> Batch:
    """A batch without pictures behind it: what sampling needs."""
    ids, mask = reader.padded([ids for ids, _ in reader.read([d.prompt for d in drawn])])
    grid = (1, size[1] // 16, size[0] // 16)
    tokens = grid[1] * grid[2]
    empty = torch.zeros(len(drawn), tokens, 2, dtype=torch.long)
    ink = torch.zeros(len(drawn), tokens, 64, dtype=torch.uint8)
    return Batch(torch.zeros(len(drawn), tokens, 64), ids, mask, empty, torch.zeros(*ids.shape, 3), ink, grid)


Scorer = Callable[[Sequence["np.ndarray"], Sequence[Sequence[str]]], float]


class Watch:
    """Draws held-out prompts with the running average every `minutes` (0: never), keeps the sheet and tells the score.

    `note(*words, **figures)` is told. `scorer(pictures, lines)` may be an optical reader: pictures (H, W, 3) uint8 and
    the lines asked of each -> the share of lines read.
    """

    def __init__(
        self,
        folder: Path,
        reader: Reader,
        vae: AutoencoderKLQwenImage,
        minutes: float,
        note: Callable[..., None],
        scorer: Scorer | None = None,
    ):
        self.folder, self.reader, self.vae, self.minutes, self.note = folder, reader, vae, minutes, note
        self.scorer = scorer
        self.last = time.monotonic()
        maker, rng = DesignMaker(9, held_out=True), random.Random(9)
        self.sets = {
            Phrase("english"): (WIDE, [maker.sample(rng, WIDE, "en") for _ in range(12)]),
            Phrase("chinese"): (WIDE, [maker.sample(rng, WIDE, "zh") for _ in range(12)]),
            Phrase("square"): (SQUARE, [maker.sample(rng, SQUARE) for _ in range(12)]),
        }

    def __call__(self, trainer: Trainer) -> None:
        if trainer.rank or not self.minutes or time.monotonic() - self.last < 60 * self.minutes:
            return
        self.look(trainer)

    def look(self, trainer: Trainer) -> dict[str, float]:
        """Draw and score now; returns the share of ink that is right by set, and of lines read."""
        net = NanoNet(NanoConfig.from_dict(trainer.net.config.to_dict())).to(trainer.device)
        net.load_state_dict(trainer.average)
        net.stack.run = plain_block  # not worth compiling for
        words = [Phrase("step {step:,}", step=trainer.clock.step)]
        figures: dict[str, float] = {}
        for name, (size, drawn) in self.sets.items():
            batch = prompts_batch(self.reader, drawn, size).to(trainer.device)
            latents = sample(net, batch, self.reader.prefix, levels())
            pictures = decode(self.vae, latents, batch.grid).cpu()
            self.keep(name, trainer.clock.step, pictures, render([d.design for d in drawn]).cpu())
            figures[f"ink {name}"] = round(self.score(drawn, pictures), 3)
            words.append(Phrase("{set}: {share:.0%} of the ink right", set=name, share=figures[f"ink {name}"]))
            if self.scorer is not None:
                lines = [d.design.lines for d in drawn]
                figures[f"lines {name}"] = round(self.scorer([p.numpy() for p in pictures], lines), 3)
                words.append(Phrase("{share:.0%} of the lines read", share=figures[f"lines {name}"]))
        self.note(*words, step=trainer.clock.step, seen=trainer.clock.seen, **figures)
        self.last = time.monotonic()
        return figures

    def keep(self, name: str, step: int, pictures: Tensor, wanted: Tensor) -> None:
        """A sheet: what was drawn above what was asked."""
        from PIL import Image

        columns = 4
        rows = [torch.cat(list(pair), 0) for pair in zip(pictures, wanted, strict=True)]
        rows = [torch.cat(rows[i : i + columns], 1) for i in range(0, len(rows), columns)]
        folder = self.folder / "sheets"
        folder.mkdir(exist_ok=True)
        Image.fromarray(torch.cat(rows, 0).numpy()).save(folder / f"{name}-{step:06d}.png")

    @staticmethod
    def score(drawn: Sequence[Labelled], pictures: Tensor) -> float:
        """Share of the character cells that look more like the asked character than like none: a quick judge that
        needs no optical reader. A cell counts when its ink correlates with the asked picture above 0.8."""
        right = total = 0
        wanted = render([d.design for d in drawn]).cpu()
        for labelled, drawn_picture, asked in zip(drawn, pictures, wanted, strict=True):
            for glyph in place(labelled.design).glyphs:
                if glyph.character == " ":
                    continue
                box = (
                    slice(8 * glyph.y, 8 * (glyph.y + glyph.height)),
                    slice(8 * glyph.x, 8 * (glyph.x + glyph.width)),
                )
                pair = torch.stack([p[box].float().mean(-1).flatten() for p in (drawn_picture, asked)])
                right += bool(torch.corrcoef(pair)[0, 1] > 0.8)
                total += 1
        return right / max(total, 1)
