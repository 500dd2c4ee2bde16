"""Designs, prompts and labels as arrays, made by other processes for the rings of a GPU.

Choosing a design, phrasing it and cutting the prompt into tokens takes about a millisecond and no tensors. The trainer
takes in what is there and never waits once every kind has a first stock: where workers are too slow, designs are met
more often, and the log says how often.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from lanting.nn.vae import AutoencoderKLQwenImage
from lanting.train.course import STOCK, Course
from lanting.train.design import place
from lanting.train.designs import DesignMaker, Mix
from lanting.train.draw import plan
from lanting.train.edits import EditMaker
from lanting.train.labels import label_example, label_grid
from lanting.train.presets import Kind, Preset, room
from lanting.train.replay import Reader
from lanting.train.ring import Chunk, Ring, picture_tokens
from lanting.train.workers import Workers, kept_atlas

ROUND = 4  # prompts are lengthened with spaces to a multiple: a step is recorded once for every length there is
BURST = 4  # chunks taken in at once when the trainer lags behind
CHUNK, LARGE = 128, 384  # examples of a chunk: taking in a large one is hardly more work for the trainer


@dataclass(frozen=True)
class FeedOrder:
    """What workers make; small, since it travels to every one of them."""

    kinds: tuple[Kind, ...]
    tokenizer: str  # file
    atlas: str  # file, see `workers.kept_atlas`
    seed: int
    workers: int
    chunk: int = CHUNK  # examples at least; fewer than usual where rings are small
    mix: Mix = field(default_factory=Mix)

    def count(self, kind: Kind) -> int:
        """Examples of a chunk of this kind: as many as a batch has, within limits."""
        return self.chunk if self.chunk < CHUNK else max(self.chunk, min(LARGE, kind.batch))

    def maker(self, number: int) -> ChunkMaker:
        return ChunkMaker(self, number)


def edit_mix(mix: Mix) -> Mix:
    """Edits start from designs with more pictograms."""
    return replace(mix, pictogram=0.5)


class ChunkMaker:
    """Makes the chunks of one worker."""

    def __init__(self, order: FeedOrder, number: int):
        tokenizer = Tokenizer.from_file(order.tokenizer)
        self.order, self.atlas = order, kept_atlas(Path(order.atlas))
        self.readers = Reader(tokenizer), Reader(tokenizer, "edit-plus")
        (self.space,) = tokenizer.encode(" ", add_special_tokens=False).ids
        self.rng = random.Random(order.seed * 100_003 + number)
        self.designs = DesignMaker(0, mix=order.mix)
        self.edits = EditMaker(0, mix=edit_mix(order.mix))
        self.weights = [kind.share * kind.fresh / order.count(kind) for kind in order.kinds]
        self.turn = number  # of the chunks of all workers together

    def choose(self) -> int:
        """The kind of the next chunk: all in turn until each has its first stock, then as often as training asks."""
        kinds = len(self.weights)
        opening = kinds * -(-STOCK // self.order.chunk)
        turn, self.turn = self.turn, self.turn + self.order.workers
        return turn % kinds if turn < opening else self.rng.choices(range(kinds), self.weights)[0]

    def make(self, hanzi: int) -> Chunk:
        """The next chunk, with `hanzi` Chinese characters in use."""
        for maker in (self.designs, self.edits.designs):
            if maker.mix.hanzi != hanzi:
                maker.change(replace(maker.mix, hanzi=hanzi))
        return self.chunk(self.choose())

    def chunk(self, number: int) -> Chunk:
        """A chunk of one kind."""
        chosen = self.order.kinds[number]
        count = self.order.count(chosen)
        if not chosen.pictures:
            drawn = [self.designs.sample(self.rng, chosen.size) for _ in range(count)]
            whole, prompts = [d.design for d in drawn], [d.prompt for d in drawn]
        else:
            edits = [self.edits.sample(self.rng, chosen.size, pictures=chosen.pictures) for _ in range(count)]
            prompts = [e.instruction for e in edits]
            whole = [*(e.target for e in edits), *(e.sources[k] for k in range(chosen.pictures) for e in edits)]
        placements = [place(design) for design in whole]
        read = self.readers[bool(chosen.pictures)].read(prompts, picture_tokens(chosen))
        spots = []
        for row, (_, starts) in enumerate(read):
            found = label_example(whole[row::count], placements[row::count], prompts[row], starts)
            spots += [(row, *spot) for spot in found]
        what = [label_grid(d, p).reshape(-1, 2) for d, p in zip(whole, placements, strict=True)]
        rows = [
            lengthened(ids, starts, len(prompt), self.space)
            for (ids, starts), prompt in zip(read, prompts, strict=True)
        ]
        return Chunk(
            number,
            pad(rows, self.readers[0].pad),
            np.array([len(row) for row in rows], np.int32),
            np.array(spots, np.int32).reshape(-1, 5),
            by_example(np.stack(what), count),
            plan(whole, placements, self.atlas),
        )


def lengthened(ids: list[int], starts: Sequence[int], end: int, space: int) -> list[int]:
    """The ids of a prompt of `end` characters with as many spaces behind it as make a multiple of `ROUND`."""
    tail = next((i for i, start in enumerate(starts) if start >= end), len(ids))
    return [*ids[:tail], *[space] * (-len(ids) % ROUND), *ids[tail:]]


def by_example(what: np.ndarray, count: int) -> np.ndarray:
    """Labels of the targets, then of the first pictures of `count` examples and so on: (k B, N, 2) -> (B, k N, 2)."""
    return what.reshape(-1, count, *what.shape[1:]).swapaxes(0, 1).reshape(count, -1, 2)


def pad(rows: Sequence[Sequence[int]], value: int | None) -> np.ndarray:
    """(B, T) int32, right-padded to the longest."""
    assert value is not None
    longest = max(map(len, rows))
    return np.array([[*row, *[value] * (longest - len(row))] for row in rows], np.int32)


class Feed(Workers):
    """The workers of one trainer, and the rings they feed."""

    def __init__(self, order: FeedOrder, ahead: int = 0):
        super().__init__(order, order.workers, ahead, order.mix.hanzi)
        self.order = order
        self.rings: list[Ring] = []
        self.owed = 0
        self.taken = self.missed = 0  # examples taken in since the first stock; times none was there
        self.busy = 0.0  # seconds spent here since the first stock

    def courses(self, vae: AutoencoderKLQwenImage, tokenizer: Tokenizer, preset: Preset) -> list[Course]:
        """Every kind of batch, kept on the autoencoder's device."""
        atlas = kept_atlas(Path(self.order.atlas)).to(next(vae.parameters()).device)
        readers = Reader(tokenizer), Reader(tokenizer, "edit-plus")
        found = []
        for kind in self.order.kinds:
            ring = Ring(
                kind, readers[bool(kind.pictures)], vae, atlas, self, max(room(kind, preset), self.order.count(kind))
            )
            self.rings.append(ring)
            found.append(Course(kind.name, ring, kind.share, kind.batch, kind.fresh, kind.early))
        return found

    def fill(self) -> float:
        """Wait for a first stock of every kind; returns the seconds that took."""
        began = time.monotonic()
        for ring in self.rings:
            self.pump(0, ring)
        self.waited = 0.0
        return time.monotonic() - began

    def change(self, hanzi: int) -> None:
        """Use more Chinese characters from now on (what is queued was made before)."""
        self.hanzi.value = hanzi

    def pump(self, count: int, asking: Ring) -> None:
        """Take in what is there, up to what is owed; wait only while `asking` has too little to begin with."""
        least = min(STOCK, asking.capacity)
        if asking.filled < least:
            while asking.filled < least:
                self.store(self.wait())
            return
        began = time.monotonic()
        self.owed = min(self.owed + count, BURST * self.order.chunk)
        while self.owed >= self.order.chunk:
            chunk = self.take()
            if chunk is None:
                self.missed += 1
                break
            self.store(chunk)
            self.taken += chunk.count
            self.owed -= chunk.count
        self.busy += time.monotonic() - began

    def store(self, chunk: Chunk) -> None:
        self.rings[chunk.kind].put(chunk)

    def figures(self, seen: int, seconds: float) -> dict[str, float]:
        """Since the last call: how full the queue is, the shares of time spent waiting for it and taking from it, how
        often each design was met, and how often nothing was there."""
        found = {
            "queue": round(self.level(), 2),
            "waited": round(self.waited / max(seconds, 1e-9), 3),
            "feeding": round(self.busy / max(seconds, 1e-9), 3),
            "reuse": round(seen / max(self.taken, 1), 1),
            "missed": float(self.missed),
        }
        self.taken = self.missed = 0
        self.waited = self.busy = 0.0
        return found
