"""How one weight is stored: what every scheme of packing is brought to. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

SECOND = "weight_scale_2"  # NVFP4's, one number for all
SVDQUANT = "SVDQuant"  # of nunchaku; layouts begin with the name of the program or of the scheme


@dataclass(frozen=True, slots=True)
class Form:
    """A weight (out, in).

    kind    "int8", "int4", "fp8 e4m3", "fp8 e5m2", "nvfp4", "mxfp8", bitsandbytes' "nf4" and "fp4", "uint2" to "uint8"
            (codes with a scale and an offset for each group), or a GGUF block type such as "Q4_K"
    shape   (out, in) of the values
    scale   the shape of its scales in memory; None: it has none
    group   int4, nf4, fp4, uint2 to uint8: weights that share a scale
    rotate  block of the Hadamard rotation it went through; 0: none
    nested  nf4, fp4: scales that share a number, and what is added; None: scales are floats
    names   what its parts are called in the file: "weight", and "weight_scale" where it has scales
    layout  another program's, whose parts `schemes.layouts` puts in order; "": they are held as they are stored
    held    its bytes in memory, where a layout makes others of them; 0: those of its parts in the file
    rank    of the thin product that is added to it; 0: there is none
    numbers what the codes of an SDNQ type stand for ("int5", "float6_e3m2fn"); "": integers from 0 on
    """

    kind: str
    shape: tuple[int, int]
    scale: tuple[int, ...] | None = None
    group: int = 0
    rotate: int = 0
    nested: tuple[int, float] | None = None
    names: Mapping[str, str] = field(default_factory=dict[str, str])
    layout: str = ""
    held: int = 0
    rank: int = 0
    numbers: str = ""

    @property
    def program(self) -> str:
        """Whose layout it is."""
        return self.layout.partition(" ")[0]

    def words(self) -> str:
        """For people: "fp8 e4m3 scaled", "int4 in groups of 64, AWQ", "Q4_K", "SVDQuant int4, low-rank 32"."""
        thin = f", low-rank {self.rank}" if self.rank else ""
        if self.program == SVDQUANT:
            return f"{SVDQUANT + ' ' if thin else ''}{self.kind}{thin}"
        scaled = " scaled" if self.kind.startswith("fp8") and self.scale is not None else ""
        grouped = f" in groups of {self.group}" if self.group else ""
        told = f", {self.program}" if self.layout else ""
        return (self.numbers or self.kind) + scaled + grouped + (" rotated" if self.rotate else "") + thin + told
