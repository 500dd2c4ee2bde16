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
from torch import Tensor

from lanting.nn.dequant import dequantize
from lanting.nn.linears import Fp8Linear, Int4Linear, Int8Linear
from lanting.plan.kinds import KINDS
from lanting.weights.kquants import quantize

SHAPES = ((3072, 3072), (12288, 3072))  # in, out
ROWS = 512  # of the weight; rows are independent, so some stand for all
APART = 0.03


def packed(weight: Tensor, kind: str) -> Tensor:
    """The weight after packing and expanding, as `lanting quantize` packs it."""
    if kind == "int8":
        return Int8Linear.from_dense(weight).dense(torch.float32)
    if kind == "int4":
        return Int4Linear.from_dense(weight, group=64).dense(torch.float32)
    if kind == "fp8":
        return Fp8Linear.from_dense(weight, scale="tensor").dense(torch.float32)
    return dequantize(quantize(weight, kind.upper()), kind.upper(), torch.float32)


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
    for kind in (each for each in KINDS.values() if each.packed):
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
