"""One read-only view {name: tensor} over the safetensors files of a component, memory-mapped.

Shards are found through their index and never counted; every header is validated before a byte is mapped, so a
damaged, truncated or missing file is one sentence instead of a crash half way through 41 GB.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from lanting.core.errors import ModelError
from lanting.weights.headers import TensorInfo, read_header

if TYPE_CHECKING:  # headers and configs are read without it: `lanting show` answers at once
    from torch import Tensor

STEMS = ("diffusion_pytorch_model", "model")  # how diffusers and transformers name a component's weights


@dataclass(frozen=True)
class Checkpoint:
    """Tensors of one component. `where[name]` is the file that holds it, `infos[name]` its header entry."""

    label: str  # for messages: "transformer of DIR"
    where: Mapping[str, Path]
    infos: Mapping[str, TensorInfo]

    def names(self) -> tuple[str, ...]:
        return tuple(self.where)

    def tensors(self, leave: tuple[str, ...] = ()) -> Iterator[tuple[str, Tensor]]:
        """All (name, tensor), file by file; a tensor is a view of the mapped file until it is cast or moved.
        Names that start with one of `leave` are passed over."""
        for path in sorted(set(self.where.values())):
            try:
                with safe_open(str(path), framework="pt") as handle:
                    for name in sorted(n for n, p in self.where.items() if p == path and not n.startswith(leave)):
                        yield name, handle.get_tensor(name)
            except (SafetensorError, OSError) as error:
                raise ModelError(f"{path} can't be read ({error}); download it again.") from None

    def bytes(self) -> int:
        return sum(info.end - info.start for info in self.infos.values())

    def fingerprint(self) -> str:
        """A hash of what the files say they hold (names, types, shapes, places) and of samples of their contents:
        64 kB from the middle of every file, so that 41 GB need not be read to notice other weights."""
        digest = hashlib.sha256()
        for path in sorted(set(self.where.values())):
            size = path.stat().st_size
            digest.update(f"{path.name}:{size}".encode())
            with path.open("rb") as file:
                digest.update(file.read(min(size, 1 << 20)))
                file.seek(max(0, size // 2))
                digest.update(file.read(1 << 16))
        return digest.hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file, or a sentence."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path} is missing; the model folder is incomplete, download it again.") from None
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise ModelError(f"{path} is not a readable JSON file ({error}); download it again.") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path} should hold a JSON object; download it again.")
    return value


def open_component(folder: Path) -> Checkpoint:
    """The checkpoint in a component folder: sharded with an index, or one safetensors file.

    Raises ModelError when nothing is there, a shard is missing, or the index and the files disagree.
    """
    label = f"{folder.name} of {folder.parent}"
    for stem in STEMS:
        index = folder / f"{stem}.safetensors.index.json"
        if index.is_file():
            return from_index(label, index)
        single = folder / f"{stem}.safetensors"
        if single.is_file():
            infos = read_header(single)
            return Checkpoint(label, dict.fromkeys(infos, single), infos)
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt")):
        raise ModelError(f"{folder} holds pickled weights, which can run code; get the safetensors files instead.")
    raise ModelError(f"{folder} holds no safetensors weights; the model folder is incomplete, download it again.")


def from_index(label: str, index: Path) -> Checkpoint:
    """Follow `weight_map` (tensor name -> file name in the same folder)."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{index} has no weight_map; download it again.")
    where: dict[str, Path] = {}
    infos: dict[str, TensorInfo] = {}
    headers: dict[str, Mapping[str, TensorInfo]] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise ModelError(f"{index} points outside its folder ({file!r}); don't use this model.")
        if file not in headers:
            path = index.with_name(file)
            if not path.is_file():
                raise ModelError(f"{path} is missing: the index names it as a shard; download it again.")
            headers[file] = read_header(path)
        if name not in headers[file]:
            raise ModelError(f"{index.with_name(file)} lacks the tensor {name} that its index promises.")
        where[name], infos[name] = index.with_name(file), headers[file][name]
    return Checkpoint(label, where, infos)
