"""GGUF files as checkpoints: official names, packed weights as they are, and what is stored in pieces put together.

`read` gives packed matrices as bytes, uint8 (rows, bytes of a row), with their block type in `infos`; `nn.dequant`
knows what they mean. Pieces of one block type are joined as bytes too; of several types, as float32.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lanting.core.errors import ModelError
from lanting.nn.blocks import TYPES
from lanting.weights.checkpoint import Checkpoint
from lanting.weights.gguf import GgufHeader, read_gguf
from lanting.weights.gguf_names import (
    Pieces,
    is_projector,
    joined,
    joint_info,
    official,
    text_config,
    vision_config,
)
from lanting.weights.headers import TensorInfo, damaged

if TYPE_CHECKING:  # headers are read without it
    from torch import Tensor


@dataclass(frozen=True)
class GgufCheckpoint(Checkpoint):
    """A checkpoint some of whose tensors lie in pieces: `pieces[name]` says which, `parts` is where those are."""

    pieces: Mapping[str, Pieces] = field(default_factory=dict[str, Pieces])
    parts: Checkpoint | None = None  # under the file's own names

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for name in names:
            if name in self.pieces and self.parts is not None:
                found[name] = join(self.parts, self.pieces[name])
            else:
                found |= super().read([name])
        return found

    def renamed(self, names: Mapping[str, str], label: str = "") -> Checkpoint:
        pieces = {new: self.pieces[old] for new, old in names.items() if old in self.pieces}
        return replace(super().renamed(names, label), pieces=pieces)  # type: ignore[call-arg]


def join(parts: Checkpoint, pieces: Pieces) -> Tensor:
    """Read and put together."""
    import torch

    from lanting.nn.dequant import dequantize

    tensors = list(parts.read(pieces.names).values())
    infos = [parts.infos[name] for name in pieces.names]
    if len({info.dtype for info in infos}) > 1:
        tensors = [
            dequantize(tensor, info.dtype).view(info.shape) if TYPES[info.dtype].packed else tensor.float()
            for tensor, info in zip(tensors, infos, strict=True)
        ]
    return torch.stack(tensors, pieces.axis) if pieces.axis else torch.cat(tensors)


def open_gguf(path: Path) -> GgufCheckpoint:
    """A GGUF file under official names; a ModelError says what is wrong with it."""
    return view(path, read_gguf(path))


def view(path: Path, header: GgufHeader) -> GgufCheckpoint:
    """A file whose header was read already."""
    pieces = joined(header.tensors)
    infos: dict[str, TensorInfo] = {}
    for name, piece in pieces.items():
        info = joint_info([header.tensors[part] for part in piece.names], piece.axis)
        if info is None:
            raise damaged(path, "the pieces of {name} don't fit together", name=name)
        infos[name] = info
    used = {part for piece in pieces.values() for part in piece.names}
    for stored, info in header.tensors.items():
        name = official(stored)
        if name in infos and stored not in used:
            raise damaged(path, "it has two tensors for {name}", name=name)
        if stored not in used:
            infos[name] = info
    metadata = {key: value for key, value in header.metadata.items() if isinstance(value, str)}
    parts = Checkpoint(path.name, dict.fromkeys(header.tensors, path), header.tensors)
    where = dict.fromkeys(infos, path)
    return GgufCheckpoint(path.name, where, infos, metadata, pieces=pieces, parts=parts)


def _pair(one: GgufCheckpoint, two: GgufCheckpoint) -> GgufCheckpoint:
    """The tensors of two files as one checkpoint."""
    assert one.parts is not None and two.parts is not None
    if twins := sorted(set(one.infos) & set(two.infos)):
        raise ModelError(
            "{one} and {two} both hold {name}: they are not two halves of one encoder",
            **{"one": one.label, "two": two.label, "name": twins[0]},
        )
    parts = Checkpoint(one.label, {**one.parts.where, **two.parts.where}, {**one.parts.infos, **two.parts.infos})
    return GgufCheckpoint(
        one.label,
        {**one.where, **two.where},
        {**one.infos, **two.infos},
        {**two.metadata, **one.metadata},
        pieces={**one.pieces, **two.pieces},
        parts=parts,
    )


def open_text_encoder_gguf(path: Path) -> tuple[GgufCheckpoint, dict[str, Any]]:
    """Qwen2.5-VL from a language model file, with the vision tower of an "mmproj" file beside it where there is one.

    Returns the checkpoint and what its metadata says of a config.json, empty where the file says nothing of itself.
    Raises ModelError for another model's file.
    """
    header = read_gguf(path)
    if is_projector(header):
        raise ModelError(
            "{path} holds only the half that sees: name the language model's GGUF file, and leave this one beside it",
            path=str(path),
        )
    if header.architecture not in ("qwen2vl", ""):
        raise ModelError(
            "{path} is a model of another kind ({kind}): Qwen-Image listens to Qwen2.5-VL-7B",
            path=str(path),
            kind=header.architecture,
        )
    config = text_config(header)
    language = view(path, header)
    beside = find_projector(path, config.get("hidden_size"))
    vision = {"out_hidden_size": config.get("hidden_size")} if beside is None else vision_config(beside[1])
    config = config | {"vision_config": vision} if config and vision else config
    return (language if beside is None else _pair(language, view(*beside))), own_config(path, header) or config


def own_config(path: Path, header: GgufHeader) -> dict[str, Any]:
    """The config.json that our writer kept in a file; empty in files of others."""
    try:
        config = json.loads(str(header.metadata.get("lanting.config", "{}")))
    except (ValueError, RecursionError):
        config = None
    if not isinstance(config, dict):
        raise damaged(path, "its note lanting.config can't be read")
    return config


def find_projector(path: Path, width: int | None) -> tuple[Path, GgufHeader] | None:
    """The vision tower in the same folder whose outputs have this width. Of several the smallest that is not
    quantized: publishers put the same tower beside a model in two or three precisions."""
    found: list[tuple[bool, int, Path, GgufHeader]] = []
    for other in sorted(path.parent.glob("*.gguf")):
        if other == path or "mmproj" not in other.name.lower():
            continue
        try:
            header = read_gguf(other)
        except ModelError:
            continue
        if not is_projector(header) or (width and vision_config(header).get("out_hidden_size", width) != width):
            continue
        quantized = any(TYPES[info.dtype].packed for info in header.tensors.values())
        found.append((quantized, other.stat().st_size, other, header))
    return min(found, key=lambda item: item[:3])[2:] if found else None
