"""Latent replay on a GPU: what `replay.Replay` does, with everything kept on the device and no loop over examples.

Designs arrive in chunks that other processes made (`feed`); they are painted, encoded and stored here. A batch is then
a handful of gathers. Only the lengths of the prompts stay on the CPU: prompts of a batch are equally long. Encoding
hundreds of pictures is two hundred little steps of the autoencoder, recorded once per kind on a GPU (`graphs`).
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from lanting.core.lang import Phrase
from lanting.nn.qwen_vl import picture_positions
from lanting.nn.rope import Grid
from lanting.nn.vae import AutoencoderKLQwenImage
from lanting.specs.sizes import fit_area
from lanting.text.pictures import PictureConfig, smart_resize
from lanting.train.atlas import Atlas
from lanting.train.design import TOKEN
from lanting.train.draw import INK, Plan, paint, paint_ink
from lanting.train.graphs import MOST, Playback, recorder
from lanting.train.presets import Kind
from lanting.train.replay import READER_AREA, Batch, Reader, encode_pictures
from lanting.train.sight import patches_together
from lanting.train.strips import send

if TYPE_CHECKING:
    from lanting.train.feed import Feed

ENCODED = 256  # pictures that the autoencoder takes at once


@dataclass(frozen=True)
class Chunk:
    """Examples of one kind as arrays. The plan holds the targets, then all first references, then all second ones."""

    kind: int
    ids: np.ndarray  # (B, T) int32, right-padded
    lengths: np.ndarray  # (B,) int32
    spots: np.ndarray  # (s, 5) int32: example, token, column, row, width class
    what: np.ndarray  # (B, (1 + k) N, 2) uint8: of the target, then of its pictures
    plan: Plan

    @property
    def count(self) -> int:
        return len(self.lengths)


def picture_cells(size: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
    """((width, height) of a reference as an edit reads it, (rows, columns) of its patches) for a canvas size."""
    first = fit_area(READER_AREA, size[0] / size[1])
    seen = smart_resize(*first, PictureConfig())
    return first, (seen[1] // 14, seen[0] // 14)


def picture_tokens(kind: Kind) -> list[int]:
    """Tokens of each picture in a prompt of this kind."""
    rows, columns = picture_cells(kind.size)[1]
    return [rows * columns // 4] * kind.pictures


@dataclass(frozen=True)
class Pictured(Batch):
    """A batch of edits, whose pictures' tokens stand in the same columns of all prompts."""

    columns: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))  # (c,)


