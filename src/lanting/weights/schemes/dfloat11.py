"""What DFloat11 writes in place of bfloat16 weights, told from headers and the folder's config.json, without torch.

A module's Linears are one row of numbers: their exponents are Huffman codes (`weights.schemes.huffman`), signs and
mantissas a byte each. Which Linears and in which order is in config.json's `dfloat11_config`, how many numbers each
has in `split_positions`; how many outputs, their biases tell. To everything here they are bfloat16 tensors, decoded
whenever they are read, to the bit what they were. Rejected: keeping them coded in memory, which would decode at every
step. Source: dfloat11 0.5.0 (`compress_model`).
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lanting.weights.headers import TensorInfo
from lanting.weights.schemes.foreign import contradicts, unreadable

if TYPE_CHECKING:
    from torch import Tensor

    from lanting.weights.checkpoint import Checkpoint

CONFIG = "dfloat11_config"  # in a folder's config.json
PARTS = ("encoded_exponent", "sign_mantissa", "luts", "gaps", "output_positions")
SPLIT = "split_positions"
DFLOAT11 = "DFloat11"
PIECE = 8  # bytes a thread of its kernel decodes


@dataclass(frozen=True, slots=True)
class Coded(TensorInfo):
    """Numbers `first` to `last` of a module whose parts are in the same file; as a tensor it is of bfloat16."""

    parts: Mapping[str, TensorInfo] = field(default_factory=dict[str, TensorInfo])
    first: int = 0
    last: int = 0
    block: int = 512

    def tensor(self, path: Path) -> Tensor:
        """Decoded. Raises ValueError for codes that end too early, OSError for a file that can't be read."""
        import torch

        from lanting.weights.checkpoint import map_tensor
        from lanting.weights.schemes.huffman import decoded

        parts = {name: map_tensor(path, info) for name, info in self.parts.items()}
        parts["output_positions"] = parts["output_positions"].view(torch.int32).long() & 0xFFFF_FFFF
        return decoded(parts, self.first, self.last, self.block).view(self.shape)


def with_decoded(checkpoint: Checkpoint, config: Any) -> Checkpoint:
    """The same with every coded module as its Linears' weights. Raises ModelError for what can't be."""
    modules = [name.removesuffix(f".{PARTS[0]}") for name in checkpoint.infos if name.endswith(f".{PARTS[0]}")]
    if not modules:
        return checkpoint
    aside = {f"{module}.{part}" for module in modules for part in (*PARTS, SPLIT)}
    infos = {name: info for name, info in checkpoint.infos.items() if name not in aside}
    where = {name: checkpoint.where[name] for name in infos}
    for module in modules:
        for name, info in _members(checkpoint, module, config):
            infos[name], where[name] = info, checkpoint.where[f"{module}.{PARTS[0]}"]
    return replace(checkpoint, infos=infos, where=where)


def _members(checkpoint: Checkpoint, module: str, config: Any) -> Iterator[tuple[str, Coded]]:
    """Name and place of each weight of a module."""
    table = config if isinstance(config, dict) else {}
    names, block = _named(table.get("pattern_dict"), module), table.get("threads_per_block")
    if names is None:
        raise unreadable(checkpoint, module, f"{DFLOAT11}, {CONFIG}")
    parts = {part: checkpoint.infos.get(f"{module}.{part}") for part in PARTS}
    found = {part: info for part, info in parts.items() if info is not None}
    threads = block[0] if isinstance(block, list) and block else 512
    if table.get("bytes_per_thread", PIECE) != PIECE or not isinstance(threads, int) or threads < 1:
        raise unreadable(checkpoint, module, f"{DFLOAT11}, {threads} x {table.get('bytes_per_thread')}")
    if len(found) != len(PARTS) or any(info.dtype != "U8" for info in found.values()) or not _fits(found, threads):
        raise contradicts(checkpoint, module, f"{DFLOAT11}: {', '.join(sorted(found))}")
    numbers = found["sign_mantissa"]
    limits = [0, *_splits(checkpoint, module), numbers.count]
    if len(limits) != len(names) + 1 or limits != sorted(limits):
        raise contradicts(checkpoint, module, f"{DFLOAT11}: {len(limits) - 1} / {len(names)}")
    share = (numbers.size + found["encoded_exponent"].size) / max(numbers.count, 1)  # bytes a number, for sums
    for name, first, last in zip(names, limits, limits[1:], strict=False):
        bias = checkpoint.infos.get(f"{name}.bias")
        rows = bias.count if bias is not None else 0
        if not rows or (last - first) % rows:
            raise contradicts(checkpoint, name, f"{DFLOAT11}: {last - first} / {rows}")
        start, end = numbers.start + int(first * share), numbers.start + int(last * share)
        shape = rows, (last - first) // rows
        yield f"{name}.weight", Coded("BF16", shape, start, end, (), found, first, last, threads)


def _named(patterns: Any, module: str) -> list[str] | None:
    """The Linears of a module in their order; None where no pattern speaks of it."""
    for pattern, names in patterns.items() if isinstance(patterns, dict) else ():
        if not isinstance(pattern, str) or not isinstance(names, list):
            continue
        plain = re.escape(pattern).replace(r"\\\.", r"\.").replace(r"\\d\+", r"\d+")  # of patterns just these
        if re.fullmatch(plain, module):
            return [f"{module}.{name}" for name in names if isinstance(name, str)] or [module]
    return None


def _splits(checkpoint: Checkpoint, module: str) -> list[int]:
    name = f"{module}.{SPLIT}"
    if name not in checkpoint.infos:
        return []
    info = checkpoint.infos[name]
    if info.dtype != "I64":
        raise contradicts(checkpoint, module, f"{SPLIT}: {info.dtype}")
    return list(struct.unpack(f"<{info.count}q", checkpoint.raw(name)))


def _fits(found: Mapping[str, TensorInfo], threads: int) -> bool:
    """Whether the tables are there and as many gaps and positions as the codes have pieces and blocks."""
    luts, blocks = found["luts"], -(-found["encoded_exponent"].count // (PIECE * threads))
    sides = len(luts.shape) == 2 and luts.shape[0] > 1 and luts.shape[1] == 256
    return (
        sides
        and found["gaps"].count * 8 >= 5 * threads * blocks
        and found["output_positions"].count == 4 * (blocks + 1)
    )
