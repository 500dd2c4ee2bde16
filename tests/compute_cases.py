"""A small transformer for tests of what is attached to one on a CPU: made, packed, asked."""

from __future__ import annotations

import copy
import hashlib
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor, nn

from lanting.nn.linears import Fp8Linear, GgufLinear, Int4Linear, Int8Linear
from lanting.nn.mmdit import QwenImageTransformer, TransformerConfig
from lanting.nn.swap import swap
from lanting.weights.kquants import quantize

GRID = (1, 6, 8)


def network(two_times: bool = False, seed: int = 0, heads: int = 4) -> QwenImageTransformer:
    """A copy of one that is made once; random numbers go on as behind the making."""
    net, state = made(two_times, seed, heads)
    torch.set_rng_state(state)
    return copy.deepcopy(net)


@cache
def made(two_times: bool, seed: int, heads: int) -> tuple[QwenImageTransformer, Tensor]:
    torch.manual_seed(seed)
    config = TransformerConfig(
        num_layers=3,
        num_attention_heads=heads,
        attention_head_dim=64,
        joint_attention_dim=96,
        axes_dims_rope=(16, 24, 24),
        zero_cond_t=two_times,
    )
    net = QwenImageTransformer(config).eval().requires_grad_(False)
    for p in net.parameters():
        p.normal_(0, 0.05) if p.ndim > 1 else p.add_(torch.randn_like(p) * 0.05)
    return net, torch.get_rng_state()


@dataclass(frozen=True)
class Dense:
    """A weight that is known by its numbers."""

    weight: Tensor = field(compare=False)
    digest: str

    @classmethod
    def of(cls, weight: Tensor) -> Dense:
        return cls(weight, hashlib.sha1(weight.contiguous().numpy()).hexdigest())


@cache
def quantized(dense: Dense, kind: str) -> Tensor:
    """Blocks of GGUF; searching for their scales takes ten times as long as drawing with them."""
    return quantize(dense.weight, kind)


def pack(net: nn.Module, kind: str) -> nn.Module:
    """Every Linear of the blocks that the kind divides."""

    def make(path: str, old: nn.Module) -> nn.Module | None:
        assert isinstance(old, nn.Linear)
        weight, bias = old.weight.float(), old.bias
        if "_mod" in path or "blocks" not in path:
            return None
        if kind[0] == "Q":
            return GgufLinear.from_packed(quantized(Dense.of(weight), kind).clone(), kind, old.in_features, bias)
        cls = {"int8": Int8Linear, "int4": Int4Linear, "fp8": Fp8Linear}[kind.split()[0]]
        return cls.from_dense(weight, bias, **({"rotate": 256} if "rotated" in kind else {}))

    swap(net, nn.Linear, make)
    return net


def draw(net: QwenImageTransformer, batch: int = 1, masked: bool = False, seed: int = 1) -> torch.Tensor:
    torch.manual_seed(seed)
    dtype = net.proj_out.weight.dtype
    grids = [GRID] * (2 if net.config.zero_cond_t else 1)
    latents = torch.randn(batch, 48 * len(grids), 64).to(dtype)
    prompt, mask = torch.randn(batch, 21, 96).to(dtype), torch.ones(batch, 21, dtype=torch.bool)
    mask[-1, 15:] = not masked
    times = torch.full((batch,), 0.5).to(dtype)
    with torch.inference_mode():
        return net(latents, times, prompt, mask if masked else None, grids, 48).float()


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((found - wanted).norm() / wanted.norm()).item()
