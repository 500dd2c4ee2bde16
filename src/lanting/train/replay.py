"""Latent replay: designs are drawn and encoded once, then met several times with fresh noise.

Encoding a picture costs about a quarter of a training step on it, and the noise is different at every meeting, so
reuse is nearly free variety. The buffer is a ring: old designs make room for new ones. Edits live in buffers of
their own, with their references and what the vision tower sees of them.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import chain

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor

from lanting.flow.latents import pack
from lanting.nn.qwen_vl import picture_positions
from lanting.nn.rope import Grid
from lanting.nn.vae import AutoencoderKLQwenImage
from lanting.specs.sizes import fit_area
from lanting.text.pictures import PictureConfig, picture_patches, smart_resize
from lanting.text.templates import IMAGE_PAD, fill, load_template, opening
from lanting.train.atlas import default_atlas
from lanting.train.design import TOKEN, Design, Placement, place
from lanting.train.designs import DesignMaker
from lanting.train.draw import INK, paint, paint_ink, plan
from lanting.train.edits import Edit, EditMaker
from lanting.train.labels import label_example, label_grid

READER_AREA = 112 * 112  # square pixels of a reference as the vision tower sees it


@dataclass(frozen=True)
class Batch:
    """What one training step on one canvas size needs."""

    latents: Tensor  # (B, N, 64) normalised
    ids: Tensor  # (B, T) behind the prefix, right-padded
    mask: Tensor | None  # (B, T) bool; None: no row is padded
    what: Tensor  # (B, N, 2) digits of the label on each token, -1: do not ask
    where: Tensor  # (B, T, 3) column, row and width class of each quoted character, -1: none
    ink: Tensor  # (B, N, 64) uint8, the shapes without their colours
    grid: Grid
    references: Tensor | None = None  # (B, k N, 64)
    shown: Tensor | None = None  # (B, k N, 2) what the references show, as in `what`
    patches: Tensor | None = None  # (B, k, P, 1176)
    patch_grid: tuple[int, int] = (0, 0)
    positions: Tensor | None = None  # (3, B, T) of the tokens behind the prefix
    image_token: int = -1

    def to(self, device: torch.device | str) -> Batch:
        moved = {k: v.to(device, non_blocking=True) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **moved)

    def starting(self, share: float) -> int:
        """How many rows, the first ones, are trained at t = 1: this share of edits, none of other designs."""
        return 0 if self.references is None else int(share * len(self.ids))

    def pictures_in(self, dtype: torch.dtype) -> Batch:
        """The same with references and patches in another dtype."""
        if self.references is None or self.patches is None:
            return self
        return replace(self, references=self.references.to(dtype), patches=self.patches.to(dtype))


class Reader:
    """Prompts to token ids in an official template, with the constant prefix kept apart."""

    def __init__(self, tokenizer: Tokenizer, template: str = "text-to-image"):
        self.tokenizer, self.template = tokenizer, load_template(template)
        self.prefix: list[int] = tokenizer.encode(opening(self.template), add_special_tokens=False).ids
        self.pad = tokenizer.token_to_id("<|endoftext|>")
        self.image_token: int = tokenizer.token_to_id(IMAGE_PAD) or 0
        self.tail = len(self.template) - self.template.index("{prompt}") - len("{prompt}")

    def read(self, prompts: Sequence[str], pictures: Sequence[int] = ()) -> list[tuple[list[int], list[int]]]:
        """For each prompt its ids behind the prefix, and for each id the index of its first character in the prompt
        (negative before it)."""
        whole = [fill(self.template, p, pictures) for p in prompts]
        found = []
        for prompt, text, e in zip(
            prompts, whole, self.tokenizer.encode_batch(whole, add_special_tokens=False), strict=True
        ):
            first = len(text) - self.tail - len(prompt)
            starts = [start - first for start, _ in e.offsets[len(self.prefix) :]]
            found.append((e.ids[len(self.prefix) :], starts))
        return found

    def padded(self, rows: Sequence[list[int]]) -> tuple[Tensor, Tensor | None]:
        """ids (B, T) and mask (B, T), None where all rows are equally long."""
        longest = max(map(len, rows))
        ids = torch.tensor([row + [self.pad] * (longest - len(row)) for row in rows])
        lengths = torch.tensor([len(row) for row in rows])
        mask = torch.arange(longest)[None] < lengths[:, None]
        return ids, None if bool(mask.all()) else mask


@cache
def statistics(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    return torch.tensor(mean, device=device).view(1, -1, 1, 1), torch.tensor(std, device=device).view(1, -1, 1, 1)


@torch.no_grad()
def encode_pictures(vae: AutoencoderKLQwenImage, pixels: Tensor, chunk: int = 16) -> Tensor:
    """uint8 (B, H, W, 3) -> packed, normalised latents (B, N, 64) on the autoencoder's device."""
    parameter = next(vae.parameters())
    mean, std = statistics(vae.config.latents_mean, vae.config.latents_std, parameter.device)
    x = pixels.to(parameter.device).permute(0, 3, 1, 2).float() / 127.5 - 1
    x = x.to(parameter.dtype, memory_format=torch.channels_last)
    latents = torch.cat([vae.encode(part)[0].float() for part in x.split(chunk)])
    return pack((latents - mean) / std)


