"""Weights as other packages pack them, and what these packages say they are worth.

    pip install bitsandbytes==0.50.2 comfy-kitchen==0.2.40
    python tests/packed/make.py

writes `bitsandbytes.safetensors` and `comfy-kitchen.safetensors` beside itself: for each case the packed tensors under
the names that files have, and `CASE.values` (out, in) float32. They are kept, so that the suite needs neither package.
"""

from __future__ import annotations

import sys
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


def nunchaku_tensors() -> dict[str, Tensor]:
    """As deepcompressor converts Linears for nunchaku, of numbers that are formulas: there are no values beside them.

    pip install --no-deps deepcompressor-toolkit==0.1.0
    """
    sys.path.insert(0, str(HERE.parent))
    from deepcompressor.backend.nunchaku import convert

    from nunchaku import E2M1, SHIFT, Numbers

    square, six, half = Numbers(), Numbers(24, 128), torch.bfloat16
    scales, small = square.scales(64), square.scales(16)
    integers = square.codes() * scales.repeat_interleave(64, 1)
    whole = torch.exp2(-(torch.arange(128) % 5).float())
    floats = E2M1[square.codes(0)] * small.repeat_interleave(16, 1) * whole[:, None]
    smooth, bias = square.smooth.to(half), square.bias.to(half)
    thin = square.thin(128).to(half)
    made = {
        "int4": convert.convert_to_nunchaku_w4x4y16_linear_state_dict(
            integers.to(half),
            scales[:, None, :, None].to(half),
            bias,
            smooth,
            (thin.T.contiguous(), thin.flip(0)),
            shift=torch.tensor(SHIFT),
        ),
        "fp4": convert.convert_to_nunchaku_w4x4y16_linear_state_dict(
            floats.to(half),
            whole[:, None, None, None].to(half),
            bias,
            smooth,
            float_point=True,
            subscale=small[:, None, :, None].to(half),
        ),
        "modulation": convert.convert_to_nunchaku_w4x16_adanorm_zero_state_dict(
            (six.codes(-7) * six.scales(64).repeat_interleave(64, 1)).to(half),
            six.scales(64)[:, None, :, None].to(half),
            six.bias.to(half),
        ),
    }
    return {f"{name}.{part}": each for name, parts in made.items() for part, each in parts.items()}


if __name__ == "__main__":
    for name, made in (
        ("bitsandbytes", bitsandbytes_tensors),
        ("comfy-kitchen", kitchen_tensors),
        ("nunchaku", nunchaku_tensors),
    ):
        save_file({key: each.contiguous() for key, each in made().items()}, HERE / f"{name}.safetensors")
