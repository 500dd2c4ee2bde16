"""Weights as MLX packs them, and what it says they are worth; kept as those of `make.py` are.

    pip install "mlx[cpu]==0.32.4"
    python tests/packed/make_mlx.py

writes `mlx.safetensors` beside itself: `KIND-GROUP.weight`, `.scales`, `.biases` and `KIND-GROUP.values` (out, in),
float32, found by MLX from the scales and biases in float32: of bfloat16 ones it rounds twice.
"""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx

CASES = [(2, 32), (3, 64), (3, 128), (4, 32), (4, 64), (4, 128), (5, 64), (6, 64), (8, 64)]
MODES = {"mxfp4": 32, "nvfp4": 16, "mxfp8": 32}


def tensors() -> dict[str, mx.array]:
    mx.random.seed(0)
    found: dict[str, mx.array] = {}
    for bits, group in CASES:
        packed, scales, biases = mx.quantize(
            mx.random.normal((4, 128)).astype(mx.bfloat16), group_size=group, bits=bits
        )
        name = f"uint{bits}-{group}"
        found |= {f"{name}.weight": packed, f"{name}.scales": scales, f"{name}.biases": biases}
        exact = (scales.astype(mx.float32), biases.astype(mx.float32))
        found[f"{name}.values"] = mx.dequantize(packed, *exact, group_size=group, bits=bits)
    for mode, group in MODES.items():
        packed, scales = mx.quantize(mx.random.normal((4, 128)).astype(mx.bfloat16), mode=mode)
        name = f"{mode}-{group}"
        found |= {f"{name}.weight": packed, f"{name}.scales": scales}
        found[f"{name}.values"] = mx.dequantize(packed, scales, mode=mode, dtype=mx.float32)
    return found


if __name__ == "__main__":
    mx.save_safetensors(str(Path(__file__).parent / "mlx.safetensors"), tensors())
