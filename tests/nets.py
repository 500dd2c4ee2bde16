"""Small networks with random weights and the files they come from, for tests of whatever makes weights come and go."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lanting.flow.loop import Canvas, Conditioning, Tokens
from lanting.nn.controlnet import ControlNetConfig, QwenImageControlNet
from lanting.nn.linears import Int4Linear, PackedLinear
from lanting.nn.mmdit import QwenImageTransformer, TransformerConfig
from lanting.nn.swap import swap
from lanting.weights.checkpoint import Checkpoint
from lanting.weights.headers import read_file

SHAPE: dict[str, Any] = {
    "num_layers": 5,
    "num_attention_heads": 2,
    "attention_head_dim": 32,
    "joint_attention_dim": 48,
    "in_channels": 16,
    "out_channels": 4,
    "axes_dims_rope": (8, 12, 12),
}


def transformer(**changes: Any) -> QwenImageTransformer:
    """A transformer of width 64 whose every weight is random."""
    torch.manual_seed(1)
    return randomise(QwenImageTransformer(TransformerConfig(**{**SHAPE, **changes})))


def controlnet(**changes: Any) -> QwenImageControlNet:
    torch.manual_seed(2)
    return randomise(QwenImageControlNet(ControlNetConfig(**{**SHAPE, "num_layers": 2, **changes})))


def randomise(net: Any) -> Any:
    with torch.no_grad():
        for weight in net.parameters():
            weight.normal_(0.0, 0.5 / weight[0].numel() ** 0.5 if weight.ndim > 1 else 0.1)
    return net.eval().requires_grad_(False)


def int4(net: Any) -> Any:
    """The blocks' Linears in four bits."""
    swap(net.transformer_blocks, nn.Linear, lambda _, old: Int4Linear.from_dense(old.weight, old.bias, group=32))
    return net


def saved(net: nn.Module, folder: Path) -> Checkpoint:
    """What `net` holds, as a component's file; the net then lives on the mapped file, as after loading. (Where in
    memory a weight begins can decide how a product rounds.)"""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.contiguous() for name, tensor in net.state_dict().items()}
    path = folder / "model.safetensors"
    save_file(tensors, str(path))
    infos, metadata = read_file(path)
    checkpoint = Checkpoint(folder.name, dict.fromkeys(infos, path), infos, metadata)  # under the net's own names
    net.load_state_dict(checkpoint.read(checkpoint.names()), assign=True)
    net.requires_grad_(False)
    return checkpoint


def inputs(net: Any, time: float = 0.7, batch: int = 1, dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
    """Arguments of `net`: 12 target tokens and 4 of a reference, 7 of text."""
    torch.manual_seed(3)
    latents = torch.randn(batch, 16, net.config.in_channels).to(dtype)
    text = torch.randn(batch, 7, net.config.joint_attention_dim).to(dtype)
    grids = ((1, 4, 3), (1, 2, 2))
    return latents, torch.full((batch,), time, dtype=dtype), text, None, grids, 12


def run(net: Any, **options: Any) -> Tensor:
    with torch.no_grad():
        return net(*inputs(net, **options))


def canvas(
    guided: bool = False, references: int = 1, steps: int = 4, dtype: torch.dtype = torch.float32, **rest: Any
) -> Canvas:
    """Twelve tokens of noise for `transformer`, with a prompt, and references of four tokens each."""
    draw = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw).to(dtype)

    return Canvas(
        start=random(1, 12, 16),
        grids=((1, 4, 3),),
        sigmas=torch.linspace(1, 0, steps + 1),
        positive=Conditioning(random(1, 7, 48)),
        negative=Conditioning(random(1, 5, 48)) if guided else None,
        references=tuple(Tokens(random(1, 4, 16), (1, 2, 2)) for _ in range(references)),
        **rest,
    )


def bytes_of(net: nn.Module) -> int:
    """Memory of the weights that are there."""
    return sum(t.nbytes for t in net.state_dict().values() if t.device.type != "meta")


def packed_linears(net: nn.Module) -> int:
    return sum(isinstance(module, PackedLinear) for module in net.modules())
