"""Weights to GGUF blocks: the quantizers that the Python world lacks.

A block type fixes how many bits a code, a scale and a scale's scale may have; which codes and scales those are is free,
and decides how well the weights are met. Each group of 16 or 32 weights first tries a dozen ranges, and takes for each
the codes that are nearest and then the scale (and offset) that fits those codes best in the sense of least squares.
Then scales are rounded to the block's own grid, and codes, scales and their common factor are improved in turn, each
step by least squares given the others and kept only where the squared error falls. The errors are sums over a group
(of codes, codes times weights, codes squared), so trying a range costs no subtraction.

The measure is the plain squared error of the weights. Rejected: weighing large weights more, as is usual without
knowledge of the activations; it raises the plain error and these layers' inputs gave no reason for it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lanting.nn.blocks import TYPES

RUN = 1 << 18  # weights at a time: intermediates stay in the cache
GREATEST, LEAST = 65504.0, 2.0**-24  # of float16
RANGES = tuple(step / 5 for step in range(-5, 6))
"""Ranges that are tried, as what is added to the highest code before a group's spread is divided by it: below 0 the
codes leave room at both ends, above 0 the outermost weights are clipped and the others met more finely."""
ROUNDS = 3  # of improving codes, scales and factors in turn


@dataclass(frozen=True, slots=True)
class Uneven:
    """Types with an offset: codes from 0 to `high`, scales and offsets from 0 to `scales` (0: floats of their own)."""

    high: int
    scales: int


@dataclass(frozen=True, slots=True)
class Even:
    """Types without: codes from `low` to `high`, scales from -`scales` to `scales` - 1 (0: floats of their own)."""

    low: int
    high: int
    scales: int


def quantize(weight: Tensor, kind: str) -> Tensor:
    """A weight (rows, columns) as blocks of the type `kind`: uint8 (rows, bytes of a row).

    Raises ValueError for a type we can't write, for rows that are no whole number of blocks, and for weights that
    are not finite.
    """
    if kind not in PACKERS:
        raise ValueError(f"{kind} is no type we can quantize to")
    size = TYPES[kind].row_bytes(weight.shape[1])
    out = torch.empty(weight.shape[0], size, dtype=torch.uint8)
    step = max(1, RUN // weight.shape[1])
    for first in range(0, weight.shape[0], step):
        rows = weight[first : first + step].float().cpu()
        if not torch.isfinite(rows).all():
            raise ValueError("it has weights that are not finite")
        out[first : first + step] = PACKERS[kind](rows.reshape(-1, TYPES[kind].values)).view(len(rows), size)
    return out


def can_quantize(kind: str) -> bool:
    """Whether `quantize` can write this type."""
    return kind in PACKERS


# fitting


def stored(number: Tensor) -> Tensor:
    """As float16 keeps it, but never 0 for a number that isn't: a coarse scale loses less than none."""
    kept = number.clamp(-GREATEST, GREATEST).half().float()
    return torch.where((kept == 0) & (number != 0), number.sign() * LEAST, kept)


def inverse(number: Tensor) -> Tensor:
    """1 / x, and 0 for 0."""
    return torch.where(number == 0, 0.0, 1.0 / number)


