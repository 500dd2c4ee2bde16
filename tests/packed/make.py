"""Weights as bitsandbytes and comfy-kitchen pack them, and what these packages say they are worth.

    pip install bitsandbytes==0.50.2 comfy-kitchen==0.2.40
    python tests/packed/make.py

writes `bitsandbytes.safetensors` and `comfy-kitchen.safetensors` beside itself: for each case the packed tensors under
the names that files have, and `CASE.values` (out, in) float32. They are kept, so that the suite needs neither package.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

HERE = Path(__file__).parent
SIZES = ((16, 64), (6, 100))  # rows of whole runs, and rows that end within one


def bitsandbytes_tensors() -> dict[str, Tensor]:
    from bitsandbytes import functional

    torch.manual_seed(0)
    found: dict[str, Tensor] = {}
    for rows, columns in SIZES:
        weight = torch.randn(rows, columns)
        for kind in ("nf4", "fp4"):
            for nested in (False, True):
                name = f"{kind}{'-nested' if nested else ''}-{rows}x{columns}"
                packed, state = functional.quantize_4bit(
                    weight, blocksize=64, quant_type=kind, compress_statistics=nested
                )
                found[f"{name}.weight"] = packed
                found |= {f"{name}.weight.{part}": each for part, each in state.as_dict(packed=True).items()}
                found[f"{name}.values"] = functional.dequantize_4bit(packed, state)
        packed, numbers, _ = functional.int8_vectorwise_quant(weight.half())
        name = f"int8-{rows}x{columns}"
        found |= {f"{name}.weight": packed, f"{name}.SCB": numbers, f"{name}.weight_format": torch.tensor(0).byte()}
        found[f"{name}.values"] = functional.int8_vectorwise_dequant(packed, numbers)
    return found


def kitchen_tensors() -> dict[str, Tensor]:
    from comfy_kitchen.tensor.mxfp8 import TensorCoreMXFP8Layout
    from comfy_kitchen.tensor.nvfp4 import TensorCoreNVFP4Layout

    torch.manual_seed(0)
    found: dict[str, Tensor] = {}
    sizes = {TensorCoreNVFP4Layout: ((32, 64), (144, 80)), TensorCoreMXFP8Layout: ((160, 32), (32, 160))}
    for layout, kind in ((TensorCoreNVFP4Layout, "nvfp4"), (TensorCoreMXFP8Layout, "mxfp8")):
        for rows, columns in sizes[layout]:  # less than a tile of scales, and more
            packed, about = layout.quantize(torch.randn(rows, columns) / 50)
            name = f"{kind}-{rows}x{columns}"
            found |= {f"{name}.weight{end}": each for end, each in layout.state_dict_tensors(packed, about).items()}
            note = torch.tensor(list(f'{{"format": "{kind}"}}'.encode()), dtype=torch.uint8)
            found |= {f"{name}.comfy_quant": note, f"{name}.values": layout.dequantize(packed, about)}
    return found


if __name__ == "__main__":
    for name, made in (("bitsandbytes", bitsandbytes_tensors), ("comfy-kitchen", kitchen_tensors)):
        save_file({key: each.contiguous() for key, each in made().items()}, HERE / f"{name}.safetensors")
