"""GGUF block types to floats, in torch, for whole matrices at once.

One short function per layout turns blocks (n, bytes) into values (n, values) in float32, in the order of operations
that the format's own tools use, so results are equal bit for bit; rounding to another type happens once, at the end.
Matrices go through in runs of rows, so that the intermediate integers stay in the cache and cost no memory.

A block's bytes are described where they are cut: `cut(blocks, d=2, codes=16)`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from lanting.nn.blocks import TYPES
from lanting.nn.codebooks import codebook

RUN = {"cpu": 1 << 19}
"""Values expanded at a time; elsewhere `LONG_RUN`: a GPU likes few large steps."""
LONG_RUN = 1 << 25


def dequantize(packed: Tensor, kind: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows of blocks, uint8 (rows, bytes), of the type `kind` ("Q4_K") as values (rows, values) in `dtype`.

    Raises ValueError for a type that stores no floats, and for rows that are no whole number of blocks.
    """
    known = TYPES.get(kind)
    if known is None or kind not in EXPAND:
        raise ValueError(f"{kind} is no block type that stands for floats")
    if packed.dtype != torch.uint8 or packed.ndim != 2 or packed.shape[1] % known.size:
        raise ValueError(f"{tuple(packed.shape)} bytes of {packed.dtype} are no rows of {kind} blocks")
    rows, columns = packed.shape[0], packed.shape[1] // known.size * known.values
    expand = EXPAND[kind]
    out = torch.empty(rows, columns, dtype=dtype, device=packed.device)
    step = max(1, RUN.get(packed.device.type, LONG_RUN) // max(1, columns))
    for first in range(0, rows, step):
        blocks = packed[first : first + step].reshape(-1, known.size)
        out[first : first + step] = expand(blocks).view(-1, columns)
    return out


# cutting blocks into fields, and fields into numbers


def cut(blocks: Tensor, **sizes: int) -> Iterable[Tensor]:
    """The fields of all blocks, one after another: each (n, its bytes)."""
    return blocks.split(list(sizes.values()), 1)


def half(field: Tensor) -> Tensor:
    """Pairs of bytes (n, 2k) as float16, widened: (n, k)."""
    return field.contiguous().view(torch.float16).float()


def signed(field: Tensor) -> Tensor:
    """Bytes from -128 to 127."""
    return field.view(torch.int8)


def words(field: Tensor, size: int = 2) -> Tensor:
    """Little-endian numbers of 2 or 4 bytes (n, size * k) as int32 (n, k); those of 4 may come out negative."""
    if size == 4:
        return field.contiguous().view(torch.int32)
    return field.contiguous().view(torch.int16).int() & 0xFFFF


def parts(field: Tensor, bits: int, run: int) -> Tensor:
    """Bytes (n, k) that hold 8 / bits numbers each: of every `run` bytes first all lowest bits, then the next."""
    runs = field.unflatten(1, (-1, run))  # (n, k / run, run)
    mask = (1 << bits) - 1
    return torch.stack([(runs >> shift) & mask for shift in range(0, 8, bits)], 2).flatten(1)


def each(field: Tensor, bits: int) -> Tensor:
    """The numbers of each byte in turn: (n, k) -> (n, k * 8 / bits)."""
    return parts(field, bits, 1)


def scaled(codes: Tensor, scale: Tensor) -> Tensor:
    """Codes (n, values) times the scales (n, groups) of their groups."""
    groups = codes.float().unflatten(1, (scale.shape[1], -1))
    return groups.mul_(scale[:, :, None]).flatten(1)


def shifted(codes: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    """Codes times scale plus offset, both (n, groups)."""
    groups = codes.float().unflatten(1, (scale.shape[1], -1))
    return groups.mul_(scale[:, :, None]).add_(offset[:, :, None]).flatten(1)


# blocks of 32: one scale, perhaps one offset


def q4_0(blocks: Tensor) -> Tensor:
    d, codes = cut(blocks, d=2, codes=16)
    return scaled(parts(codes, 4, 16).view(torch.int8) - 8, half(d))


def q4_1(blocks: Tensor) -> Tensor:
    d, m, codes = cut(blocks, d=2, m=2, codes=16)
    return shifted(parts(codes, 4, 16), half(d), half(m))


def q5_0(blocks: Tensor) -> Tensor:
    d, fifth, codes = cut(blocks, d=2, fifth=4, codes=16)
    return scaled((parts(codes, 4, 16) | each(fifth, 1) << 4).view(torch.int8) - 16, half(d))


def q5_1(blocks: Tensor) -> Tensor:
    d, m, fifth, codes = cut(blocks, d=2, m=2, fifth=4, codes=16)
    return shifted(parts(codes, 4, 16) | each(fifth, 1) << 4, half(d), half(m))


def q8_0(blocks: Tensor) -> Tensor:
    d, codes = cut(blocks, d=2, codes=32)
    return scaled(signed(codes), half(d))


# blocks of 256 with scales of scales


def q2_k(blocks: Tensor) -> Tensor:
    """16 groups of 16; a byte of `scales` is the scale (low bits) and the offset of a group."""
    scales, codes, d, m = cut(blocks, scales=16, codes=64, d=2, m=2)
    return shifted(parts(codes, 2, 32), half(d) * (scales & 15), half(m) * (scales >> 4) * -1)


def q3_k(blocks: Tensor) -> Tensor:
    """16 groups of 16; six-bit scales: 4 low bits in 8 bytes, 2 high bits in 4. The third bit of a code is stored
    turned round: set means no -4."""
    third, codes, low, high, d = cut(blocks, third=32, codes=64, low=8, high=4, d=2)
    scale = (parts(low, 4, 8) | parts(high, 2, 4) << 4).view(torch.int8) - 32
    codes = (parts(codes, 2, 32) | parts(third, 1, 32) << 2).view(torch.int8) - 4
    return scaled(codes, half(d) * scale)


def six_bits(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and offsets of Q4_K and Q5_K, each (n, 8), out of 12 bytes: the first four of either lie in the low six
    bits of bytes 0-3 and 4-7; the last four have their low bits in bytes 8-11 and their high bits above the first."""
    first, second, rest = packed.split(4, 1)
    scales = torch.cat([first & 63, (rest & 15) | (first >> 6) << 4], 1)
    offsets = torch.cat([second & 63, (rest >> 4) | (second >> 6) << 4], 1)
    return scales, offsets


def q4_k(blocks: Tensor) -> Tensor:
    d, m, packed, codes = cut(blocks, d=2, m=2, packed=12, codes=128)
    scale, offset = six_bits(packed)
    return shifted(parts(codes, 4, 32), half(d) * scale, half(m) * offset * -1)


def q5_k(blocks: Tensor) -> Tensor:
    d, m, packed, fifth, codes = cut(blocks, d=2, m=2, packed=12, fifth=32, codes=128)
    scale, offset = six_bits(packed)
    return shifted(parts(codes, 4, 32) | parts(fifth, 1, 32) << 4, half(d) * scale, half(m) * offset * -1)


def q6_k(blocks: Tensor) -> Tensor:
    low, high, scale, d = cut(blocks, low=128, high=64, scale=16, d=2)
    codes = (parts(low, 4, 64) | parts(high, 2, 32) << 4).view(torch.int8) - 32
    return scaled(codes, half(d) * signed(scale))


# three values a code


def tq1_0(blocks: Tensor) -> Tensor:
    """Five digits of base 3 a byte, as a fraction of 256: the leading digit is what times 3 carries out. The carry of
    the earlier digits is lost by counting modulo 256."""
    first, second, last, d = cut(blocks, first=32, second=16, last=4, d=2)
    digits = []
    for field, count in ((first, 5), (second, 5), (last, 4)):
        runs = [((field * 3**place).int() * 3 >> 8) - 1 for place in range(count)]  # uint8 wraps round
        digits.append(torch.cat(runs, 1))
    return scaled(torch.cat(digits, 1), half(d))


def tq2_0(blocks: Tensor) -> Tensor:
    codes, d = cut(blocks, codes=64, d=2)
    return scaled(parts(codes, 2, 32).view(torch.int8) - 1, half(d))


# four-bit floats and other uneven levels

FLOAT4 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)  # e2m1, doubled
UNEVEN = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)  # of the IQ4 types


def levels(codes: Tensor, of: tuple[int, ...]) -> Tensor:
    """Look codes up. (`index_select` takes a quarter of the time of indexing.)"""
    table = torch.tensor(of, dtype=torch.float32, device=codes.device)
    return table.index_select(0, codes.int().flatten()).view(codes.shape)


def mxfp4(blocks: Tensor) -> Tensor:
    """The scale is a power of two, halved because the levels are doubled; the lowest two are subnormal."""
    exponent, codes = cut(blocks, exponent=1, codes=16)
    e = exponent.int()
    bits = torch.where(e < 2, 0x00200000 << e.clamp(max=1), (e - 1).clamp(min=0) << 23)
    return scaled(levels(parts(codes, 4, 16), FLOAT4), bits.view(torch.float32))


def nvfp4(blocks: Tensor) -> Tensor:
    """Four groups of 16, each with a scale of 4 exponent and 3 mantissa bits, halved like MXFP4's."""
    scale, codes = cut(blocks, scale=4, codes=32)
    exponent, mantissa = (scale >> 3 & 15).float(), (scale & 7).float()
    normal = (1.0 + mantissa / 8.0) * torch.exp2(exponent - 7)
    value = torch.where(exponent == 0, mantissa * 2.0**-9, normal) * 0.5
    value = torch.where((scale == 0) | (scale == 0x7F), 0.0, value)
    return scaled(levels(parts(codes, 4, 8), FLOAT4), value)


def iq4_nl(blocks: Tensor) -> Tensor:
    d, codes = cut(blocks, d=2, codes=16)
    return scaled(levels(parts(codes, 4, 16), UNEVEN), half(d))


def iq4_xs(blocks: Tensor) -> Tensor:
    """Eight groups of 32; six-bit scales, the high two bits in a word of their own."""
    d, high, low, codes = cut(blocks, d=2, high=2, low=4, codes=128)
    scale = (each(low, 4) | each(high, 2) << 4).view(torch.int8) - 32
    return scaled(levels(parts(codes, 4, 16), UNEVEN), half(d) * scale)


# codes into a book of groups of magnitudes, signs apart


def signs(field: Tensor) -> Tensor:
    """One byte for eight signs, (n, k) -> (n, 8k): -1 where the bit is set."""
    return 1.0 - 2.0 * each(field, 1)


def even_signs(sevens: Tensor) -> Tensor:
    """Seven stored bits (n, k); the eighth makes the number of minus signs even: (n, 8k)."""
    eighth = sum(sevens >> bit & 1 for bit in range(7)) & 1
    return signs((sevens | eighth << 7).to(torch.uint8))


def spaced(field: Tensor, starts: Iterable[int], bits: int) -> Tensor:
    """Several numbers out of each word, by their first bits: (n, k) -> (n, k * starts)."""
    return torch.stack([field >> start & (1 << bits) - 1 for start in starts], 2).flatten(1)


def magnitudes(name: str, codes: Tensor) -> Tensor:
    """Groups of a codebook by their codes: (n, k) -> (n, k * width)."""
    book = codebook(name, codes.device)
    return book.index_select(0, codes.int().flatten()).view(codes.shape[0], -1)


def looked_up(name: str, codes: Tensor, sign: Tensor, scale: Tensor) -> Tensor:
    """Groups of magnitudes by their codes (n, k), with signs (n, values), times scales (n, groups)."""
    return scaled(magnitudes(name, codes).mul_(sign), scale)


def iq2_xxs(blocks: Tensor) -> Tensor:
    """Pairs of words: four codes, then four times seven sign bits and a scale of four bits."""
    d, rest = cut(blocks, d=2, rest=64)
    pairs = rest.unflatten(1, (8, 2, 4))
    codes, word = pairs[:, :, 0].flatten(1), words(pairs[:, :, 1].flatten(1), 4)
    scale = half(d) * (0.5 + (word >> 28 & 15)) * 0.25
    return looked_up("IQ2_XXS", codes, even_signs(spaced(word, (0, 7, 14, 21), 7)), scale)


def iq2_xs(blocks: Tensor) -> Tensor:
    """Words of nine bits of code and seven of signs."""
    d, codes, scales = cut(blocks, d=2, codes=64, scales=8)
    word = words(codes)
    scale = half(d) * (0.5 + each(scales, 4)) * 0.25
    return looked_up("IQ2_XS", word & 511, even_signs(word >> 9), scale)


def iq2_s(blocks: Tensor) -> Tensor:
    d, codes, sign, high, scales = cut(blocks, d=2, codes=32, sign=32, high=8, scales=8)
    scale = half(d) * (0.5 + each(scales, 4)) * 0.25
    return looked_up("IQ2_S", codes.int() | each(high, 2).int() << 8, signs(sign), scale)


def iq3_xxs(blocks: Tensor) -> Tensor:
    d, codes, rest = cut(blocks, d=2, codes=64, rest=32)
    word = words(rest, 4)
    scale = half(d) * (0.5 + (word >> 28 & 15)) * 0.5
    return looked_up("IQ3_XXS", codes, even_signs(spaced(word, (0, 7, 14, 21), 7)), scale)


def iq3_s(blocks: Tensor) -> Tensor:
    d, codes, high, sign, scales = cut(blocks, d=2, codes=64, high=8, sign=32, scales=4)
    scale = half(d) * (1 + 2 * each(scales, 4))
    return looked_up("IQ3_S", codes.int() | each(high, 1).int() << 8, signs(sign), scale)


def iq1(codes: Tensor, delta: Tensor, scale: Tensor) -> Tensor:
    """Groups of -1, 0, 1, all moved by an eighth up or down: `delta` (n, any that divides the codes)."""
    groups = magnitudes("IQ1_S", codes).unflatten(1, (delta.shape[1], -1))
    return scaled(groups.add_(delta[:, :, None]).flatten(1), scale)


def iq1_s(blocks: Tensor) -> Tensor:
    """Words of four times three high bits of codes, three bits of scale and the direction of the move."""
    d, codes, high = cut(blocks, d=2, codes=32, high=16)
    word = words(high)
    delta = torch.where(word & 0x8000 != 0, -0.125, 0.125)
    scale = half(d) * (2 * (word >> 12 & 7) + 1)
    return iq1(codes.int() | spaced(word, (0, 3, 6, 9), 3) << 8, delta, scale)


def iq1_m(blocks: Tensor) -> Tensor:
    """The only type whose float16 is in pieces: the top four bits of each of four words of scales."""
    codes, high, scales = cut(blocks, codes=32, high=16, scales=8)
    word = words(scales)  # (n, 4)
    whole = sum((word[:, place] >> 12) << 4 * place for place in range(4))
    d = torch.as_tensor(whole, dtype=torch.int32).to(torch.int16).view(torch.float16).float()[:, None]
    scale = d * (2 * spaced(word, (0, 3, 6, 9), 3) + 1)  # (n, 16)
    nibble = each(high, 4)
    return iq1(codes.int() | (nibble & 7).int() << 8, torch.where(nibble & 8 != 0, -0.125, 0.125), scale)


def f16(blocks: Tensor) -> Tensor:
    return half(blocks)


def bf16(blocks: Tensor) -> Tensor:
    return blocks.contiguous().view(torch.bfloat16).float()


def f32(blocks: Tensor) -> Tensor:
    return blocks.contiguous().view(torch.float32)


def f64(blocks: Tensor) -> Tensor:
    return blocks.contiguous().view(torch.float64).float()


EXPAND: dict[str, Callable[[Tensor], Tensor]] = {
    function.__name__.upper(): function
    for function in (
        *(f16, bf16, f32, f64, q4_0, q4_1, q5_0, q5_1, q8_0, q2_k, q3_k, q4_k, q5_k, q6_k, tq1_0, tq2_0, mxfp4, nvfp4),
        *(iq1_s, iq1_m, iq2_xxs, iq2_xs, iq2_s, iq3_xxs, iq3_s, iq4_nl, iq4_xs),
    )
}
