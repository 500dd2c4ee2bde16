"""Linears whose codes stand for small numbers, integers or floats of any split of their bits: what SDNQ stores.

value = number x scale, plus an offset where numbers have no sign; a scale and an offset for each group of inputs, found
in float32 and rounded once. Codes stay in runs as SDNQ packs them, so that they are read from the file as they are.
Rejected: putting them in `nn.affine`'s order, which takes longer than reading them, each time a model is opened.
Source: SDNQ 0.2.8 (`packed_int`, `packed_float`, `dequantizer`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from lanting.nn.fourbit import small_floats
from lanting.nn.linears import PackedLinear
from lanting.nn.number_types import NumberType, number_type, row_bytes
from lanting.nn.rounding import expanded

PIECES: dict[int, tuple[tuple[tuple[int, int, int, int], ...], ...]] = {
    # bits -> for each code of a run where it lies: (byte of the run, first bit there, how many, first bit of the code)
    2: tuple(((0, 2 * place, 2, 0),) for place in range(4)),
    3: (
        *(((place % 3, 3 * (place // 3), 3, 0),) for place in range(6)),
        *(((place, 6, 2, 0), (2, 6 + place, 1, 2)) for place in range(2)),
    ),
    4: tuple(((0, 4 * place, 4, 0),) for place in range(2)),
    5: (
        *(((place, 0, 5, 0),) for place in range(5)),
        ((0, 5, 3, 0), (3, 5, 2, 3)),
        ((1, 5, 3, 0), (4, 5, 2, 3)),
        ((2, 5, 3, 0), (4, 7, 1, 3), (3, 7, 1, 4)),
    ),
    6: (*(((place, 0, 6, 0),) for place in range(3)), ((2, 6, 2, 0), (1, 6, 2, 2), (0, 6, 2, 4))),
    7: (*(((place, 0, 7, 0),) for place in range(7)), tuple((6 - bit, 7, 1, bit) for bit in range(7))),
}


class NumberLinear(PackedLinear):
    """`weight` (out, bytes of a row) uint8: a row's codes in runs (`unpack_runs`), filled up to whole runs;
    `weight_scale` and, where numbers have no sign, `weight_offset` (out, groups), any float type each."""

    weight_scale: Tensor
    weight_offset: Tensor | None

    def __init__(self, in_features: int, out_features: int, bias: bool, numbers: str, group: int, rotate: int = 0):
        super().__init__(in_features, out_features, bias, rotate)
        told = number_type(numbers)
        if told is None or group < 1 or in_features % group:
            raise ValueError(f"{in_features} inputs of {numbers} have no groups of {group}")
        self.kind, self.numbers, self.group = f"uint{told.bits}", told, group
        sides = out_features, in_features // group
        self.register_buffer("weight", torch.empty(out_features, row_bytes(in_features, told.bits), dtype=torch.uint8))
        self.register_buffer("weight_scale", torch.empty(sides))
        self.register_buffer("weight_offset", None if told.signed else torch.empty(sides))

    def values(self, dtype: torch.dtype, rows: Tensor | None = None) -> Tensor:
        def find(some: Tensor) -> Tensor:
            codes = unpack_runs(self.weight[some], self.numbers.bits)[:, : self.in_features]
            return self.grouped(codes.unflatten(1, (-1, self.group)), some).flatten(1)

        return expanded(self, dtype, rows, find)

    def grouped(self, codes: Tensor, rows: Tensor) -> Tensor:
        """What codes (n, groups, g) of rows (n,) are worth, float32."""
        numbers, by = worth(codes, self.numbers), self.weight_scale[rows].float()[:, :, None]
        if self.weight_offset is None:
            return numbers.mul_(by)
        return torch.addcmul(self.weight_offset[rows].float()[:, :, None], numbers, by, out=numbers)


class LevelLinear(NumberLinear):
    """One whose codes are places in a list of levels, a list for each group: `weight_scale` (out, groups, 2^bits)."""

    def __init__(self, in_features: int, out_features: int, bias: bool, numbers: str, group: int, rotate: int = 0):
        super().__init__(in_features, out_features, bias, numbers, group, rotate)
        self.weight_scale = torch.empty(out_features, in_features // group, 1 << self.numbers.bits)
        self.weight_offset = None

    def grouped(self, codes: Tensor, rows: Tensor) -> Tensor:
        return self.weight_scale[rows].float().gather(2, codes.long())


def worth(codes: Tensor, numbers: NumberType) -> Tensor:
    """What codes (uint8) stand for, float32, in a tensor of its own."""
    if not numbers.exponent:
        found = codes.float()
        return found.add_(numbers.least) if numbers.least else found
    every = torch.arange(1 << numbers.bits, device=codes.device)
    table = small_floats(every, numbers.exponent, numbers.bits - numbers.signed - numbers.exponent)
    return table.index_select(0, codes.flatten().int()).view(codes.shape)  # table[codes] takes ten times as long


def unpack_runs(packed: Tensor, bits: int) -> Tensor:
    """Bytes (rows, n * bits / 8) -> codes (rows, n) uint8, n codes of whole bytes."""
    if bits == 8:
        return packed
    pieces = PIECES[bits]
    size = 1 + max(piece[0] for code in pieces for piece in code)  # bytes of a run
    parts = packed.unflatten(1, (-1, size))
    codes: list[Tensor] = []
    for code in pieces:
        bytes_of = [(parts[:, :, byte] >> first & (1 << count) - 1) << to for byte, first, count, to in code]
        found = bytes_of[0]
        for more in bytes_of[1:]:
            found = found | more
        codes.append(found)
    return torch.stack(codes, 2).flatten(1)


def pack_runs(codes: Tensor, bits: int) -> Tensor:
    """The inverse of `unpack_runs`: codes (rows, n) uint8, n of whole runs -> bytes (rows, n * bits / 8)."""
    if bits == 8:
        return codes
    pieces = PIECES[bits]
    size = 1 + max(piece[0] for code in pieces for piece in code)
    runs = codes.unflatten(1, (-1, len(pieces)))
    packed = torch.zeros(*runs.shape[:2], size, dtype=torch.uint8, device=codes.device)
    for place, code in enumerate(pieces):
        for byte, first, count, to in code:
            packed[:, :, byte] |= (runs[:, :, place] >> to & (1 << count) - 1) << first
    return packed.flatten(1)
