"""The Qwen3 language model inside Qwen3-VL, as far as Qwen-Image-2.1 listens to it: up to the last decoder layer.

It is Qwen2.5's decoder (`qwen_language`) with three differences: queries and keys are normed per head and nothing has
a bias; the three axes of positions take turns among the frequencies; and features of a picture join at its positions
between the first layers (DeepStack). The states are left as the last layer gives them: the transformer was trained on
those, and a norm would take a third of the signal. The norm's weight belongs to the checkpoint, so it is kept.

Source: Qwen3-VL technical report; equal to transformers' Qwen3VLTextModel, with the same tensor names.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lanting.nn.qwen_language import Attention, Decoder, DecoderLayer, RMSNorm, read_numbers


@dataclass(frozen=True, slots=True)
class Qwen3LanguageConfig:
    """Numbers of the decoder, those of the 8B model; `mrope_section` tells how many of the head_dim / 2 frequencies
    turn with time, height and width.
    """

    vocab_size: int = 151936
    hidden_size: int = 4096
    intermediate_size: int = 12288
    num_hidden_layers: int = 36
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    head_dim: int = 128
    rms_norm_eps: float = 1e-6
    rope_theta: float = 5e6
    mrope_section: tuple[int, int, int] = (24, 20, 20)

    @classmethod
    def from_dict(cls, json: Mapping[str, Any]) -> "Qwen3LanguageConfig":
        """Read `text_config` of a config.json; the rotary numbers may stand in `rope_scaling` (transformers 4) or in
        `rope_parameters` (5). Raises ValueError when their sections don't fill half a head.
        """
        return read_numbers(cls, json)


def rotary(positions: Tensor, config: Qwen3LanguageConfig) -> tuple[Tensor, Tensor]:
    """Cosines and sines (B, 1, T, head_dim), fp32, of positions (3, B, T) on the time, height and width axes.

    The axes take turns: of every three frequencies the first turns with time, the second with height, the third with
    width, until height and width have had their share; time has the rest, the slowest.
    """
    half = config.head_dim // 2
    place = torch.arange(half, device=positions.device)
    angles = positions[..., None].float() / config.rope_theta ** (place.float() / half)  # (3, B, T, half)
    _, height, width = config.mrope_section
    chosen = torch.where((place % 3 == 1) & (place < 3 * height), angles[1], angles[0])
    chosen = torch.where((place % 3 == 2) & (place < 3 * width), angles[2], chosen)
    chosen = torch.cat([chosen, chosen], -1).unsqueeze(1)  # (B, 1, T, head_dim)
    return chosen.cos(), chosen.sin()


class Qwen3Attention(Attention):
    """Grouped-query self-attention without biases; queries and keys are normed over each head."""

    def __init__(self, config: Decoder) -> None:
        super().__init__(config, bias=False)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().heads(x)
        return self.q_norm(q), self.k_norm(k), v


class Qwen3LanguageModel(nn.Module):
    """Embedding, decoder layers, and the final norm that is not applied."""

    def __init__(self, config: Qwen3LanguageConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            DecoderLayer(config, Qwen3Attention(config)) for _ in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, embeds: Tensor, positions: Tensor | None = None, deep: Sequence[Tensor] = ()) -> Tensor:
        """Run embeddings (B, T, D), right-padded; see `qwen_language` for why padding needs no mask.

        `positions` (3, B or 1, T) are needed only when the sequence holds pictures, whose features `deep`, each
        (B, T, D) and zero at words, are added behind the first layers, one each. Returns the states (B, T, D) before
        the final norm; those of padding mean nothing.
        """
        if positions is None:
            positions = torch.arange(embeds.shape[1], device=embeds.device).expand(3, 1, -1)
        rope = rotary(positions, self.config)
        x = embeds
        for index, layer in enumerate(self.layers):
            x, _ = layer(x, rope, None)
            if index < len(deep):
                x = x + deep[index]
        return x
