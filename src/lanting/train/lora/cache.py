"""What a LoRA is trained on, computed once: latents of pictures and references, and the reader's states of captions.

Text encoder and autoencoder are as large as the transformer's share of a small card, and say the same at every step. So
they see each example once, through the very functions that drawing uses, and are gone before training begins. What they
said is kept in files beside the LoRA, under names that change with anything that would change it: a run that is begun
again reads them back.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lanting.core.files import replace_file, unwritable
from lanting.core.pictures import open_picture
from lanting.engine.models import Models
from lanting.engine.studio import EngineStudio
from lanting.flow.loop import Conditioning, Grid
from lanting.tasks.edit import for_reader, references
from lanting.tasks.pictures import cover, to_mode
from lanting.tasks.studio import look_at
from lanting.train.kept import write_tensors
from lanting.train.lora.dataset import Example

VERSION = "1"  # of these files


@dataclass(frozen=True, slots=True)
class CachedExample:
    """An example as the transformer meets it; on the CPU."""

    clean: Tensor  # (1, N, C), the picture's tokens
    grid: Grid
    words: Conditioning  # of the caption, (1, T, D)
    empty: Conditioning  # of no words, beside the same references
    references: Tensor  # (1, R, C), all of them
    grids: tuple[Grid, ...]  # one a reference


def key_of(models: Models, example: Example) -> str:
    """A name that says everything the example's states depend on."""
    parts = [VERSION, models.fingerprint, str(models.dtype), example.caption]
    parts += [f"{example.size}", models.spec.name]
    digest = hashlib.sha256("\n".join(parts).encode())
    for path in (example.picture, *example.references):
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:32]


def prepare(models: Models, examples: Sequence[Example], folder: Path, tell: Callable[[int, int], None]) -> list[Path]:
    """A file for every example, in their order; those that are there and whole stay. `tell(done, all)` after each.
    Raises OutputError where the folder can't be made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(folder, error) from None
    paths = [folder / f"{key_of(models, one)}.safetensors" for one in examples]
    missing = [i for i, path in enumerate(paths) if not whole(path)]
    if missing and examples[0].references:
        models.see_pictures()
    studio = EngineStudio(models)
    for done, index in enumerate(missing, 1):
        seen = encode(studio, examples[index])
        replace_file(paths[index], lambda part, seen=seen: save(seen, part))
        tell(done, len(missing))
    return paths


def whole(path: Path) -> bool:
    """Whether a file is there, and of the length that its header says."""
    try:
        with safe_open(str(path), framework="pt"):
            return True
    except (OSError, SafetensorError):
        return False


@torch.no_grad()
def encode(studio: EngineStudio, example: Example) -> CachedExample:
    """One example through the autoencoder and the reader. The picture fills its size, what sticks out is cut; what is
    transparent shows white, as it does in references."""
    picture = cover(to_mode(open_picture(example.picture)), example.size)
    images = tuple(open_picture(path) for path in example.references)
    clean = look_at(studio, picture, example.size)
    beside = references(studio, images)
    shown = for_reader(studio, images) if images else ()
    words, empty = (studio.encode_prompt([text], shown) for text in (example.caption, " "))
    rows = [one.data.cpu() for one in beside]
    none = clean.data.new_empty(1, 0, clean.data.shape[2]).cpu()
    grids = tuple(one.grid for one in beside)
    return CachedExample(clean.data.cpu(), clean.grid, words, empty, torch.cat(rows, 1) if rows else none, grids)


def save(seen: CachedExample, path: Path) -> None:
    tensors = {"clean": seen.clean, "references": seen.references}
    for name, side in (("words", seen.words), ("empty", seen.empty)):
        tensors[name] = side.embeds.cpu()
        tensors[f"{name}.places"] = torch.tensor(side.places, dtype=torch.long)
    tensors["grids"] = torch.tensor([seen.grid, *seen.grids])
    write_tensors(path, {name: tensor.contiguous() for name, tensor in tensors.items()})


def load(path: Path) -> CachedExample:
    """The inverse of `save`."""
    with safe_open(str(path), framework="pt") as file:
        held = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  no mapping
    grid, *grids = (tuple(row) for row in held["grids"].tolist())
    words, empty = (
        Conditioning(held[name], None, tuple(held[f"{name}.places"].tolist())) for name in ("words", "empty")
    )
    return CachedExample(held["clean"], grid, words, empty, held["references"], tuple(grids))
