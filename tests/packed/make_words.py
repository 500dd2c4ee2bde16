"""Weights as AWQ, GPTQ and compressed-tensors pack them, and what these packages say they are worth.

    pip install --no-deps autoawq==0.2.9 auto_gptq==0.7.1 compressed-tensors==0.20.1
    pip install loguru pydantic
    python tests/packed/make_words.py

writes `awq.safetensors`, `gptq.safetensors` and `compressed-tensors.safetensors` beside itself: for each case the
packed tensors under the names that files have, and `CASE.values` (out, in) in the type that the package computes in.
They are kept, so that the suite needs none of the packages. The first two are no longer maintained, and import versions
of transformers that are gone: only the modules that pack are imported.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

HERE = Path(__file__).parent


def alone(*names: str) -> Any:
    """A module of a package, by its names from the outside in, without what the packages above it import."""
    found = find_spec(names[0])
    assert found is not None and found.submodule_search_locations is not None, f"{names[0]} is not installed"
    folder = Path(next(iter(found.submodule_search_locations)))
    for depth in range(1, len(names)):
        above = sys.modules[".".join(names[:depth])] = ModuleType(".".join(names[:depth]))
        above.__spec__, above.__path__ = found, [str(folder.joinpath(*names[1:depth]))]
    return import_module(".".join(names))


def rounding(weight: Tensor, bits: int, group: int, symmetric: bool = False) -> tuple[Tensor, Tensor]:
    """Scale and zero point (out, groups) of a weight; scales are float16's."""
    grouped, top = weight.unflatten(1, (-1, group)), 2**bits - 1
    if symmetric:
        scale = (grouped.abs().amax(-1) * 2 / top).half().float()
        return scale, torch.full_like(scale, 2 ** (bits - 1))
    low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
    scale = ((high - low) / top).half().float()
    return scale, (-low / scale).round().clamp(1, top)


def on_codes(weight: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """The nearest weight that codes can say; the packages leave clamping to those who call them."""
    return ((weight / scale).round() + zero).clamp(0, 2**bits - 1).sub(zero) * scale


def awq() -> dict[str, Tensor]:
    alone("awq", "utils", "packing_utils")
    sys.modules["awq.utils.utils"] = ModuleType("awq.utils.utils")
    sys.modules["awq.utils.utils"].get_best_device = lambda: "cpu"  # type: ignore[attr-defined]
    gemm, unpacking = alone("awq", "modules", "linear", "gemm"), import_module("awq.utils.packing_utils")
    torch.manual_seed(0)
    found: dict[str, Tensor] = {}
    for columns, group in ((64, 32), (128, 128)):
        linear = nn.Linear(columns, 32).half()
        scale, zero = rounding(linear.weight.data.float(), 4, group)
        wide, shift = (each.repeat_interleave(group, 1) for each in (scale, zero))
        linear.weight.data = on_codes(linear.weight.data.float(), wide, shift, 4).half()
        made = gemm.WQLinear_GEMM.from_linear(linear, 4, group, scales=scale.T, zeros=zero.T)
        name = f"gemm-32x{columns}-{group}"
        found |= {f"{name}.{part}": getattr(made, part) for part in ("qweight", "qzeros", "scales")}
        found[f"{name}.values"] = unpacking.dequantize_gemm(made.qweight, made.qzeros, made.scales, 4, group).T
    return found


def gptq() -> dict[str, Tensor]:
    module = alone("auto_gptq", "nn_modules", "qlinear", "qlinear_cuda")
    torch.manual_seed(0)
    found: dict[str, Tensor] = {}
    cases = (
        (2, False, False),
        (3, False, True),
        (4, False, False),
        (4, False, True),
        (4, True, False),
        (8, False, True),
    )
    for bits, symmetric, apart in cases:
        columns, group = 64, 32
        place = torch.arange(columns) // group
        place = place[torch.randperm(columns)] if apart else place
        linear = nn.Linear(columns, 32)
        scale, zero = rounding(linear.weight.data[:, place.argsort(stable=True)], bits, group, bool(symmetric))
        linear.weight.data = on_codes(linear.weight.data, scale[:, place], zero[:, place], bits)
        made = module.QuantLinear(bits, group, columns, 32, bias=True)
        made.pack(linear.half(), scale, zero, place.int())
        made.bias = None
        name = f"{bits}{'-symmetric' if symmetric else ''}{'-apart' if apart else ''}"
        found |= {f"{name}.{part}": getattr(made, part) for part in ("qweight", "qzeros", "scales", "g_idx")}
        found[f"{name}.values"] = made(torch.eye(columns).half()).T
    return found


def compressed() -> dict[str, Tensor]:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    cases: dict[str, tuple[str, dict[str, Any]]] = {
        "w4": ("pack-quantized", {"num_bits": 4, "group_size": 32, "strategy": "group"}),
        "w4-zeros": ("pack-quantized", {"num_bits": 4, "group_size": 32, "strategy": "group", "symmetric": False}),
        "w3-zeros": ("pack-quantized", {"num_bits": 3, "group_size": 32, "strategy": "group", "symmetric": False}),
        "w8": ("pack-quantized", {"num_bits": 8, "strategy": "channel"}),
        "int8": ("int-quantized", {"num_bits": 8, "strategy": "channel"}),
        "int8-zeros": ("int-quantized", {"num_bits": 8, "strategy": "channel", "symmetric": False}),
        "fp8": ("float-quantized", {"num_bits": 8, "strategy": "channel", "type": "float"}),
        "nvfp4": (
            "nvfp4-pack-quantized",
            {"num_bits": 4, "group_size": 16, "strategy": "tensor_group", "type": "float"},
        ),
    }
    of_32 = {"group_size": 32, "strategy": "group", "type": "float", "scale_dtype": torch.uint8}
    cases["mxfp4"] = ("mxfp4-pack-quantized", {"num_bits": 4, **of_32})
    cases["mxfp8"] = ("mxfp8-quantized", {"num_bits": 8, **of_32})
    torch.manual_seed(0)
    found: dict[str, Tensor] = {}
    for name, (written, asked) in cases.items():
        weight, args = (torch.randn(12, 64) / 8).bfloat16(), QuantizationArgs(**asked)
        grouped = weight.unflatten(1, (-1, args.group_size or 64))
        every = (448 * 6 / weight.abs().max().float()).reshape(1) if name == "nvfp4" else None
        scale, zero = calculate_qparams(grouped.amin(-1), grouped.amax(-1), args, global_scale=every)
        parts = {"weight": weight, "weight_scale": scale if name == "nvfp4" else scale.bfloat16()}
        parts |= {} if args.symmetric else {"weight_zero_point": zero.to(torch.int8)}
        parts |= {} if every is None else {"weight_global_scale": every}
        program = BaseCompressor.get_value_from_registry(written)
        scheme = QuantizationScheme(targets=["Linear"], weights=args)
        made = program.compress(parts, scheme)
        found |= {f"{name}.{part}": each for part, each in made.items()}
        found[f"{name}.values"] = program.decompress(made, scheme)["weight"]
    return found


if __name__ == "__main__":
    for name, made in (("awq", awq), ("gptq", gptq), ("compressed-tensors", compressed)):
        save_file({key: each.contiguous() for key, each in made().items()}, HERE / f"{name}.safetensors")