def sums(x: Tensor, q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of codes, of codes squared, of codes times weights: each (..., 1)."""
    return q.sum(-1, True), (q * q).sum(-1, True), (q * x).sum(-1, True)


def fit_even(x: Tensor, form: Even) -> Tensor:
    """The best scale of each group of x (..., g), as (..., 1). Where codes reach further down than up, the largest
    weight is met from below, whatever its sign, so the scale may be negative."""
    peak = x.gather(-1, x.abs().argmax(-1, keepdim=True))
    peak = -peak.abs() if form.low == -form.high else peak
    best, least = torch.zeros_like(peak), torch.zeros_like(peak)  # of -(sum qx)^2 / sum q^2: the error but for x^2
    for more in RANGES:
        q = (x * (inverse(peak) * (form.low - more))).round_().clamp_(form.low, form.high)
        _, qq, qx = sums(x, q)
        scale = qx * inverse(qq)
        error = -qx * scale
        best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
    return best


def fit_uneven(x: Tensor, form: Uneven, free: bool) -> tuple[Tensor, Tensor]:
    """The best (scale, offset) of each group of x (..., g), each (..., 1): x is about scale * code - offset.
    Offsets are not negative unless they are `free`."""
    low, high = x.amin(-1, True), x.amax(-1, True)
    if not free:
        low = low.clamp(max=0)
    count, total = x.shape[-1], x.sum(-1, True)
    best, shift_by = torch.zeros_like(low), -low
    least = count * shift_by * shift_by + 2 * shift_by * total  # the error, but for the sum of x^2, of all codes 0
    x_above = x - low
    for more in RANGES:
        q = (x_above * inverse((high - low) / (form.high + more))).round_().clamp_(0, form.high)
        n, qq, qx = sums(x, q)
        scale, offset = solve(n, qq, qx, total, count, free)
        error = scale * (scale * qq - 2 * qx) + offset * (count * offset + 2 * total - 2 * scale * n)
        better = error < least
        best, shift_by = torch.where(better, scale, best), torch.where(better, offset, shift_by)
        least = torch.minimum(error, least)
    return best, shift_by


def solve(n: Tensor, qq: Tensor, qx: Tensor, total: Tensor, count: int, free: bool) -> tuple[Tensor, Tensor]:
    """Least squares of x = scale * q - offset, from sums over groups of `count`."""
    scale = (count * qx - n * total) * inverse((count * qq - n * n).clamp(min=0))
    offset = (scale * n - total) / count
    if free:
        return scale, offset
    bound = (offset < 0) | (scale <= 0)
    return torch.where(bound, qx * inverse(qq), scale).clamp(min=0), torch.where(bound, 0.0, offset)


def codes_even(x: Tensor, scale: Tensor, form: Even) -> Tensor:
    return (x * inverse(scale)).round_().clamp_(form.low, form.high)


def codes_uneven(x: Tensor, scale: Tensor, offset: Tensor, form: Uneven) -> Tensor:
    return ((x + offset) * inverse(scale)).round_().clamp_(0, form.high)


def two_levels_even(x: Tensor, form: Even) -> tuple[Tensor, Tensor, Tensor]:
    """(common factor (n, 1, 1), scales (n, groups, 1), codes (n, groups, g)) of x (n, groups, g)."""
    wish = fit_even(x, form)
    peak = wish.gather(1, wish.abs().argmax(1, keepdim=True))
    d = stored(peak / -form.scales)
    s = (wish * inverse(d)).round_().clamp_(-form.scales, form.scales - 1)
    q = codes_even(x, d * s, form)
    for _ in range(ROUNDS):
        _, qq, qx = sums(x, q)
        better = (qx * inverse(qq) * inverse(d)).round_().clamp_(-form.scales, form.scales - 1)
        s = torch.where(qq > 0, better, s)  # nearest to the best: no step can raise the error
        d = stored((s * qx).sum(1, True) * inverse((s * s * qq).sum(1, True)))
        q = codes_even(x, d * s, form)
    return d, s, q


def two_levels_uneven(x: Tensor, form: Uneven) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(factor of the scales, of the offsets (n, 1, 1), scales, offsets (n, groups, 1), codes (n, groups, g))."""
    count, total = x.shape[-1], x.sum(-1, True)
    scale, offset = fit_uneven(x, form, free=False)
    d, e = stored(scale.amax(1, True) / form.scales), stored(offset.amax(1, True) / form.scales)
    s, m = ((wish * inverse(by)).round_().clamp_(0, form.scales) for wish, by in ((scale, d), (offset, e)))
    q = codes_uneven(x, d * s, e * m, form)
    for _ in range(ROUNDS):
        n, qq, qx = sums(x, q)
        s, m = rounded_pair((s, m), (d, e), (n, qq, qx, total, count), form)
        d, e = common_factors(s, m, (n, qq, qx, total, count), (d, e))
        q = codes_uneven(x, d * s, e * m, form)
    return d, e, s, m, q


Sums = tuple[Tensor, Tensor, Tensor, Tensor, int]
Pair = tuple[Tensor, Tensor]


def error_of(scale: Tensor, offset: Tensor, of: Sums) -> Tensor:
    """Squared error per group but for the sum of x^2."""
    n, qq, qx, total, count = of
    return scale * (scale * qq - 2 * qx) + offset * (count * offset + 2 * total - 2 * scale * n)


def rounded_pair(old: Pair, by: Pair, of: Sums, form: Uneven) -> Pair:
    """Scales and offsets on their grids for given codes: the best scale's two neighbours, each with its best offset."""
    n, qq, qx, total, count = of
    (s, m), (d, e) = old, by
    wish = solve(n, qq, qx, total, count, free=False)[0] * inverse(d)
    least = error_of(d * s, e * m, of)
    for candidate in (wish.floor(), wish.ceil()):
        s_new = candidate.clamp(0, form.scales)
        m_new = ((d * s_new * n - total) / count * inverse(e)).round_().clamp_(0, form.scales)
        error = error_of(d * s_new, e * m_new, of)
        better = error < least
        s, m, least = torch.where(better, s_new, s), torch.where(better, m_new, m), torch.minimum(error, least)
    return s, m


def common_factors(s: Tensor, m: Tensor, of: Sums, old: Pair) -> Pair:
    """The two factors of a block that fit codes, scales and offsets best; the old ones where rounding spoils them."""
    n, qq, qx, total, count = of
    a, b, c = (s * s * qq).sum(1, True), (s * m * n).sum(1, True), (m * m).sum(1, True) * count
    right, left = (s * qx).sum(1, True), -(m * total).sum(1, True)
    whole = a * c - b * b
    d = torch.where(whole > 0, (right * c + left * b) * inverse(whole), right * inverse(a))
    e = torch.where(whole > 0, (right * b + left * a) * inverse(whole), 0.0)
    d, e = stored(d.clamp(min=0)), stored(e.clamp(min=0))
    better = error_of(d * s, e * m, of).sum(1, True) < error_of(old[0] * s, old[1] * m, of).sum(1, True)
    return torch.where(better, d, old[0]), torch.where(better, e, old[1])


# packing: the reverse of `nn.dequant`


def halves(number: Tensor) -> Tensor:
    """Numbers (n, ...) as float16 bytes (n, 2k)."""
    return number.flatten(1).half().view(torch.uint8)


def merge(codes: Tensor, bits: int, run: int) -> Tensor:
    """Numbers of few bits (n, values) into bytes: of every run of 8 / bits * `run` the first `run` are lowest."""
    places = codes.to(torch.uint8).flatten(1).unflatten(1, (-1, 8 // bits, run))
    whole = places[:, :, 0].clone()
    for place in range(1, 8 // bits):
        whole |= places[:, :, place] << place * bits
    return whole.flatten(1)


def pack_one_even(x: Tensor, form: Even) -> tuple[Tensor, Tensor]:
    """(float16 scale as bytes, codes from 0) of blocks with one scale."""
    d = stored(fit_even(x, form))
    q = codes_even(x, d, form)
    for _ in range(2):
        _, qq, qx = sums(x, q)
        d = torch.where(qq > 0, stored(qx * inverse(qq)), d)
        q = codes_even(x, d, form)
    return halves(d), q - form.low


def pack_one_uneven(x: Tensor, form: Uneven) -> tuple[Tensor, Tensor, Tensor]:
    scale, offset = (stored(number) for number in fit_uneven(x, form, free=True))
    return halves(scale), halves(-offset), codes_uneven(x, scale, offset, form)


def q8_0(x: Tensor) -> Tensor:
    d, q = pack_one_even(x, FORMS["Q8_0"])
    return torch.cat([d, (q - 127).to(torch.int8).view(torch.uint8)], 1)


def q4_0(x: Tensor) -> Tensor:
    d, q = pack_one_even(x, FORMS["Q4_0"])
    return torch.cat([d, merge(q, 4, 16)], 1)


def q5_0(x: Tensor) -> Tensor:
    d, q = pack_one_even(x, FORMS["Q5_0"])
    return torch.cat([d, merge(q // 16, 1, 1), merge(q % 16, 4, 16)], 1)


def q4_1(x: Tensor) -> Tensor:
    d, m, q = pack_one_uneven(x, FORMS["Q4_1"])
    return torch.cat([d, m, merge(q, 4, 16)], 1)


def q5_1(x: Tensor) -> Tensor:
    d, m, q = pack_one_uneven(x, FORMS["Q5_1"])
    return torch.cat([d, m, merge(q // 16, 1, 1), merge(q % 16, 4, 16)], 1)


def q2_k(x: Tensor) -> Tensor:
    d, e, s, m, q = two_levels_uneven(x.unflatten(1, (16, 16)), FORMS["Q2_K"])
    return torch.cat([(s + 16 * m).to(torch.uint8).flatten(1), merge(q, 2, 32), halves(d), halves(e)], 1)


def q3_k(x: Tensor) -> Tensor:
    d, s, q = two_levels_even(x.unflatten(1, (16, 16)), FORMS["Q3_K"])
    s, q = s.flatten(1) + 32, q.flatten(1) + 4
    scales = [merge(s % 16, 4, 8), merge(s // 16, 2, 4)]
    return torch.cat([merge(q // 4, 1, 32), merge(q % 4, 2, 32), *scales, halves(d)], 1)


def six_bits(s: Tensor, m: Tensor) -> Tensor:
    """Eight scales and eight offsets of six bits in 12 bytes; see `nn.dequant.six_bits`."""
    s, m = s.flatten(1).to(torch.uint8), m.flatten(1).to(torch.uint8)
    first, second = s[:, :4] | (s[:, 4:] >> 4) << 6, m[:, :4] | (m[:, 4:] >> 4) << 6
    return torch.cat([first, second, (s[:, 4:] & 15) | (m[:, 4:] & 15) << 4], 1)


def q4_k(x: Tensor) -> Tensor:
    d, e, s, m, q = two_levels_uneven(x.unflatten(1, (8, 32)), FORMS["Q4_K"])
    return torch.cat([halves(d), halves(e), six_bits(s, m), merge(q, 4, 32)], 1)


def q5_k(x: Tensor) -> Tensor:
    d, e, s, m, q = two_levels_uneven(x.unflatten(1, (8, 32)), FORMS["Q5_K"])
    q = q.flatten(1)
    return torch.cat([halves(d), halves(e), six_bits(s, m), merge(q // 16, 1, 32), merge(q % 16, 4, 32)], 1)


def q6_k(x: Tensor) -> Tensor:
    d, s, q = two_levels_even(x.unflatten(1, (16, 16)), FORMS["Q6_K"])
    q = q.flatten(1) + 32
    scales = s.flatten(1).to(torch.int8).view(torch.uint8)
    return torch.cat([merge(q % 16, 4, 64), merge(q // 16, 2, 32), scales, halves(d)], 1)


FORMS: dict[str, Any] = {
    "Q8_0": Even(-127, 127, 0),  # others' kernels count on its never being -128
    "Q5_0": Even(-16, 15, 0),
    "Q4_0": Even(-8, 7, 0),
    "Q5_1": Uneven(31, 0),
    "Q4_1": Uneven(15, 0),
    "Q2_K": Uneven(3, 15),
    "Q3_K": Even(-4, 3, 32),
    "Q4_K": Uneven(15, 63),
    "Q5_K": Uneven(31, 63),
    "Q6_K": Even(-32, 31, 128),
}
PACKERS: dict[str, Callable[[Tensor], Tensor]] = {
    function.__name__.upper(): function for function in (q8_0, q4_0, q5_0, q4_1, q5_1, q2_k, q3_k, q4_k, q5_k, q6_k)
}
