"""bfloat16 numbers whose exponents are Huffman codes, put together again: DFloat11's, which lose nothing.

Codes lie from the highest bit on, one behind the other; for every 8 bytes the place of the first code that begins there
is known, so that all these pieces are decoded at once, a few codes of each at a time. The tables say for a byte which
exponent it stands for, or in which table the next byte is to be looked up; the last one has the codes' lengths.
Rejected: code by code, as a processor would: in Python that took a thousand times as long.
Source: "70% Size, 100% Accuracy: Lossless LLM Compression via Dynamic-Length Float" (Zhang et al., 2025) and dfloat11
0.5.0 (`dfloat11_utils.py`).
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

PIECE = 8  # bytes for which the place of the first code is kept
AT_ONCE = 1 << 14  # pieces decoded at a time
LOOK, MOST = 12, 8  # bits that are looked at together, and how many codes may be found in them, a byte each
EVERY = 0x0101_0101_0101_0101  # times a byte: eight of it
ONE = -0x7F7F_7F7F_7F7F_8000  # seven bytes of 128 and one of 0: a single code
Parts = dict[str, Tensor]


def decoded(parts: Parts, begin: int, end: int, block: int) -> Tensor:
    """Numbers `begin` to `end` of a module, bfloat16 (end - begin,).

    encoded_exponent (bytes,), sign_mantissa (numbers,), luts (tables + 1, 256), gaps (5 bits a piece) uint8, and
    output_positions (blocks + 1,) int64: which number the first code of every `block` pieces is of.
    """
    positions = parts["output_positions"]
    first = int(torch.searchsorted(positions, torch.tensor(begin), right=True)) - 1
    last = min(int(torch.searchsorted(positions, torch.tensor(end))), len(positions) - 1)
    exponents = _exponents(parts, first * block, last * block)
    start = begin - int(positions[first])
    if len(exponents) < start + end - begin:
        raise ValueError(f"{len(exponents)} codes for {start + end - begin} numbers")
    exponents, rest = exponents[start : start + end - begin], parts["sign_mantissa"][begin:end].short()
    bits = (rest & 0x80) << 8 | exponents.short() << 7 | rest & 0x7F
    return bits.view(torch.bfloat16)


def _exponents(parts: Parts, begin: int, end: int) -> Tensor:
    """All exponents of pieces `begin` to `end`, uint8."""
    encoded, looks = parts["encoded_exponent"], _looks(parts["luts"])
    end = min(end, -(-len(encoded) // PIECE))

    def some(at: int) -> Tensor:
        until = min(at + AT_ONCE, end)
        words = torch.zeros(until + 1 - at, PIECE, dtype=torch.uint8)  # the last codes may end in the next piece
        there = encoded[at * PIECE : (until + 1) * PIECE]
        words.view(-1)[: len(there)] = there
        highest_first = words.flip(1).contiguous().view(torch.int64).flatten()
        return _pieces(highest_first, _fives(parts["gaps"], at, until), looks, parts["luts"])

    with ThreadPoolExecutor(torch.get_num_threads()) as threads:  # torch leaves so few numbers to one
        return torch.cat([torch.empty(0, dtype=torch.uint8), *threads.map(some, range(begin, end, AT_ONCE))])


def _pieces(words: Tensor, places: Tensor, looks: tuple[Tensor, ...], luts: Tensor) -> Tensor:
    """Exponents of pieces one behind the other: words (n + 1,) int64, of each the place (n,) of its first code."""
    here, after = words[:-1], words[1:] >> 1 & 0x7FFF_FFFF_FFFF_FFFF
    exponents, starts, lengths = looks
    found: list[Tensor] = []
    inside: list[Tensor] = []
    while bool((places < 64).any()):
        at = places.clamp(max=63)
        window = here << at | after >> 63 - at  # the bits from here on, the first in the highest place
        look = (window >> 64 - LOOK & (1 << LOOK) - 1).int()
        several, begun, length = (each.index_select(0, look) for each in (exponents, starts, lengths))
        if bool((length == 0).any()):
            long = (length == 0).nonzero().flatten()
            several[long], length[long] = _walk(window[long], luts)
            begun[long] = ONE
        found.append(several)
        inside.append(begun + places * EVERY)  # where codes begin in the piece, a byte each
        places = places + length
    if not found:
        return torch.empty(0, dtype=torch.uint8)
    return torch.stack(found, 1).view(torch.uint8)[torch.stack(inside, 1).view(torch.uint8) < 64]


def _looks(luts: Tensor) -> tuple[Tensor, ...]:
    """For the next `LOOK` bits, int64 (2^LOOK,) each: up to `MOST` exponents, a byte each; their first bits, a byte
    each and 128 where there is none; the bits of all, 0 where the first code is longer."""
    window = torch.arange(1 << LOOK) << 64 - LOOK
    ones = window | (1 << 64 - LOOK) - 1  # the same, whatever comes after
    several = torch.zeros(1 << LOOK, MOST, dtype=torch.uint8)
    begun, length = torch.full_like(several, 128), torch.zeros_like(window)
    whole = torch.ones_like(window, dtype=torch.bool)
    for place in range(MOST):
        exponent, bits = _walk(window << length, luts)
        other, _ = _walk(~(~ones << length), luts)  # gaps in the tables are filled with their neighbours
        whole = whole & (bits > 0) & (length + bits <= LOOK) & (exponent == other)
        several[:, place] = torch.where(whole, exponent, 0)
        begun[:, place] = torch.where(whole, length, 128)
        length = torch.where(whole, length + bits, length)
    return several.view(torch.int64).flatten(), begun.view(torch.int64).flatten(), length


def _walk(window: Tensor, luts: Tensor, levels: int = 4) -> tuple[Tensor, Tensor]:
    """(exponents, lengths) of the codes that begin with the highest bits of windows; 0, 0 where there is none."""
    tables, lengths = luts[:-1].long(), luts[-1].long()
    table = torch.zeros_like(window)
    exponent, found = torch.zeros_like(window), torch.zeros_like(window, dtype=torch.bool)
    for level in range(levels):
        value = tables.flatten().index_select(0, table * 256 + (window >> 56 - 8 * level & 0xFF))
        pointer = 256 - value < len(tables)
        exponent = torch.where(~found & ~pointer, value, exponent)
        table, found = torch.where(pointer & ~found, 256 - value, table), found | ~pointer
    length = torch.where(found, lengths.index_select(0, exponent), 0)
    return exponent, length


def _fives(gaps: Tensor, begin: int, end: int) -> Tensor:
    """Numbers `begin` to `end` of 5 bits each, the highest first, int64."""
    first = torch.arange(begin, end) * 5
    byte = first >> 3
    near = torch.nn.functional.pad(gaps[begin * 5 // 8 : end * 5 // 8 + 2], (0, 2)).long()
    byte = byte - begin * 5 // 8
    return (near[byte] << 8 | near[byte + 1]) >> 11 - (first & 7) & 31
