"""nano's networks as they are trained: text model, transformer and a helper head that is thrown away afterwards.

Only the start is special: modulation begins at zero with gates slightly open, and the output layer at zero, so the
first prediction is "no change" and every block already passes gradients.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lanting.nn.mmdit import Attend, QwenImageTransformer, TransformerConfig
from lanting.nn.qwen_language import Attend as CausalAttend
from lanting.nn.qwen_language import LanguageConfig, QwenLanguageModel, expand_cache, initialize
from lanting.nn.rope import Grid
from lanting.nn.swap import swap


def default_transformer() -> TransformerConfig:
    return TransformerConfig(
        num_layers=6,
        num_attention_heads=4,
        attention_head_dim=32,
        joint_attention_dim=128,
        axes_dims_rope=(4, 14, 14),
    )


def default_language() -> LanguageConfig:
    return LanguageConfig(
        vocab_size=1024,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        rope_theta=10000.0,
        mrope_section=(8, 12, 12),
        tie_word_embeddings=True,
    )


@dataclass(frozen=True)
class NanoConfig:
    """Everything that decides what is trained; saved in every checkpoint."""

    transformer: TransformerConfig = field(default_factory=default_transformer)
    language: LanguageConfig = field(default_factory=default_language)
    characters: int = 128  # classes of the helper head

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "language": {k: getattr(self.language, k) for k in LanguageConfig.__slots__}}


class PlainAttend(Attend):
    """Joint attention by two batched products: on a CPU, in bfloat16, at a few hundred tokens, the backward pass
    of the fused kernel is several times slower than this."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        batch, tokens, heads, dim = q.shape
        q, k, v = (x.transpose(1, 2).reshape(batch * heads, tokens, dim).to(v.dtype) for x in (q, k, v))
        scores = torch.bmm(q * dim**-0.5, k.mT)  # (B H, T + N, T + N)
        if mask is not None:
            hidden = F.pad(~mask, (0, tokens - mask.shape[1]))[:, None, None]  # (B, 1, 1, T + N)
            hidden = hidden.expand(-1, heads, 1, -1).reshape(batch * heads, 1, tokens)
            scores = scores.masked_fill(hidden, -30000.0)
        out = torch.bmm(scores.softmax(-1).to(v.dtype), v)
        return out.view(batch, heads, tokens, dim).transpose(1, 2)


class PlainCausalAttend(CausalAttend):
    """The same for the text model: the queries are the last T of S keys."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        queries, keys = q.shape[2], k.shape[2]
        scores = (q * q.shape[-1] ** -0.5) @ k.mT  # (B, H, T, S)
        ahead = torch.ones(queries, keys, dtype=torch.bool, device=q.device).triu(keys - queries + 1)
        return scores.masked_fill(ahead, -30000.0).softmax(-1).to(v.dtype) @ v


class CharacterHead(nn.Module):
    """Which character stands on each token, read from the middle of the stack: a training aid only."""

    def __init__(self, width: int, classes: int):
        super().__init__()
        self.norm, self.out = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.silu(self.norm(x)))  # (B, N, classes)


class NanoNet(nn.Module):
    """Text model + transformer + helper head as one trainable module."""

    def __init__(self, config: NanoConfig):
        super().__init__()
        self.config = config
        self.language = QwenLanguageModel(config.language)
        self.transformer = QwenImageTransformer(config.transformer)
        self.head = CharacterHead(config.transformer.width, config.characters)
        self.middle: Tensor | None = None
        swap(self, Attend, lambda path, old: PlainAttend())
        swap(self, CausalAttend, lambda path, old: PlainCausalAttend())
        watched = self.transformer.transformer_blocks[config.transformer.num_layers * 2 // 3 - 1]
        watched.register_forward_hook(self.remember)

    def remember(self, module: nn.Module, inputs: Any, output: tuple[Tensor, Tensor]) -> None:
        self.middle = output[0]

    def embed(self, prefix: Tensor, ids: Tensor) -> Tensor:
        """States (B, T, D) of ids (B, T) behind the constant prefix (1, P), which is run once for all rows."""
        _, cache = self.language(prefix)
        states, _ = self.language(ids, cache=expand_cache(cache, ids.shape[0]))
        return states

    def forward(
        self, x: Tensor, t: Tensor, prefix: Tensor, ids: Tensor, mask: Tensor, grids: Sequence[Grid]
    ) -> tuple[Tensor, Tensor]:
        """Velocity (B, N, C) and character logits (B, N, classes) of noisy latents x (B, N, C) at times t (B,)."""
        states = self.embed(prefix, ids)
        velocity = self.transformer(x, t, states, mask, grids, x.shape[1])
        assert self.middle is not None
        return velocity, self.head(self.middle)


@torch.no_grad()
def start(net: NanoNet) -> NanoNet:
    """Fresh weights; see the module docstring."""
    initialize(net.language, std=0.05)
    transformer, width = net.transformer, net.config.transformer.width
    for name, p in transformer.named_parameters():
        if p.ndim == 2:
            p.normal_(0, 1 / math.sqrt(p.shape[1]))
        elif name.endswith("bias"):
            p.zero_()
    for block in transformer.transformer_blocks:
        for modulation in (block.get_submodule("img_mod.1"), block.get_submodule("txt_mod.1")):
            assert isinstance(modulation, nn.Linear)
            modulation.weight.zero_()
            modulation.bias.zero_()
            modulation.bias[2 * width : 3 * width] = 0.2
            modulation.bias[5 * width :] = 0.2
    for last in (transformer.norm_out["linear"], transformer.proj_out):
        assert isinstance(last, nn.Linear)
        last.weight.zero_()
        last.bias.zero_()
    return net


def matrices(net: NanoNet) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """(for Muon, for AdamW): Linears inside the layers but modulation go to Muon, everything else to AdamW."""
    muon = [
        p
        for name, p in net.named_parameters()
        if p.ndim == 2 and ("transformer_blocks" in name or "language.layers" in name) and "_mod" not in name
    ]
    chosen = {id(p) for p in muon}
    return muon, [p for p in net.parameters() if id(p) not in chosen]
