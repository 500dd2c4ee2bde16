"""LoRA files: found, and checked against the model before it is built. No torch: only headers are read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

from lanting.core.errors import ModelError
from lanting.specs.numbers import number
from lanting.weights.checkpoint import read_json
from lanting.weights.find import LORAS, ModelFolder
from lanting.weights.headers import read_file
from lanting.weights.home import path_of
from lanting.weights.kinds import PICKLES, pickled
from lanting.weights.linear_names import transformer_linears
from lanting.weights.lora_names import Sides
from lanting.weights.lora_pieces import Piece, read_pieces
from lanting.weights.lora_wishes import NONE, Wishes, wishes_of

STRONGEST = 10.0


@dataclass(frozen=True)
class Lora:
    """A file that fits the model. `pieces` maps paths of Linears to tensors; no tensor is read yet."""

    given: str  # as the person said it: a path, or the name of one the model brings
    path: Path
    strength: float
    pieces: Mapping[str, Piece]
    wishes: Wishes = NONE

    @cached_property
    def sha256(self) -> str:
        """Of the whole file, in hexadecimal."""
        return hash_of(self.path)

    def describe(self) -> dict[str, Any]:
        """For the recipe."""
        return {"name": self.path.name, "sha256": self.sha256, "strength": self.strength, "path": self.given}


def hash_of(path: Path) -> str:
    """sha256 of a file in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def split_strength(text: str) -> tuple[str, float]:
    """ "FILE:0.8" -> ("FILE", 0.8); without a number behind the last colon the strength is 1.

    Raises RequestError unless the strength is from -10 to 10.
    """
    file, colon, tail = text.rpartition(":")
    try:
        strength = float(tail)
    except ValueError:
        return text, 1.0
    if not colon or not file or Path(text).is_file():
        return text, 1.0
    return file, check_strength(strength)


def check_strength(strength: float) -> float:
    """The strength, or a RequestError unless it is from -10 to 10."""
    return number("the strength of a LoRA", strength, -STRONGEST, STRONGEST)


def find_lora(folder: Path, name: str) -> Path:
    """One of the model's own by its plain name, else a file. Raises ModelError."""
    own = {path.stem: path for path in sorted((folder / LORAS).glob("*.safetensors"))}
    if name in own:
        return own[name]
    path = path_of(name)
    if path.suffix in PICKLES:
        raise pickled(name)
    if path.is_file():
        return path
    if path.is_dir():
        raise ModelError("{path} is a folder: name the LoRA file in it", path=name)
    if own:
        raise ModelError(
            "there is no LoRA {name}: give a safetensors file, or one that this model brings: {names}",
            **{"name": name, "names": ", ".join(own)},
        )
    raise ModelError("there is no LoRA {name}: give a safetensors file", name=name)


def find_again(folder: Path, names: Sequence[str], record: Mapping[str, Any]) -> tuple[str, bool]:
    """Under which of the names a recipe's LoRA is found now, and whether it is the same file; the same one is
    preferred. Raises ModelError when none of them is there."""
    here: list[str] = []
    for name in names:
        try:
            path = find_lora(folder, name)
        except ModelError:
            continue
        if hash_of(path) == record["sha256"]:
            return name, True
        here.append(name)
    if not here:
        raise ModelError("the LoRA {name} is not here any more: give it with --lora", name=names[0])
    return here[0], False


def find_loras(folder: ModelFolder, asked: Sequence[str]) -> tuple[Lora, ...]:
    """Every "FILE[:strength]" found and matched with the model's transformer. Raises ModelError or RequestError."""
    if not asked:
        return ()
    linears = transformer_linears(folder.configs["transformer"])
    split = [split_strength(text) for text in asked]
    return tuple(open_lora(find_lora(folder.path, name), linears, name, strength) for name, strength in split)


def open_lora(path: Path, linears: Sides, given: str = "", strength: float = 1.0) -> Lora:
    """Read the header and match every tensor. Raises ModelError naming the first tensor that does not fit."""
    infos, notes = read_file(path)
    reading = read_pieces(path, infos, linears, peft_settings(path, notes))
    if reading.problems:
        raise reading.problems[0]
    return Lora(given or str(path), path, strength, reading.pieces, wishes_of(path, notes))


def peft_settings(path: Path, notes: Mapping[str, str]) -> dict[str, Any]:
    """How PEFT scaled what it wrote: from diffusers' notes in the file, or from the adapter_config.json beside it."""
    if "lora_adapter_metadata" in notes:
        try:
            told = json.loads(notes["lora_adapter_metadata"])
        except (ValueError, RecursionError):
            told = None
        if isinstance(told, dict):
            return {key.removeprefix("transformer."): value for key, value in cast("dict[str, Any]", told).items()}
    beside = path.with_name("adapter_config.json")
    if path.name == "adapter_model.safetensors" and beside.is_file():
        return read_json(beside)
    return {}