class Ring:
    """Encoded examples of one kind on one device; the oldest make room."""

    def __init__(
        self, kind: Kind, reader: Reader, vae: AutoencoderKLQwenImage, atlas: Atlas, feed: Feed, capacity: int
    ):
        self.kind, self.reader, self.vae, self.atlas, self.feed = kind, reader, vae, atlas, feed
        self.capacity, self.device = capacity, atlas.device
        self.grid: Grid = (1, kind.size[1] // TOKEN, kind.size[0] // TOKEN)
        self.tokens = self.grid[1] * self.grid[2]
        self.first, self.patch_grid = picture_cells(kind.size)
        assert reader.pad is not None and reader.image_token is not None
        self.pad, self.image_token = reader.pad, reader.image_token
        self.filled = self.next = 0
        self.lengths = np.zeros(capacity, np.int16)  # of the prompts, in tokens
        self.silent_ids = silent = reader.read([" "], picture_tokens(kind))[0][0]
        self.silent = torch.tensor(silent, device=self.device)
        columns = [i for i, token in enumerate(silent) if token == self.image_token]
        self.columns = torch.tensor(columns, dtype=torch.long, device=self.device)
        self.playback = (
            Playback(recorder(), Phrase("pictures to be encoded are")) if MOST and self.device.type == "cuda" else None
        )
        pictures, patches = kind.pictures, self.patch_grid[0] * self.patch_grid[1]
        self.latents = self.room(self.tokens * (1 + pictures), 64, dtype=torch.float16)
        self.what = self.room(self.tokens * (1 + pictures), 2, dtype=torch.uint8)
        self.ink = self.room(self.tokens, INK * INK, dtype=torch.uint8)
        self.ids = self.room(len(silent), dtype=torch.int16, value=self.pad)
        self.where = self.room(self.ids.shape[1], 3, dtype=torch.int8, value=-1)
        self.seen = self.room(pictures, patches, 588, dtype=torch.float16) if pictures else None
        self._positions: dict[int, Tensor] = {}

    def room(self, *shape: int, dtype: torch.dtype, value: int = 0) -> Tensor:
        return torch.full((self.capacity, *shape), value, dtype=dtype, device=self.device)

    @property
    def items(self) -> range:
        """What is held, to be counted."""
        return range(self.filled)

    def add(self, count: int, rng: random.Random) -> None:
        """Take in about `count` new examples of any kind, as far as the feed has them; wait only while empty."""
        self.feed.pump(count, self)

    def put(self, chunk: Chunk) -> None:
        """Draw, encode and keep a chunk."""
        count, pictures = chunk.count, self.kind.pictures
        pixels = paint(chunk.plan, self.atlas)  # ((1 + k) B, H, W, 3)
        latents = self.encode(pixels).half().unflatten(0, (1 + pictures, count))
        slots = torch.arange(self.next, self.next + count, device=self.device) % self.capacity
        self.widen(chunk.ids.shape[1])
        width = chunk.ids.shape[1]
        self.latents[slots] = latents.transpose(0, 1).flatten(1, 2)
        self.what[slots] = send(chunk.what, self.device)
        self.ink[slots] = paint_ink(chunk.plan, self.atlas)[:count]
        self.ids[slots, width:] = self.pad
        self.ids[slots, :width] = send(chunk.ids, self.device).to(torch.int16)
        self.where[slots] = -1
        if len(chunk.spots):
            row, token, *spot = send(chunk.spots, self.device).long().unbind(1)
            self.where[slots[row], token] = torch.stack(spot, 1).to(torch.int8)
        if self.seen is not None:
            patches = patches_together(pixels[count:], self.first, self.patch_grid)
            self.seen[slots] = patches.unflatten(0, (pictures, count)).transpose(0, 1)
        self.lengths[np.arange(self.next, self.next + count) % self.capacity] = chunk.lengths
        self.filled = max(self.filled, min(self.capacity, self.next + count))
        self.next = (self.next + count) % self.capacity

    def encode(self, pixels: Tensor) -> Tensor:
        """Latents (B, N, 64) of pictures (B, H, W, 3)."""
        work = lambda x: (encode_pictures(self.vae, x, ENCODED),)  # noqa: E731
        return (work(pixels) if self.playback is None else self.playback("encode", work, [pixels]))[0]

    def widen(self, tokens: int) -> None:
        """Make room for longer prompts than any before."""
        more = tokens - self.ids.shape[1]
        if more > 0:
            self.ids = torch.cat([self.ids, self.room(more, dtype=torch.int16, value=self.pad)], 1)
            self.where = torch.cat([self.where, self.room(more, 3, dtype=torch.int8, value=-1)], 1)

    def draw(self, count: int, rng: random.Random, silence: float = 0.05) -> Batch:
        """A random batch of prompts that are equally long, on the device; see `Replay.draw`."""
        chosen = self.alike(count, np.random.default_rng(rng.getrandbits(64)))
        rows = send(chosen, self.device)
        latents = self.latents[rows].float()
        if rng.random() < silence:
            ids = self.silent.expand(count, -1)
            what = torch.full((count, self.tokens, 2), -1, device=self.device)
            where = torch.full((*ids.shape, 3), -1, device=self.device)
        else:
            width = int(self.lengths[chosen[0]])
            ids = self.ids[rows, :width].long()
            what, where = self.what[rows, : self.tokens].long(), self.where[rows, :width].long()
        batch = Batch(latents[:, : self.tokens], ids, None, what, where, self.ink[rows], self.grid)
        if self.seen is None:
            return batch
        return self.with_pictures(batch, latents, self.seen[rows], self.what[rows, self.tokens :].long())

    def alike(self, count: int, chance: np.random.Generator) -> np.ndarray:
        """Slots (count,) whose prompts are all as long as that of one chosen at random; see `Replay.alike`."""
        lengths = self.lengths[: self.filled]
        same = lengths[:0]
        for _ in range(10):
            same = np.flatnonzero(lengths == lengths[chance.integers(self.filled)])
            if len(same) >= count / 2:
                break
        return chance.choice(same, count)

    def with_pictures(self, batch: Batch, latents: Tensor, half: Tensor, shown: Tensor) -> Batch:
        """The same batch with its references: latents (B, (1 + k) N, 64), patches (B, k, P, 588), what they show
        (B, k N, 2)."""
        patches = half.float().unflatten(-1, (3, 1, 196)).expand(-1, -1, -1, -1, 2, -1).flatten(3)
        return Pictured(
            **vars(batch)
            | {
                "references": latents[:, self.tokens :],
                "shown": shown,
                "patches": patches,
                "patch_grid": self.patch_grid,
                "positions": self.positions(batch.ids.shape[1])[:, None].expand(-1, len(latents), -1),
                "image_token": self.image_token,
                "columns": self.columns,
            }
        )

    def positions(self, width: int) -> Tensor:
        """(3, T) of every prompt of this width: its pictures come first, so all rows have the same."""
        if width not in self._positions:
            row = [*self.silent_ids, *[self.pad] * width][:width]
            cells = [(self.patch_grid[0] // 2, self.patch_grid[1] // 2)] * self.kind.pictures
            found = picture_positions(row, self.image_token, cells) + len(self.reader.prefix)
            self._positions[width] = found.to(self.device)
        return self._positions[width]