@dataclass
class Item:
    """One kept example."""

    ids: list[int]
    where: list[tuple[int, int, int, int]]  # token, column, row, width class


class Replay:
    """A ring of encoded designs of one canvas size."""

    pictures = 0

    def __init__(
        self,
        vae: AutoencoderKLQwenImage,
        reader: Reader,
        maker: DesignMaker | EditMaker,
        size: tuple[int, int],
        capacity: int,
    ):
        self.vae, self.reader, self.maker, self.size, self.capacity = vae, reader, maker, size, capacity
        self.grid: Grid = (1, size[1] // TOKEN, size[0] // TOKEN)
        self.tokens = self.grid[1] * self.grid[2]
        self.latents = torch.zeros(capacity, self.tokens * (1 + self.pictures), 64, dtype=torch.float16)
        self.what = torch.zeros(capacity, self.tokens * (1 + self.pictures), 2, dtype=torch.uint8)
        self.ink = torch.zeros(capacity, self.tokens, INK * INK, dtype=torch.uint8)
        self.items: list[Item] = []
        self.lengths = np.zeros(capacity, dtype=np.int16)  # of the prompts, in tokens
        self.next = 0
        self.silent = Item(reader.read([" "], self.counts())[0][0], [])

    def counts(self) -> list[int]:
        """Tokens of each picture in the prompt."""
        return []

    def add(self, count: int, rng: random.Random) -> None:
        """Draw, encode and keep `count` new designs."""
        assert isinstance(self.maker, DesignMaker)
        drawn = [self.maker.sample(rng, self.size) for _ in range(count)]
        designs = [labelled.design for labelled in drawn]
        placements = [place(d) for d in designs]
        drawing, atlas = plan(designs, placements, default_atlas()), default_atlas()
        latents = encode_pictures(self.vae, paint(drawing, atlas)).half().cpu()
        slots = self.keep(latents, [d.prompt for d in drawn], [designs], [placements])
        self.ink[slots] = paint_ink(drawing, atlas)

    def keep(
        self,
        latents: Tensor,
        prompts: Sequence[str],
        designs: Sequence[Sequence[Design]],
        placements: Sequence[Sequence[Placement]],
    ) -> list[int]:
        """Store examples, whose targets come first, then all first references and so on; returns the slots they
        took."""
        read = self.reader.read(prompts, self.counts())
        slots = []
        for i, (ids, starts) in enumerate(read):
            drawn, placed = [each[i] for each in designs], [each[i] for each in placements]
            where = label_example(drawn, placed, prompts[i], starts)
            slot = self.next
            self.items[slot : slot + 1] = [Item(ids, where)]
            self.lengths[slot] = len(ids)
            self.latents[slot] = latents[i]
            grids = [torch.from_numpy(label_grid(*pair)).flatten(0, 1) for pair in zip(drawn, placed, strict=True)]
            self.what[slot] = torch.cat(grids)
            self.next = (self.next + 1) % self.capacity
            slots.append(slot)
        return slots

    def draw(self, count: int, rng: random.Random, silence: float = 0.05) -> Batch:
        """A random batch of prompts that are equally long, so that nothing is padded.

        In a share `silence` of the batches every prompt is one space, for classifier-free guidance.
        """
        chosen = self.alike(count, rng)
        quiet = rng.random() < silence
        items = [self.silent if quiet else self.items[i] for i in chosen]
        ids, mask = self.reader.padded([item.ids for item in items])
        where = torch.full((*ids.shape, 3), -1)
        spots = [(b, *spot) for b, item in enumerate(items) for spot in item.where]
        if spots:
            table = torch.tensor(spots)
            where[table[:, 0], table[:, 1]] = table[:, 2:]
        what = self.what[chosen, : self.tokens].long()
        if quiet:
            what.fill_(-1)
        latents = self.latents[chosen].float()
        batch = Batch(latents[:, : self.tokens], ids, mask, what, where, self.ink[chosen], self.grid)
        return batch if not self.pictures else self.with_pictures(batch, latents, chosen)

    def alike(self, count: int, rng: random.Random) -> list[int]:
        """Slots whose prompts are all as long as that of one chosen at random; some may come twice.

        Rare lengths, of fewer than half of `count` prompts, are passed over unless ten tries find no other.
        """
        lengths = self.lengths[: len(self.items)]
        for _ in range(10):
            same = np.flatnonzero(lengths == lengths[rng.randrange(len(lengths))])
            if len(same) >= count / 2:
                break
        return [int(same[rng.randrange(len(same))]) for _ in range(count)]

    def with_pictures(self, batch: Batch, latents: Tensor, chosen: Sequence[int]) -> Batch:
        raise NotImplementedError


class EditReplay(Replay):
    """A ring of encoded edits with `pictures` references each."""

    def __init__(
        self,
        vae: AutoencoderKLQwenImage,
        reader: Reader,
        maker: EditMaker,
        size: tuple[int, int],
        capacity: int,
        pictures: int = 1,
    ):
        self.pictures = pictures  # the width of the ring depends on it
        seen = smart_resize(*fit_area(READER_AREA, size[0] / size[1]), PictureConfig())
        self.patch_grid = (seen[1] // 14, seen[0] // 14)
        super().__init__(vae, reader, maker, size, capacity)
        self.seen = torch.zeros(capacity, pictures, self.patch_grid[0] * self.patch_grid[1], 588, dtype=torch.float16)

    def counts(self) -> list[int]:
        return [self.patch_grid[0] * self.patch_grid[1] // 4] * self.pictures

    def add(self, count: int, rng: random.Random) -> None:
        """Draw, encode and keep `count` new edits."""
        assert isinstance(self.maker, EditMaker)
        edits: list[Edit] = [self.maker.sample(rng, self.size, pictures=self.pictures) for _ in range(count)]
        designs = [[e.target for e in edits], *([e.sources[k] for e in edits] for k in range(self.pictures))]
        placements = [[place(d) for d in each] for each in designs]
        atlas = default_atlas()
        drawing = plan(list(chain(*designs)), list(chain(*placements)), atlas)
        pixels = paint(drawing, atlas)
        latents = encode_pictures(self.vae, pixels).half().cpu().unflatten(0, (1 + self.pictures, count))
        latents = latents.transpose(0, 1).flatten(1, 2)  # (count, (1 + k) N, 64)
        slots = self.keep(latents, [e.instruction for e in edits], designs, placements)
        self.ink[slots] = paint_ink(drawing, atlas)[:count]
        references = pixels[count:].cpu().numpy()
        for j, slot in enumerate(slots):
            for k in range(self.pictures):
                self.seen[slot, k] = patches_of(references[k * count + j])

    def with_pictures(self, batch: Batch, latents: Tensor, chosen: Sequence[int]) -> Batch:
        half = self.seen[chosen].float().unflatten(-1, (3, 1, 196))
        patches = half.expand(-1, -1, -1, -1, 2, -1).flatten(3)  # (B, k, P, 1176)
        cells = [(self.patch_grid[0] // 2, self.patch_grid[1] // 2)] * self.pictures
        offset = len(self.reader.prefix)
        rows = [picture_positions(row, self.reader.image_token, cells) + offset for row in batch.ids.tolist()]
        return replace(
            batch,
            references=latents[:, self.tokens :],
            shown=self.what[chosen, self.tokens :].long(),
            patches=patches,
            patch_grid=self.patch_grid,
            positions=torch.stack(rows, 1),
            image_token=self.reader.image_token,
        )


def patches_of(picture: np.ndarray) -> Tensor:
    """What the vision tower sees of a reference (H, W, 3) uint8: (P, 588) float16, one of the two equal frames."""
    image = Image.fromarray(picture)
    small = image.resize(fit_area(READER_AREA, image.width / image.height), Image.Resampling.LANCZOS)
    patches, _ = picture_patches(small)
    return patches.unflatten(-1, (3, 2, 196))[:, :, 0].flatten(1).half()
