"""Every kernel through Triton's compiler and NVIDIA's assembler, for GPUs that need not be here. Prints one line each.

Run as a program: whoever imported Triton for its interpreter can't compile.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lanting.kernels.gpu.jit import attention, products, rows
from lanting.kernels.gpu.products import WIDE, four_bit_tiles

B, F, I8, U8, E4 = "*bf16", "*fp32", "*i8", "*u8", "*fp8e4nv"
LINE = {"SCALED": False, "BIAS": True, "GELU": True, "GATE": False, "CLIP": False}


def cases(floats: bool) -> Any:
    """(kernel, types of what is no int32, constants, warps, stages)."""
    for form, out in ((0, B), (1, I8), *(((2, E4),) if floats else ())):
        kept = {"out": out, "out_scale": F, "eps": "fp32"}
        vectors = dict.fromkeys(("x", "y", "gate", "shift", "scale", "moved", "bias", "base"), B)
        turn = 256 if form == 1 else 0
        given = {"FORM": form, "ROTATE": turn}
        yield (
            rows.norm_kernel,
            vectors | kept,
            {"ADD": True, "SHIFT": form > 0, "CLIP": True, **given, "BLOCK": 4096},
            8,
            3,
        )
        yield rows.activate_kernel, vectors | kept, {**LINE, **given, "BLOCK": 16384}, 16, 3
        if form != 2:  # sums in one case, numbers in the other
            sums = dict.fromkeys(("gate_row", "gate_column", "up_row", "up_column"), F)
            pair = dict.fromkeys(("gate", "up"), B if form else "*i32")
            yield rows.swiglu_kernel, kept | sums | pair, {"SCALED": form == 0, **given, "BLOCK": 16384}, 16, 3
    scaled = {"x": "*i32", "row_scale": F, "column_scale": F, "bias": B, "gate": B, "base": B, "out": B, "out_scale": F}
    yield (
        rows.activate_kernel,
        scaled,
        {**LINE, "SCALED": True, "GATE": True, "FORM": 0, "ROTATE": 0, "BLOCK": 4096},
        8,
        3,
    )
    heads = dict.fromkeys(("q", "k", "first_q", "first_k", "other_q", "other_k"), B)
    tables = {"cosines": F, "sines": F, "eps": "fp32"}
    yield rows.turn_kernel, heads | tables, {"HEADS": 16, "HALF": 64}, 4, 3
    given = {"x_scale": F, "w_scale": F, "bias": B, "out": B}
    for kind in (I8, E4) if floats else (I8,):
        tiles = {"BM": 128, "BN": 128, "BK": 128}
        types = {**given, "x": kind, "weight": kind}
        yield products.eight_bit_kernel, types, {"BIAS": True, "INTEGER": kind == I8, **tiles}, 8, 3
    four = {**given, "w_scale": B, "x": B, "weight": U8}
    tiles = {"BIAS": True, "GROUP": 64, "BM": 64, "BN": 128}
    yield products.four_bit_kernel, four, {**tiles, "BYTES": 32}, 4, 3
    yield products.four_by_eight_kernel, {**four, "x": I8}, tiles, 4, 3
    codes = {"x": B, "mean": F, "codes": I8, "scales": F, "factor": "fp32"}
    yield attention.head_codes_kernel, codes, {"SMOOTH": True, "BLOCK": 64, "E": 128}, 4, 3
    heads = {"q": I8, "k": I8, "v": B, "q_scale": F, "k_scale": F, "seen": U8, "out": B}
    yield attention.attend_kernel, heads, {"MASK": True, "BM": 128, "BN": 64, "E": 128}, 8, 3
    yield products.expand_kernel, {"weight": U8, "w_scale": B, "out": B}, {"GROUP": 64, "BYTES": 1024}, 4, 3


def widest() -> Any:
    """Products that no other tile stands in for where they are out of a GPU's shared memory."""
    for kind, dtype in ((F, torch.float32), (B, torch.bfloat16)):
        down, across, deep, warps, stages = four_bit_tiles(WIDE - 1, dtype)
        types = {**dict.fromkeys(("x", "w_scale", "bias", "out"), kind), "weight": U8}
        tiles = {"BM": down, "BN": across, "BYTES": deep}
        yield products.four_bit_kernel, types, {"BIAS": True, "GROUP": 64, **tiles}, warps, stages


def main(capability: int) -> None:
    for number, (kernel, types, constants, warps, stages) in enumerate((*widest(), *cases(capability >= 89))):
        if capability < 90 and number % 2:
            continue  # every other one for GPUs that are not new: this takes seconds
        names = kernel.arg_names
        signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
        aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name] != "fp32"}
        values = {(names.index(name),): value for name, value in constants.items()}
        source = ASTSource(kernel, signature, values, {key: a for key, a in aligned.items() if key not in values})
        options = {"num_warps": warps, "num_stages": stages}
        made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        print(capability, kernel.__name__, made.metadata.shared, len(made.asm["cubin"]), flush=True)


if __name__ == "__main__":
    for capability in sys.argv[1:]:
        main(int(capability))
