"""What rounding to 8 bits once more adds to each kind of weights: python benchmarks/kernel_errors.py

Products of 256 rows with one weight (1024 x 3072), as the relative error of the result in percent: of the kind itself
(its values in float64 against the weight before packing), and of the kernels (their result against the kind's values).
Rows are normal, or have a few columns twenty times as large, as activations of transformers do; the weight is normal.
No time is measured.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lanting.kernels import calls
from lanting.kernels.library import instruction_set
from lanting.nn.linears import GgufLinear, Int4Linear, Int8Linear, PackedLinear
from lanting.weights.kquants import quantize

ROWS, OUT, COLUMNS = 256, 1024, 3072


def kinds(weight: Tensor) -> dict[str, PackedLinear]:
    made: dict[str, PackedLinear] = {"int8": Int8Linear.from_dense(weight)}
    made |= {f"int4, groups of {group}": Int4Linear.from_dense(weight, group=group) for group in (128, 64, 32, 16)}
    for kind in ("Q8_0", "Q6_K", "Q4_K", "Q4_0"):
        made[kind] = GgufLinear.from_packed(quantize(weight, kind), kind, COLUMNS)
    return made


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm()) * 100


def added(linear: PackedLinear, x: Tensor) -> float:
    """Of the kernels, against the kind's own values."""
    scale = None if isinstance(linear, GgufLinear) else linear.weight_scale
    weight = calls.packed(linear.kind, linear.weight, scale, COLUMNS)  # type: ignore[arg-type]
    assert weight is not None
    out = calls.product(calls.quantize(x), weight, torch.empty(ROWS, OUT))
    return error(out, x.double() @ linear.values(torch.float32).double().T)


def main() -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(OUT, COLUMNS) * 0.02, torch.randn(ROWS, COLUMNS)
    spiky = x.clone()
    spiky[:, torch.randperm(COLUMNS)[:8]] *= 20
    print(f"instruction set {instruction_set()}\n")
    print("| kind | of the kind | added, normal rows | added, rows with outliers |\n|---|---|---|---|")
    for name, linear in kinds(weight).items():
        own = error(linear.values(torch.float32).double() @ x.double().T, weight.double() @ x.double().T)
        print(f"| {name} | {own:.2f} % | {added(linear, x):.2f} % | {added(linear, spiky):.2f} % |")


if __name__ == "__main__":
    main()
