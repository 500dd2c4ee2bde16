"""One read-only view {name: tensor} over the weight files of a component, memory-mapped.

Shards are found through their index and never counted; every header is validated before a byte is mapped, so a
damaged, truncated or missing file is one sentence instead of a crash half way through 41 GB.

Each tensor is a mapping of its own, made when it is asked for and gone when the last view of it is: reading one block
of sixty, in any order and from any thread, touches that block's bytes and nothing else, and what has been copied
elsewhere leaves no pages behind. Rejected: the safetensors library's handle, which maps a file as a whole and keeps
all of it for as long as one tensor lives, and which knows no GGUF.
"""

from __future__ import annotations

import hashlib
import json
import mmap
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lanting.core.errors import ModelError
from lanting.core.lang import Phrase
from lanting.nn.blocks import TYPES
from lanting.weights.headers import TensorInfo, read_file
from lanting.weights.schemes.dfloat11 import CONFIG, Coded, with_decoded
from lanting.weights.schemes.foreign import APART, PACKING, as_weights, contradicts
from lanting.weights.schemes.mlx import translated
from lanting.weights.schemes.svdq import named

if TYPE_CHECKING:  # headers and configs are read without it: `lanting show` answers at once
    from torch import Tensor

STEMS = ("diffusion_pytorch_model", "model")  # how diffusers and transformers name a component's weights
LAYER_NOTES = "_quantization_metadata"  # in a safetensors file's metadata: how single layers are packed
TORCH = {  # what the formats call a type, and what torch does
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "I16": "int16",
    "U16": "uint16",
    "F16": "float16",
    "BF16": "bfloat16",
    "I32": "int32",
    "U32": "uint32",
    "F32": "float32",
    "C64": "complex64",
    "F64": "float64",
    "I64": "int64",
    "U64": "uint64",
}


@dataclass(frozen=True)
class Checkpoint:
    """Tensors of one component under our names. `where[name]` is the file that holds it, `infos[name]` its header
    entry there; a GGUF entry has a block type for its dtype, and the shape that its values have."""

    label: str  # for messages: "transformer of DIR"
    where: Mapping[str, Path]
    infos: Mapping[str, TensorInfo]
    metadata: Mapping[str, str] = field(default_factory=dict[str, str])  # the files' own notes
    layers: Mapping[str, Any] = field(default_factory=dict[str, Any])  # what they note of single layers, by path

    def names(self) -> tuple[str, ...]:
        return tuple(self.where)

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """These tensors, as views of the mapped files; GGUF's packed ones as bytes, uint8 (rows, bytes of a row).

        Writing to them changes this process's copy and never the file. Raises KeyError for a name that is not here.
        """
        found: dict[str, Tensor] = {}
        for name in names:
            try:
                found[name] = map_tensor(self.where[name], self.infos[name])
            except ValueError as error:  # of what is decoded
                raise contradicts(self, name, str(error)) from None
            except OSError as error:
                raise ModelError(
                    "{path} can't be read ({error}): download it again", path=self.where[name], error=str(error)
                ) from None
        return found

    def raw(self, name: str, most: int = 1 << 20) -> bytes:
        """A small tensor's bytes, without torch. Raises ModelError above `most` bytes."""
        info, path = self.infos[name], self.where[name]
        if info.size > most:
            raise ModelError(
                "{path} has {size:,} bytes in {name}, where a short note belongs: download it again",
                **{"path": path, "size": info.size, "name": name},
            )
        with path.open("rb") as file:
            file.seek(info.start)
            return file.read(info.size)

    def tensors(self, leave: tuple[str, ...] = ()) -> Iterator[tuple[str, Tensor]]:
        """All (name, tensor) in the order of their bytes, file by file; a tensor is a view of the mapped file until
        it is cast or moved. Names that start with one of `leave` are passed over."""
        for name in sorted(self.where, key=lambda name: (self.where[name], self.infos[name].start)):
            if not name.startswith(leave):
                yield name, self.read([name])[name]

    def renamed(self, names: Mapping[str, str], label: str = "") -> Checkpoint:
        """The same tensors under other names: ours -> what they are called here. Others are left out."""
        return replace(
            self,
            label=label or self.label,
            where={new: self.where[old] for new, old in names.items()},
            infos={new: self.infos[old] for new, old in names.items()},
            layers={
                new.removesuffix(".weight"): self.layers[path]
                for new, old in names.items()
                if (path := old.removesuffix(".weight")) != old and path in self.layers
            },
        )

    def bytes(self) -> int:
        """In the files; what several names share counts once."""
        places = {(self.where[name], info.start, info.end) for name, info in self.infos.items()}
        return sum(end - start for _, start, end in places)

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


