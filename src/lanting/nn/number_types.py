"""Types of numbers of 2 to 8 bits by their names, without torch: what `nn.numbers` multiplies and headers speak of."""

from __future__ import annotations

import re
from dataclasses import dataclass

LEVELS = " levels"  # behind the type of codes that are places in a list
RUN = 8  # codes that fill whole bytes, whatever their bits


@dataclass(frozen=True, slots=True)
class NumberType:
    """`exponent` 0: an integer, whose least is `least`; else a float without infinities, signed or not."""

    bits: int
    signed: bool
    exponent: int = 0

    @property
    def least(self) -> int:
        return -(1 << self.bits - 1) if self.signed else 0


def number_type(name: str) -> NumberType | None:
    """ "int5", "uint4", "float6_e3m2fn", "float4_e2m2fnu"; None for other words and for more than 8 bits."""
    if found := re.fullmatch(r"(u?)int([2-8])", name):
        return NumberType(int(found[2]), not found[1])
    found = re.fullmatch(r"float([2-8])_e([1-7])m([0-7])(fnu?)(?:_sdnq)?", name)
    if found is None:
        return None
    bits, exponent, mantissa, signed = int(found[1]), int(found[2]), int(found[3]), found[4] == "fn"
    return NumberType(bits, signed, exponent) if bits == signed + exponent + mantissa else None


def row_bytes(columns: int, bits: int) -> int:
    """Of a row, filled up to whole runs of 8 codes."""
    return -(-columns // RUN) * bits
