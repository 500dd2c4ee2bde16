"""Linears of 4 bits whose codes stand for floats of a table, in the bytes that other programs write.

    TableLinear  bitsandbytes' nf4 and fp4: the table is in the file, and one scale covers a run of weights, counted
                 through the whole matrix; scales may be bytes of a second table themselves
    Nvfp4Linear  NVIDIA's: floats of 2 exponent bits and 1 of mantissa, an 8-bit float for 16 of them, a number for all

Two codes a byte, the first one in the high bits. Values are found in float32 and rounded once. Rejected: rounding to
our int4 while loading, which would be quicker on CPUs and err twice.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lanting.nn.linears import PackedLinear
from lanting.nn.rounding import expanded

NVFP4_GROUP = 16  # inputs that share an 8-bit scale


class CodedLinear(PackedLinear):
    """`weight` (out, in / 2) uint8; subclasses say what codes and scales mean."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True):
        super().__init__(in_features, out_features, bias)
        if in_features % 2:
            raise ValueError(f"rows of {in_features} are no whole bytes of 4-bit codes")
        self.register_buffer("weight", torch.empty(out_features, in_features // 2, dtype=torch.uint8))

    def table(self) -> Tensor:
        """(16,) float32"""
        raise NotImplementedError

    def scales(self) -> Tensor:
        """All scales, float32, as `spread` wants them."""
        raise NotImplementedError

    def spread(self, scales: Tensor, rows: Tensor) -> Tensor:
        """Those of some rows (n,): (n, groups), or (n, in) where groups don't end with rows."""
        return scales[rows]

    def values(self, dtype: torch.dtype, rows: Tensor | None = None) -> Tensor:
        table, scales = self.table(), self.scales()
        pairs = torch.stack([table.repeat_interleave(16), table.repeat(16)], 1)  # (256, 2): of a byte

        def find(some: Tensor) -> Tensor:
            scale = self.spread(scales, some)  # (n, groups)
            bytes_of = self.weight[some].flatten().int()  # `index_select`: on a CPU pairs[...] takes ten times as long
            numbers = pairs.index_select(0, bytes_of).view(len(some), scale.shape[1], -1)
            return numbers.mul_(scale[:, :, None]).flatten(1)

        return expanded(self, dtype, rows, find)


class TableLinear(CodedLinear):
    """bitsandbytes' 4 bits: code's value in `quant_map` (16,) times the scale of its run of `group` weights.

    absmax  (runs,) float32; where `nested` is given, uint8: places in `nested_quant_map` (256,), times `nested_absmax`
            of their run, plus an offset
    nested  (runs of scales that share a number, the offset)
    """

    quant_map: Tensor
    absmax: Tensor
    nested_absmax: Tensor
    nested_quant_map: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        kind: str = "nf4",
        group: int = 64,
        nested: tuple[int, float] | None = None,
    ):
        super().__init__(in_features, out_features, bias)
        if group < 1 or (nested is not None and nested[0] < 1):
            raise ValueError(f"runs of {group} weights and {nested} scales are none")
        self.kind, self.group, self.nested = kind, group, nested
        runs = -(-in_features * out_features // group)
        self.register_buffer("quant_map", torch.empty(16))
        self.register_buffer("absmax", torch.empty(runs, dtype=torch.float32 if nested is None else torch.uint8))
        if nested is not None:
            self.register_buffer("nested_quant_map", torch.empty(256))
            self.register_buffer("nested_absmax", torch.empty(-(-runs // nested[0])))

    def table(self) -> Tensor:
        return self.quant_map.float()

    def scales(self) -> Tensor:
        """(out, groups) where runs end with rows, else (runs,)"""
        scales = self.absmax
        if self.nested is not None:
            run, offset = self.nested
            shared = self.nested_absmax.float().repeat_interleave(run)[: len(scales)]
            scales = self.nested_quant_map.float()[scales.int()] * shared + offset
        return scales.float().view(self.out_features, -1) if self.in_features % self.group == 0 else scales.float()

    def spread(self, scales: Tensor, rows: Tensor) -> Tensor:
        if scales.ndim == 2:
            return scales[rows]
        places = rows[:, None] * self.in_features + torch.arange(self.in_features, device=rows.device)
        return scales[places // self.group]


class Nvfp4Linear(CodedLinear):
    """E2M1 codes; `weight_scale` (out, in / 16) holds the bytes of e4m3 floats, `weight_scale_2` () one float32, or
    (out, 1) one for each row (`in_rows`).

    Bytes, since some devices have no 8-bit floats; files keep them in tiles (`untiled`).
    """

    kind = "nvfp4"
    weight_scale: Tensor
    weight_scale_2: Tensor

    def __init__(self, in_features: int, out_features: int, bias: bool = True, in_rows: bool = False):
        super().__init__(in_features, out_features, bias)
        if in_features % NVFP4_GROUP:
            raise ValueError(f"rows of {in_features} are no whole groups of {NVFP4_GROUP}")
        self.register_buffer("weight_scale", torch.empty(out_features, in_features // NVFP4_GROUP, dtype=torch.uint8))
        self.register_buffer("weight_scale_2", torch.empty((out_features, 1) if in_rows else ()))

    def table(self) -> Tensor:
        return small_floats(torch.arange(16, device=self.weight.device), exponent=2, mantissa=1)

    def scales(self) -> Tensor:
        """(out, groups)"""
        return small_floats(self.weight_scale, exponent=4, mantissa=3) * self.weight_scale_2.float()


class DividedLinear(Nvfp4Linear):
    """One whose number for all divides the scales, as compressed-tensors has it."""

    def scales(self) -> Tensor:
        return small_floats(self.weight_scale, exponent=4, mantissa=3) / self.weight_scale_2.float()


def small_floats(codes: Tensor, exponent: int, mantissa: int) -> Tensor:
    """What integers stand for as floats of so many bits, by arithmetic: some devices have no such type, and nothing may
    be brought to a GPU while its work is recorded. Float32; a code that is no number (e4m3's NaN) counts as one."""
    codes = codes.int()
    fraction, power = codes & (1 << mantissa) - 1, codes >> mantissa & (1 << exponent) - 1
    whole = fraction + (power > 0) * (1 << mantissa)  # the leading 1 is not stored
    shift = power.clamp(min=1) - (1 << exponent - 1) + 1 - mantissa
    sign = 1 - 2 * (codes >> exponent + mantissa)
    return torch.ldexp((sign * whole).float(), shift)


def untiled(scales: Tensor, rows: int, columns: int) -> Tensor:
    """Scales (of one byte each) as tensor cores read them, in row order: (rows, columns), contiguous.

    They come in tiles of 128 x 4, padded to whole ones; row r, column c of one lies at 16 (r % 32) + 4 (r // 32) + c.
    Source: cuBLAS, "1D block scaling factors layout". Raises ValueError where there are more or fewer.
    """
    down, across = -(-rows // 128), -(-columns // 4)
    if scales.numel() != down * across * 512:
        raise ValueError(f"{scales.numel()} scales are no tiles of {rows} x {columns}")
    tiles = scales.reshape(down, across, 32, 4, 4)  # (tile row, tile column, r % 32, r // 32, c)
    whole = tiles.permute(0, 3, 2, 1, 4).reshape(down * 128, across * 4)
    return whole[:rows, :columns].contiguous()
