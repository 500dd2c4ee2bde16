"""The types of GGUF tensors: their numbers in a file, and how many values share how many bytes.

Without torch, because headers are read before it is loaded. Block layouts are in `nn.dequant`.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class BlockType:
    """`values` neighbours of a row are stored together in `size` bytes."""

    name: str
    code: int  # how a file names the type
    values: int
    size: int

    @property
    def packed(self) -> bool:
        """Whether values share bytes or scales, so that only whole blocks have a meaning."""
        return self.values > 1

    def row_bytes(self, columns: int) -> int:
        """Bytes of a row of `columns` values. Raises ValueError where blocks do not fill it."""
        if columns % self.values:
            raise ValueError(f"rows of {columns} are no whole number of {self.name} blocks of {self.values}")
        return columns // self.values * self.size


TYPES = {
    name: BlockType(name, code, values, size)
    for name, code, values, size in (
        ("F32", 0, 1, 4),
        ("F16", 1, 1, 2),
        ("Q4_0", 2, 32, 18),
        ("Q4_1", 3, 32, 20),
        ("Q5_0", 6, 32, 22),
        ("Q5_1", 7, 32, 24),
        ("Q8_0", 8, 32, 34),
        ("Q2_K", 10, 256, 84),
        ("Q3_K", 11, 256, 110),
        ("Q4_K", 12, 256, 144),
        ("Q5_K", 13, 256, 176),
        ("Q6_K", 14, 256, 210),
        ("IQ2_XXS", 16, 256, 66),
        ("IQ2_XS", 17, 256, 74),
        ("IQ3_XXS", 18, 256, 98),
        ("IQ1_S", 19, 256, 50),
        ("IQ4_NL", 20, 32, 18),
        ("IQ3_S", 21, 256, 110),
        ("IQ2_S", 22, 256, 82),
        ("IQ4_XS", 23, 256, 136),
        ("I8", 24, 1, 1),
        ("I16", 25, 1, 2),
        ("I32", 26, 1, 4),
        ("I64", 27, 1, 8),
        ("F64", 28, 1, 8),
        ("IQ1_M", 29, 256, 56),
        ("BF16", 30, 1, 2),
        ("TQ1_0", 34, 256, 54),
        ("TQ2_0", 35, 256, 66),
        ("MXFP4", 39, 32, 17),
        ("NVFP4", 40, 64, 36),
    )
}
"""Every type that has a meaning on disk. Left out: Q8_1 and Q8_K, which exist only inside a computation."""

BY_CODE = {kind.code: kind for kind in TYPES.values()}
