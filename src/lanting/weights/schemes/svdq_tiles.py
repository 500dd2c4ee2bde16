"""nunchaku's tensors in the order in which our Linears hold them; what they are is told by `weights.schemes.svdq`.

Its kernels read tiles as the threads of a GPU take them, so everything is permuted but `wtscale`. Within a tile:
    codes        words of 8 inputs' codes, the first in the lowest bits: 128 rows x 64 inputs; row 16 a + 8 b + c, input
                 32 d + 8 e lie at (a, c, e, b, d), of sizes 8, 8, 4, 2, 2
    numbers      one for each of 128 rows, of each group in turn: row 16 a + 8 b + 2 c + d at (a, c, b, d): 8, 4, 2, 2
    e2m1 scales  of 128 rows x 4 groups: row 32 a + 8 b + c, group g at (c, b, a, g): 8, 4, 4, 4
    thin         16 x 16: row 8 a + b, column 8 c + 2 d + e at (b, d, a, c, e): 8, 4, 2, 2, 2
    modulations  4 rows x 64 inputs a run; 16 bits hold the codes of input i, i + 8, i + 16, i + 24 of 32
Bytes are moved and nothing is expanded, so a weight takes no more memory on its way than twice what it is stored in.
Source: deepcompressor's `backend/nunchaku/utils.py` and `backend/tinychat/utils.py`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lanting.weights.form import Form
from lanting.weights.schemes.svdq import SHIFTED, SIX

SHIFT = 0.171875  # what nunchaku adds to GELU's results before it rounds them to 4 bits without a sign
FEW = 1 << 20  # weights that are expanded at a time


def low_rank(form: Form, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The buffers of a `LowRankLinear` around int4 or NVFP4."""
    rows, columns = form.shape
    pairs, smooth = in_pairs(parts["weight"], rows, columns), of_rows(parts["smooth_factor"], columns).flatten()
    held = {"smooth": smooth, "down": thin_down(parts["proj_down"]), "up": thin_up(parts["proj_up"])}
    if form.kind == "int4":
        held["residual.weight"] = in_halves(pairs) ^ 0x88  # from two's complement to 8 more than the value
        held["residual.weight_scale"] = of_rows(parts["wscales"], rows)
    else:
        held["residual.weight"] = pairs >> 4 | pairs << 4  # the first code in the high bits
        held["residual.weight_scale"] = of_small_groups(parts["wscales"].view(torch.uint8), rows)
        second = of_rows(parts["wcscales"], rows).float() if "wcscales" in parts else torch.ones(rows, 1)
        whole = parts["wtscale"].float().reshape(()) if "wtscale" in parts else 1.0
        held["residual.weight_scale_2"] = second * whole
    if "bias" in parts:
        bias = of_rows(parts["bias"], rows).flatten()
        held["bias"] = bias.float() + shifted(held, SHIFT) if form.layout == SHIFTED else bias
    return held


def modulation(form: Form, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The buffers of an `AffineLinear` of 4 bits."""
    rows, columns = form.shape
    groups = columns // form.group
    scale, offset = (parts[part][:groups].T for part in ("wscales", "wzeros"))  # (out, groups)
    held = {"weight": of_sixteens(parts["weight"], rows, columns), "weight_scale": scale, "weight_offset": offset}
    held |= {"bias": parts["bias"]} if "bias" in parts else {}
    if form.layout == SIX:
        held = {part: each.unflatten(0, (-1, 6)).transpose(0, 1).flatten(0, 1) for part, each in held.items()}
        if "bias" in held:
            bias = held["bias"].float().view(6, -1)  # shift, scale, gate, and once more
            bias[1::3] -= 1
            held["bias"] = bias.flatten()
    return {part: each.contiguous() for part, each in held.items()}


def shifted(held: Mapping[str, Tensor], by: float) -> Tensor:
    """R (by / smooth): what a shift of all inputs adds to the results, float32 (out,)."""
    inputs = (by / held["smooth"].float()).view(-1, 2, 32)  # (groups, halves, 32)
    sums: list[Tensor] = []
    codes, scales = held["residual.weight"].unflatten(1, (-1, 32)), held["residual.weight_scale"].float()
    step = max(1, FEW // inputs.numel())
    for some, scale in zip(codes.split(step), scales.split(step), strict=True):  # (n, groups, 32)
        low, high = ((some & 15) * inputs[:, 0]).sum(-1), ((some >> 4) * inputs[:, 1]).sum(-1)
        sums.append(((low + high - 8 * inputs.sum((1, 2))) * scale).sum(1))
    return torch.cat(sums)


def in_pairs(stored: Tensor, rows: int, columns: int) -> Tensor:
    """Codes of 4 bits, two a byte, the first in the low bits: uint8 (rows, columns / 2)."""
    words = stored.reshape(-1).view(torch.int32).view(rows // 128, columns // 64, 8, 8, 4, 2, 2)
    return words.permute(0, 2, 5, 3, 1, 6, 4).reshape(rows, columns // 8).view(torch.uint8)


def in_halves(pairs: Tensor) -> Tensor:
    """The same with value i of each 64 in the low bits and value i + 32 in the high ones, as `Int4Linear` has it."""
    low, high = pairs.unflatten(1, (-1, 2, 16)).unbind(2)  # (rows, groups, 16)
    return torch.stack([low & 15 | high << 4, low >> 4 | high & 0xF0], 3).flatten(1)


def of_rows(stored: Tensor, rows: int) -> Tensor:
    """Numbers (rows, groups); of one for each row (rows, 1)."""
    return stored.reshape(rows // 128, -1, 8, 4, 2, 2).permute(0, 2, 4, 3, 5, 1).reshape(rows, -1)


def of_small_groups(stored: Tensor, rows: int) -> Tensor:
    """The bytes of NVFP4's scales (rows, groups)."""
    return stored.reshape(rows // 128, -1, 8, 4, 4, 4).permute(0, 4, 3, 2, 1, 5).reshape(rows, -1)


def thin_down(stored: Tensor) -> Tensor:
    """(in, rank) as stored -> (rank, in)."""
    columns, rank = stored.shape
    tiles = stored.reshape(columns // 16, rank // 16, 8, 4, 2, 2, 2)
    return tiles.permute(1, 4, 2, 0, 5, 3, 6).reshape(rank, columns)


def thin_up(stored: Tensor) -> Tensor:
    """(out, rank) as stored -> (out, rank)."""
    rows, rank = stored.shape
    tiles = stored.reshape(rows // 16, rank // 16, 8, 4, 2, 2, 2)
    return tiles.permute(0, 4, 2, 1, 5, 3, 6).reshape(rows, rank)


def of_sixteens(stored: Tensor, rows: int, columns: int) -> Tensor:
    """A modulation's codes, two a byte, the first in the low bits: uint8 (rows, columns / 2)."""
    runs = stored.reshape(-1).view(torch.uint8).view(rows // 4, columns // 64, 4, 2, 8, 2)  # a word's bytes are last
    byte = runs.transpose(1, 2)  # (rows / 4, 4, runs of 64, 2, 8 words, 2 bytes)
    even, odd = byte[..., ::2, :], byte[..., 1::2, :]  # words of input 2 m, and of 2 m + 1: (..., 4, 2)
    first, second = even & 15 | odd << 4, even >> 4 | odd & 0xF0  # inputs from 0 and 16 on, from 8 and 24 on
    return torch.stack([first, second], -1).movedim(-3, -1).reshape(rows, columns // 2)  # (..., 2 bytes, 2, 4 m)
