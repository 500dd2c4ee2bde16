"""Weights as SDNQ packs them, and what it says they are worth; kept as those of `make.py` are.

    pip install --no-deps sdnq==0.2.8
    SDNQ_USE_TORCH_COMPILE=0 python tests/packed/make_sdnq.py

writes `sdnq.safetensors` and `sdnq-kernels.safetensors` beside itself: for each case the tensors under SDNQ's names and
`CASE.values` (out, in), float32; what a config.json would say of the cases stands in the files' metadata.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from sdnq.quantizer import sdnq_quantize_layer_weight
from torch import Tensor

INTEGERS = [f"{sign}int{bits}" for bits in range(2, 9) for sign in ("", "u")]
SPLITS = ["float8_e4m3fn", "float8_e5m2", "float8_e3m4fn", "float7_e3m3fn", "float6_e3m2fn", "float5_e2m2fn"]
SPLITS += ["float4_e2m1fn", "float3_e1m1fn", "float2_e1m0fn", "float6_e3m3fnu", "float4_e2m2fnu", "float3_e2m1fnu"]
THIN, TURNED = {"use_svd": True, "svd_rank": 3}, {"use_hadamard": True, "hadamard_group_size": 16}
KERNELS = {"use_quantized_matmul": True}
CASES: dict[str, tuple[tuple[int, int], dict[str, Any]]] = {
    **{name: ((2, 32), {"weights_dtype": name, "group_size": 16}) for name in (*INTEGERS, *SPLITS)},
    "thin": ((8, 32), {"weights_dtype": "uint4", "group_size": 16, **THIN}),
    "thin-signed": ((8, 32), {"weights_dtype": "int5", "group_size": 16, **THIN}),
    "thin-kernels": ((32, 32), {"weights_dtype": "uint4", "group_size": 16, **THIN, **KERNELS}),
    "rotated": ((4, 32), {"weights_dtype": "uint4", "group_size": 16, **TURNED}),
    "rotated-signed": ((4, 32), {"weights_dtype": "int8", "group_size": -1, **TURNED}),
    "thin-rotated": ((8, 32), {"weights_dtype": "uint4", "group_size": 16, **THIN, **TURNED}),
    "levels": ((4, 32), {"weights_dtype": "uint4", "group_size": 16, "use_codebook": True}),
    "levels-rows": ((4, 32), {"weights_dtype": "uint3", "group_size": -1, "use_codebook": True}),
    "levels-thin-rotated": (
        (4, 32),
        {"weights_dtype": "uint2", "group_size": 16, "use_codebook": True, **THIN, **TURNED},
    ),
    "rows": ((4, 32), {"weights_dtype": "int8", "group_size": -1}),
    "rows-unsigned": ((4, 32), {"weights_dtype": "uint6", "group_size": -1}),
    "whole": ((4, 32), {"weights_dtype": "int8", "group_size": -2}),
    "kernels": ((32, 48), {"weights_dtype": "int8", "group_size": -1, **KERNELS}),
    "kernels-unsigned": ((32, 32), {"weights_dtype": "uint8", "group_size": -1, **KERNELS}),
    "kernels-float": ((32, 32), {"weights_dtype": "float8_e4m3fn", "group_size": -1, **KERNELS}),
    "kernels-whole": ((32, 48), {"weights_dtype": "int8", "group_size": -2, **KERNELS}),
    "kernels-packed": ((32, 32), {"weights_dtype": "int6", "group_size": -1, **KERNELS}),
    **{f"odd-{name}": ((8, 36), {"weights_dtype": name, "group_size": 12}) for name in ("uint4", "int6", "uint5")},
}


def tensors(names: list[str]) -> dict[str, Tensor]:
    torch.manual_seed(0)
    found: dict[str, Tensor] = {}
    for name in names:
        (rows, columns), options = CASES[name]
        about, parts = sdnq_quantize_layer_weight(torch.randn(rows, columns), layer_class_name="Linear", **options)
        found |= {f"{name}.{part}": each for part, each in parts.items() if each is not None}
        found[f"{name}.values"] = about(**parts, skip_quantized_matmul=about.use_quantized_matmul, skip_compile=True)
    return {name: each.detach().contiguous().clone() for name, each in found.items()}


if __name__ == "__main__":
    for_kernels = [name for name in CASES if "kernels" in name]
    others = [name for name in CASES if name not in for_kernels]
    for file, names in (("sdnq", others), ("sdnq-kernels", for_kernels)):
        notes = {name: CASES[name][1] for name in names}
        packing = {"quant_method": "sdnq", "weights_dtype": "int8", "modules_quant_config": notes}
        path = Path(__file__).parent / f"{file}.safetensors"
        save_file(tensors(names), path, {"quantization_config": json.dumps(packing)})
