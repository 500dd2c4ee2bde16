"""ControlNets with random weights, as files that people have: blockwise ones, and InstantX's without their folder."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor


def blockwise(layers: int = 4, width: int = 32, channels: int = 64) -> dict[str, Tensor]:
    """The tensors of a blockwise net, under DiffSynth's names; scales of norms are around 1."""
    draw = torch.Generator().manual_seed(layers + width + channels)

    def normal(*shape: int, mean: float = 0.0, std: float = 0.3) -> Tensor:
        return mean + std * torch.randn(*shape, generator=draw)

    found = {"img_in.weight": normal(width, channels, std=channels**-0.5), "img_in.bias": normal(width)}
    for index in range(layers):
        path = f"controlnet_blocks.{index}"
        found |= {f"{path}.{name}_rms.weight": normal(width, mean=1.0) for name in ("x", "y")}
        for name in ("input_proj", "output_proj"):
            found |= {f"{path}.{name}.weight": normal(width, width, std=0.2), f"{path}.{name}.bias": normal(width)}
    return found


def save(path: Path, tensors: dict[str, Tensor], prefix: str = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({prefix + name: tensor.contiguous() for name, tensor in tensors.items()}, str(path))
    return path


def save_blockwise(path: Path, layers: int = 4, width: int = 32, channels: int = 64) -> Path:
    return save(path, blockwise(layers, width, channels))


def tensors_in(folder: Path) -> dict[str, Tensor]:
    """Of an InstantX folder."""
    return load_file(folder / "diffusion_pytorch_model.safetensors")


def scaled(tensors: dict[str, Tensor], scale_name: str = "scale_weight") -> dict[str, Tensor]:
    """The Linears of blocks in 8-bit floats with a scale each, as ComfyUI's older files."""
    found = dict(tensors)
    for name, weight in tensors.items():
        if name.endswith(".weight") and weight.ndim == 2 and "blocks." in name:
            scale = weight.abs().max() / 448
            found[name] = (weight / scale).to(torch.float8_e4m3fn)
            found[f"{name.removesuffix('weight')}{scale_name}"] = scale.float()
    return found
