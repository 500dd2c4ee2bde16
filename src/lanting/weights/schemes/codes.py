"""Codes in words of 32 bits (`weights.schemes.gptq`) put in order for our Linears: a row's codes one behind the other.

Words are whole numbers of codes or runs of bits that go on from word to word; in both cases their bytes, read from the
lowest bit on, are what `AffineLinear` holds, once rows are outputs. AWQ alone has codes that share a word out of order.
The offset of a group, -zero x scale, is exact in float32, so values are those of the packages, rounded once.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lanting.nn.affine import pack_codes, unpack_codes
from lanting.nn.fourbit import small_floats
from lanting.weights.form import SECOND, Form
from lanting.weights.schemes.compressed import DIVISOR
from lanting.weights.schemes.gptq import GPTQ, WORD

AWQ_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)  # of 8 outputs, in which order a word has them from its lowest bits on
LOW, HIGH = 0x0F0F0F0F, -0x0F0F0F10  # of each byte of a word
Parts = Mapping[str, Tensor]


def awq(form: Form, parts: Parts) -> dict[str, Tensor]:
    """Codes (in, out / 8 words) and zeros (groups, out / 8 words), scale (groups, out)."""
    first, second = parts["weight"][::2], parts["weight"][1::2]  # inputs that will share a byte
    found = torch.empty(form.shape[0] // 8, 8, form.shape[1] // 2, dtype=torch.uint8)
    lows = first & LOW | (second & LOW) << 4  # (in / 2, words): bytes of four outputs
    found[:, AWQ_COLUMNS[::2]] = lows.view(torch.uint8).T.contiguous().unflatten(0, (-1, 4))
    highs = first >> 4 & LOW | second & HIGH
    found[:, AWQ_COLUMNS[1::2]] = highs.view(torch.uint8).T.contiguous().unflatten(0, (-1, 4))
    return {"weight": found.flatten(0, 1), **_affine(_awq_codes(parts["zeros"]).T, parts["scale"].T)}


def _awq_codes(words: Tensor) -> Tensor:
    """(n, words) int32 -> (n, 8 a word) uint8"""
    halves = words.contiguous().view(torch.uint8).unflatten(1, (-1, 4))  # (n, words, bytes)
    found = torch.empty(*halves.shape[:2], 8, dtype=torch.uint8)
    for place, column in enumerate(AWQ_COLUMNS):
        found[:, :, column] = halves[:, :, place // 2] >> 4 * (place % 2) & 15
    return found.flatten(1)


def gptq(form: Form, parts: Parts) -> dict[str, Tensor]:
    """Codes (words of in, out) and zeros (groups, words of out), scale (groups, out), maybe the group of each input."""
    if form.kind == "int8":
        return _signed(parts["weight"].T.contiguous(), parts["scale"].T)
    bits = int(form.kind.removeprefix("uint"))
    zeros = parts["zeros"].contiguous()
    if form.layout == GPTQ and bits != 3:  # they were taken from whole words, too: GPTQModel's borrow from each other
        zeros = zeros + sum(1 << place for place in range(0, 32, bits))
    numbers = unpack_codes(zeros.view(torch.uint8), bits)  # (groups, out)
    if form.layout == GPTQ and bits == 3:
        numbers = numbers + 1 & 7
    return _ordered(parts["weight"], bits, parts) | _affine(numbers.T, parts["scale"].T)


def compressed(form: Form, parts: Parts) -> dict[str, Tensor]:
    """Codes (out, words of in), scale (out, groups), maybe zeros (words of out, groups) and the group of each input.
    Codes and zeros are signed and stored with half of all codes added."""
    if form.kind == "int8":
        return _signed(parts["weight"], parts["scale"])
    (rows, columns), bits = form.shape, int(form.kind.removeprefix("uint"))
    found = {"weight": parts["weight"].view(torch.uint8)[:, : columns * bits // 8].contiguous()}
    if "order" in parts:
        found = _ordered(parts["weight"].T, bits, parts)
    if "zeros" not in parts:  # half of all codes: a power of two, so that the offset is exact in the scale's own type
        scale = parts["scale"]
        return found | {"weight_scale": scale, "weight_offset": scale * -(1 << bits - 1)}
    words = parts["zeros"].T.contiguous().view(torch.uint8)  # (groups, bytes of out)
    run = -words.shape[1] % bits
    padded = torch.cat([words, words.new_zeros(len(words), run)], 1) if run else words
    return found | _affine(unpack_codes(padded, bits)[:, :rows].T, parts["scale"])


def whole_numbers(form: Form, parts: Parts) -> dict[str, Tensor]:
    """compressed-tensors' signed bytes: weight (out, in), scale and maybe zeros (out, groups) or fewer."""
    groups, rows = form.shape[1] // form.group, form.shape[0]
    scale = parts["scale"].reshape(-1, groups).expand(rows, -1)
    zeros = parts["zeros"].reshape(-1, groups).int() if "zeros" in parts else torch.zeros(1, groups)
    found = {"weight": parts["weight"].view(torch.uint8) ^ 128}  # 128 added
    if "order" in parts:
        order = parts["order"].sort(stable=True).indices
        found = {"weight": found["weight"][:, order], "order": order.int()}
    return found | _affine((zeros + 128).expand(rows, -1), scale)


def few_bits(form: Form, parts: Parts) -> dict[str, Tensor]:
    """compressed-tensors' floats: the first of two codes in the low bits, scales in rows and maybe a number that
    divides them, or exponents for scales."""
    weight, scale = parts["weight"], parts["weight_scale"]
    if form.kind == "mxfp8":
        return {"weight": weight, "weight_scale": torch.exp2(scale.float() - 127).bfloat16()}
    weight = weight << 4 | weight >> 4
    if form.kind == "nvfp4":
        every = parts[DIVISOR if DIVISOR in parts else SECOND].float().reshape(())
        return {"weight": weight, "weight_scale": scale.view(torch.uint8), SECOND: every}
    table = small_floats(torch.arange(16), exponent=2, mantissa=1)
    return {"weight": weight, "quant_map": table, "absmax": torch.exp2(scale.float() - 127).flatten()}


def _signed(words: Tensor, scale: Tensor) -> dict[str, Tensor]:
    """Codes of 8 bits (out, words of in) less 128, as our int8 has them."""
    return {"weight": (words.view(torch.uint8) ^ 128).view(torch.int8), "weight_scale": scale.contiguous()}


def _ordered(words: Tensor, bits: int, parts: Parts) -> dict[str, Tensor]:
    """Words (words of in, out) as bytes (out, in b / 8), and where groups of inputs do not stand together an order in
    which they do."""
    if "order" not in parts:
        return {"weight": words.T.contiguous().view(torch.uint8)}
    order = parts["order"].sort(stable=True).indices
    if WORD % bits:  # codes that go on in the next word
        codes = unpack_codes(words.T.contiguous().view(torch.uint8)[:, : len(order) * bits // 8], bits)
        return {"weight": pack_codes(codes[:, order], bits), "order": order.int()}
    moved, each = torch.zeros_like(words), WORD // bits  # codes a word
    for place in range(each):
        inputs = order[place::each]
        codes = words[inputs // each] >> (inputs % each * bits).int()[:, None] & (1 << bits) - 1
        moved |= codes << place * bits
    return {"weight": moved.T.contiguous().view(torch.uint8), "order": order.int()}


def _affine(zeros: Tensor, scale: Tensor) -> dict[str, Tensor]:
    """Scale and offset (out, groups) of both."""
    scale = scale.contiguous()
    return {"weight_scale": scale, "weight_offset": -(zeros.float() * scale.float()).contiguous()}
