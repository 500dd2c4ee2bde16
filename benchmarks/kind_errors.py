"""How far one Linear's output is from exact when its weights are packed, kind by kind: what the planner ranks them by.

    python benchmarks/kind_errors.py [--samples 256] [--json FILE]

Gaussian weights and inputs, the two shapes of a block's Linears (3072 to 3072, 12288 to 3072), float32 products; the
error is the root of the mean square of the difference over that of the exact output, the mean of both shapes. Prints
the number beside the one in `lanting.plan.kinds`, and fails where they are more than 3 % apart.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from lanting.nn.dequant import dequantize
from lanting.nn.fourbit import small_floats
from lanting.nn.linears import Fp8Linear, Int4Linear, Int8Linear
from lanting.plan.kinds import KNOWN, STORED
from lanting.weights.kquants import quantize

SHAPES = ((3072, 3072), (12288, 3072))  # in, out
ROWS = 512  # of the weight; rows are independent, so some stand for all
APART = 0.03
BITSANDBYTES = Path(__file__).parent.parent / "tests" / "packed" / "bitsandbytes.safetensors"


def packed(weight: Tensor, kind: str) -> Tensor:
    """The weight after packing and expanding, as `lanting quantize` packs it, or for kinds that we only read in the
    plainest way: to the nearest code under the largest scale."""
    if kind in STORED:
        return others(weight, kind)
    if kind == "int8":
        return Int8Linear.from_dense(weight).dense(torch.float32)
    if kind == "int4":
        return Int4Linear.from_dense(weight, group=64).dense(torch.float32)
    if kind == "fp8":
        return Fp8Linear.from_dense(weight, scale="tensor").dense(torch.float32)
    return dequantize(quantize(weight, kind.upper()), kind.upper(), torch.float32)


def others(weight: Tensor, kind: str) -> Tensor:
    """Tables of bitsandbytes come from a file that it wrote."""
    if kind.startswith("uint"):
        blocks, top = weight.unflatten(1, (-1, 128)), 2 ** int(kind.removeprefix("uint")) - 1
        low, high = blocks.amin(-1, keepdim=True), blocks.amax(-1, keepdim=True)
        scale = (high - low) / top
        return (((blocks - low) / scale).round() * scale + low).flatten(1)
    if kind == "mxfp8":
        blocks = weight.unflatten(1, (-1, 32))
        scale = torch.exp2((blocks.abs().amax(-1, keepdim=True) / 448).log2().ceil())
        return ((blocks / scale).to(torch.float8_e4m3fn).float() * scale).flatten(1)
    if kind == "nvfp4":
        table = small_floats(torch.arange(16), exponent=2, mantissa=1)
        blocks = weight.unflatten(1, (-1, 16))
        every = weight.abs().max() / (448 * 6)
        scale = (blocks.abs().amax(-1, keepdim=True) / 6 / every).to(torch.float8_e4m3fn).float() * every
    else:
        table = load_file(BITSANDBYTES)[f"{kind}-16x64.weight.quant_map"]
        blocks = weight.unflatten(1, (-1, 64))
        scale = blocks.abs().amax(-1, keepdim=True)
    steps, order = table.sort()
    codes = torch.bucketize(blocks / scale, (steps[1:] + steps[:-1]) / 2)
    return (table[order][codes] * scale).flatten(1)


def error(kind: str, samples: int) -> float:
    """Of both shapes, the mean."""
    found = []
    for columns, _ in SHAPES:
        generator = torch.Generator().manual_seed(columns)
        weight = torch.randn(ROWS, columns, generator=generator)
        inputs = torch.randn(samples, columns, generator=generator)
        exact, rounded = inputs @ weight.T, inputs @ packed(weight, kind).T
        found.append(float((rounded - exact).norm() / exact.norm()))
    return sum(found) / len(found)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--json", type=Path)
    wish = parser.parse_args()
    found, wrong = {}, []
    for kind in (each for each in KNOWN.values() if each.packed):
        found[kind.name] = error(kind.name, wish.samples)
        apart = found[kind.name] / kind.error - 1
        wrong += [kind.name] if abs(apart) > APART else []
        print(f"{kind.name:6} {found[kind.name]:.4f}  planner {kind.error:.4f}  {apart:+.1%}", flush=True)
    if wish.json:
        wish.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if wrong:
        print(f"the planner's numbers are stale: {', '.join(wrong)}", file=sys.stderr)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