def map_tensor(path: Path, info: TensorInfo) -> Tensor:
    """One tensor of a file as a private mapping (changes stay in this process).

    Its place was checked against the file's size when the header was read; a file that has shrunk since is an OSError.
    One of numbers without bytes, which no header could name, is zeros (`weights.schemes.mlx`).
    """
    if isinstance(info, Coded):
        return info.tensor(path)
    if info.axes:
        stored = tuple(info.shape[info.axes.index(axis)] for axis in range(len(info.axes)))
        return map_tensor(path, replace(info, shape=stored, axes=())).permute(info.axes).contiguous()
    import torch

    block = TYPES.get(info.dtype)
    packed = block is not None and block.packed
    shape = (info.count // info.shape[-1], block.row_bytes(info.shape[-1])) if block and packed else info.shape
    if not packed and info.dtype not in TORCH:
        raise ModelError(
            "{path} stores numbers as {dtype}, which this version can't read: get another file",
            **{"path": path, "dtype": info.dtype},
        )
    dtype: torch.dtype = torch.uint8 if packed else getattr(torch, TORCH[info.dtype])
    if info.size == 0:
        return torch.zeros(shape, dtype=dtype)
    begin = info.start // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
    with path.open("rb") as file:
        if info.end > file.seek(0, 2):
            raise OSError("it is shorter than when it was opened")
        view = mmap.mmap(file.fileno(), info.end - begin, access=mmap.ACCESS_COPY, offset=begin)
    place = info.start - begin
    if place % dtype.itemsize:  # not where such a number may begin: some writers align nothing
        return torch.frombuffer(bytearray(view[place:]), dtype=dtype).view(shape)
    return torch.frombuffer(view, dtype=dtype, offset=place).view(shape)


def layer_notes(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """What a safetensors file's notes say of its packed layers: path -> a table or the name of a format."""
    if LAYER_NOTES not in metadata:
        return {}
    try:
        layers = json.loads(metadata[LAYER_NOTES])["layers"]
    except (ValueError, RecursionError, KeyError, TypeError):
        layers = None
    if not isinstance(layers, dict):
        raise ModelError("{path} is damaged: {reason}; download it again", path=str(path), reason=LAYER_NOTES)
    return layers


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file, or a sentence."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError("{path} is missing: the model folder is incomplete, download it again", path=path) from None
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise ModelError(
            "{path} is not a readable JSON file ({error}): download it again", path=path, error=str(error)
        ) from None
    if not isinstance(value, dict):
        raise ModelError("{path} should hold a JSON object: download it again", path=path)
    return value


def open_component(folder: Path) -> Checkpoint:
    """The checkpoint in a component folder: sharded with an index or in numbered files, or one safetensors file. What
    the folder's config says of packed weights is in its metadata, under `PACKING`. MLX's names become ours.

    Raises ModelError when nothing is there, a shard is missing, or the index and the files disagree.
    """
    config = folder / "config.json"
    told = read_json(config) if config.is_file() else {}
    tensors = with_decoded(_all_tensors_of(folder), told[CONFIG]) if CONFIG in told else _tensors_of(folder)
    found = as_weights(named(tensors))
    packing = told.get(PACKING, told.get("quantization"))  # mlx's word
    for name, method in APART.items():
        if packing is None and (folder / name).is_file():
            packing = {"quant_method": method, **read_json(folder / name)}
    noted = {PACKING: json.dumps(packing)} if isinstance(packing, dict) else {}
    return translated(replace(found, metadata={**found.metadata, **noted}))


def _tensors_of(folder: Path) -> Checkpoint:
    label = Phrase("{component} of {folder}", component=folder.name, folder=folder.parent)
    for stem in STEMS:
        index = folder / f"{stem}.safetensors.index.json"
        if index.is_file():
            return from_index(label, index)
        single = folder / f"{stem}.safetensors"
        if single.is_file():
            infos, metadata = read_file(single)
            return Checkpoint(label, dict.fromkeys(infos, single), infos, metadata, layer_notes(single, metadata))
    if any(folder.glob("[0-9]*.safetensors")):  # mflux's, before it wrote an index
        return _all_tensors_of(folder, "[0-9]*.safetensors")
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt")):
        raise ModelError(
            "{folder} holds pickled weights, which can run code: get the safetensors files instead", folder=folder
        )
    raise ModelError(
        "{folder} holds no safetensors weights: the model folder is incomplete, download it again", folder=folder
    )


def _all_tensors_of(folder: Path, pattern: str = "*.safetensors") -> Checkpoint:
    """Of all files together, which no index names."""
    label = Phrase("{component} of {folder}", component=folder.name, folder=folder.parent)
    opened = [(path, *read_file(path)) for path in sorted(folder.glob(pattern))]
    where = {name: path for path, infos, _ in opened for name in infos}
    whole = {name: info for _, infos, _ in opened for name, info in infos.items()}
    return Checkpoint(label, where, whole, {key: note for _, _, notes in opened for key, note in notes.items()})


def from_index(label: str, index: Path) -> Checkpoint:
    """Follow `weight_map` (tensor name -> file name in the same folder)."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError("{index} has no weight_map: download it again", index=index)
    where: dict[str, Path] = {}
    infos: dict[str, TensorInfo] = {}
    headers: dict[str, Mapping[str, TensorInfo]] = {}
    metadata: dict[str, str] = {}
    layers: dict[str, Any] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise ModelError(
                "{index} points outside its folder ({file}): don't use this model", index=index, file=repr(file)
            )
        if file not in headers:
            path = index.with_name(file)
            if not path.is_file():
                raise ModelError("{path} is missing: the index names it as a shard, download it again", path=path)
            headers[file], notes = read_file(path)
            metadata |= notes
            layers |= layer_notes(path, notes)
        if name not in headers[file]:
            raise ModelError(
                "{path} lacks the tensor {name} that its index promises: download it again",
                **{"path": index.with_name(file), "name": name},
            )
        where[name], infos[name] = index.with_name(file), headers[file][name]
    return Checkpoint(label, where, infos, metadata, layers)
