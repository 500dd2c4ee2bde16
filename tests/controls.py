"""ControlNets with random weights, as files that people have: blockwise, VideoX-Fun's, InstantX's without a folder; and
what the tests of all of them do with pictures.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lanting import Engine, Request


@pytest.fixture(autouse=True)
def english(monkeypatch, tmp_path):
    """Sentences as the tests know them, and no models of whoever runs them."""
    monkeypatch.setenv("LANTING_LANG", "en")
    monkeypatch.setenv("LANTING_HOME", str(tmp_path / "home"))


def drawn(engine: Engine, asked: Request) -> bytes:
    """All pixels; the engine is closed."""
    with engine:
        return b"".join(image.tobytes() for image in engine.run(asked).images)


def far(one: bytes, two: bytes) -> int:
    """The most grey levels between two pictures' pixels."""
    return max(abs(a - b) for a, b in zip(one, two, strict=True))


class Eager:
    """A judge of caches that leaves out what it may, but for the first time."""

    def watches(self, branch: str) -> bool:
        return True

    def reuse(self, branch: str, change: float) -> float | None:
        return 0.0

    def ahead(self, branch: str) -> float | None:
        return 0.0

    def computed(self, branch: str, change: float, same: float | None, line: object) -> None:
        pass


def broken(tensors: dict[str, Tensor], name: str, change: str) -> tuple[dict[str, Tensor], str]:
    """Tensors with one of them "missing" or "misshapen", or with a "surplus" one; the name of that."""
    found = dict(tensors)
    if change == "missing":
        del found[name]
    elif change == "surplus":
        name = "control_blocks.0.strange.weight"
    if change != "missing":
        found[name] = torch.zeros(3, 3)
    return found, name


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


def chain(blocks: int = 1, width: int = 64, head: int = 32, channels: int = 17) -> dict[str, Tensor]:
    """The tensors of a net for Qwen-Image-2.1, under VideoX-Fun's names; the feed-forward part is 3 times as wide."""
    draw = torch.Generator().manual_seed(blocks + width + channels)

    def linear(name: str, out: int, inputs: int, bias: bool = False) -> dict[str, Tensor]:
        found = {f"{name}.weight": 0.8 * inputs**-0.5 * torch.randn(out, inputs, generator=draw)}
        return found | ({f"{name}.bias": 0.3 * torch.randn(out, generator=draw)} if bias else {})

    found = linear("control_img_in", width, channels, bias=True)
    found |= linear("control_blocks.0.before_proj", width, width, bias=True)
    for index in range(blocks):
        path = f"control_blocks.{index}"
        for name in ("to_q", "to_k", "to_v", "to_out.0"):
            found |= linear(f"{path}.attn.{name}", width, width)
        for name in ("norm_q", "norm_k"):
            found[f"{path}.attn.{name}.weight"] = 1 + 0.3 * torch.randn(head, generator=draw)
        for name in ("proj", "gate_layer"):
            found |= linear(f"{path}.img_mlp.{name}", 3 * width, width)
        found |= linear(f"{path}.img_mlp.out", width, 3 * width) | linear(f"{path}.after_proj", width, width, bias=True)
    return found


def fun(blocks: int = 2, width: int = 32, head: int = 16, channels: int = 132) -> dict[str, Tensor]:
    """The tensors of a net for Qwen-Image, under VideoX-Fun's names; both streams in every block."""
    draw = torch.Generator().manual_seed(blocks + width + channels)

    def linear(name: str, out: int, inputs: int, size: float = 0.7) -> dict[str, Tensor]:
        weight = size * inputs**-0.5 * torch.randn(out, inputs, generator=draw)
        return {f"{name}.weight": weight, f"{name}.bias": 0.2 * torch.randn(out, generator=draw)}

    found = linear("control_img_in", width, channels) | linear("control_blocks.0.before_proj", width, width)
    for index in range(blocks):
        path = f"control_blocks.{index}"
        for name in ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"):
            found |= linear(f"{path}.attn.{name}", width, width)
        for name in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
            found[f"{path}.attn.{name}.weight"] = 1 + 0.3 * torch.randn(head, generator=draw)
        for stream in ("img", "txt"):
            found |= linear(f"{path}.{stream}_mod.1", 6 * width, width)
            found |= linear(f"{path}.{stream}_mlp.net.0.proj", 4 * width, width)
            found |= linear(f"{path}.{stream}_mlp.net.2", width, 4 * width)
        found |= linear(f"{path}.after_proj", width, width)
    return found


def fused(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same as ComfyUI keeps them: gate and value of the feed-forward part in one."""
    found = {}
    for name, tensor in tensors.items():
        if ".gate_layer." in name:
            both = torch.cat([tensor, tensors[name.replace("gate_layer", "proj")]])
            found[name.replace("gate_layer", "gate_up")] = both
        elif ".img_mlp.proj." not in name:
            found[name] = tensor
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
