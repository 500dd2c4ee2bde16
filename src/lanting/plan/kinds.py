"""Kinds of weights: bytes per weight, what expanding one costs, and how far a Linear's output then is from exact.

A kind packs the Linears of the transformer's blocks and of the text encoder's layers; what is small or sensitive
(embeddings, the eye, norms, biases, the few Linears outside) keeps the 16 or 32 bits of the activations.

`error` is the relative error of one Linear's output, Gaussian weights and inputs, 3072 to 3072 and 12288 to 3072,
written by benchmarks/kind_errors.py. It ranks kinds; it does not say how a picture looks.
"""

from __future__ import annotations

from dataclasses import dataclass

from lanting.core.errors import RequestError

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}  # of a number
RUN = 1 << 19  # weights of a GGUF block type that a CPU expands at a time, lanting.nn.dequant's


@dataclass(frozen=True, slots=True)
class Kind:
    """`block` weights of one row take `stored` bytes; every row takes `row` bytes more.

    `scratch`: bytes per weight beside the expanded one while it is expanded; a CPU expands all but int4 a few rows at a
    time (`in_runs`) and needs next to none.
    """

    name: str
    block: int
    stored: int
    row: int = 0
    error: float = 0.0
    packed: bool = True
    scratch: float = 0.0

    def __hash__(self) -> int:
        return hash(self.name)  # which is all that tells kinds apart; plans look thousands of them up

    @property
    def bits(self) -> float:
        """Per weight, scales of blocks included."""
        return 8 * self.stored / self.block

    @property
    def in_runs(self) -> bool:
        return self.packed and self.name != "int4"

    def bytes(self, rows: int, columns: int) -> int:
        """Of a weight (rows, columns), packed as `lanting.attach.quant` does it."""
        if self.name == "int4" and columns % self.block:  # smaller groups where 64 does not divide, else int8
            group = next((size for size in (32, 16) if columns % size == 0), 0)
            return rows * (columns // 2 + 2 * columns // group) if group else KINDS["int8"].bytes(rows, columns)
        return rows * (-(-columns // self.block) * self.stored + self.row)


KINDS = {
    kind.name: kind
    for kind in (
        Kind("fp32", 1, 4, packed=False),
        Kind("bf16", 1, 2, packed=False),
        Kind("fp16", 1, 2, packed=False),
        Kind("q8_0", 32, 34, error=0.0050, scratch=4),
        Kind("int8", 1, 1, row=4, error=0.0089, scratch=4),
        Kind("q6_k", 256, 210, error=0.0173, scratch=4),
        Kind("fp8", 1, 1, error=0.0265, scratch=4),
        Kind("q5_k", 256, 176, error=0.0354, scratch=4),
        Kind("q5_1", 32, 24, error=0.0338, scratch=4),
        Kind("q5_0", 32, 22, error=0.0403, scratch=4),
        Kind("q4_k", 256, 144, error=0.0708, scratch=4),
        Kind("q4_1", 32, 20, error=0.0701, scratch=4),
        Kind("q4_0", 32, 18, error=0.0810, scratch=4),
        Kind("int4", 64, 34, error=0.0907, scratch=1),
        Kind("q3_k", 256, 110, error=0.1434, scratch=4),
        Kind("q2_k", 256, 84, error=0.2660, scratch=4),
    )
}
CODES = {2: 0.5019, 3: 0.2139, 4: 0.0998, 5: 0.0482, 6: 0.0238, 7: 0.0118, 8: 0.0059}  # bits -> error
STORED = {  # kinds that files come in and none is written in; the bytes of scales differ a little between files
    kind.name: kind
    for kind in (
        Kind("mxfp8", 32, 34, error=0.0265, scratch=4),
        Kind("nvfp4", 16, 9, error=0.0949, scratch=4),
        Kind("nf4", 64, 33, error=0.0924, scratch=4),
        Kind("fp4", 64, 33, error=0.1234, scratch=4),
        *(Kind(f"uint{bits}", 128, 16 * bits + 4, error=error, scratch=4) for bits, error in CODES.items()),
    )
}
KNOWN = KINDS | STORED  # all that a file may hold
OURS = ("int8", "fp8", "int4")  # kinds that any model can be brought to while it loads


def kind_named(name: str) -> Kind:
    """The kind of that name, or a RequestError with all of them."""
    if name.lower() in KINDS:
        return KINDS[name.lower()]
    raise RequestError(
        "the kind of weights {name} is none we know; use one of {known}", name=name, known=", ".join(KINDS)
    )


def nearest(bits: float) -> Kind:
    """The packed kind with about that many bits per weight, for files that mix several."""
    return min((kind for kind in KINDS.values() if kind.packed), key=lambda kind: abs(kind.bits - bits))


def plain(dtype: str) -> Kind:
    """Weights as activations are: bfloat16, float16 or float32."""
    return KINDS[{"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}[dtype]]


def expanding(weights: int, kind: Kind, width: int, on_cpu: bool) -> int:
    """Bytes alive while a packed weight is expanded: the result, and what making it needs beside."""
    if not kind.packed:
        return 0
    if on_cpu and kind.in_runs:
        return weights * width + min(weights, RUN) * 16
    return int(weights * (width + (kind.scratch if on_cpu else min(kind.scratch, 2))))
