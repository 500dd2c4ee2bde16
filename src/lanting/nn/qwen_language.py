"""The Qwen2.5 language model: the pre-norm causal decoder whose states Qwen-Image listens to.

Right padding needs no mask: causal attention never looks to the right, so nothing after a prompt reaches it.
That leaves one attention for everything, "the queries are the last T of S keys", and the key/value cache is a
plain list of tensors, so a constant prefix is run once and expanded to a batch. (Rejected: padding masks and
a cache class, which cost the fast kernel and the gradient through the prefix.)

Source: Qwen2.5-VL technical report; equal to transformers' Qwen2_5_VLTextModel, with the same tensor names.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Cache = list[tuple[Tensor, Tensor]]
"""Keys and values per layer, each (B, kv_heads, S, head_dim); keys are already rotated."""


class Decoder(Protocol):
    """The numbers of a decoder, whichever model of the family it belongs to: a dataclass."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def hidden_size(self) -> int: ...
    @property
    def intermediate_size(self) -> int: ...
    @property
    def num_attention_heads(self) -> int: ...
    @property
    def num_key_value_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def rms_norm_eps(self) -> float: ...
    @property
    def mrope_section(self) -> tuple[int, int, int]: ...


C = TypeVar("C", bound=Decoder)


@dataclass(frozen=True, slots=True)
class LanguageConfig:
    """Numbers of the decoder; `mrope_section` splits head_dim / 2 frequencies into time, height, width."""

    vocab_size: int = 152064
    hidden_size: int = 3584
    intermediate_size: int = 18944
    num_hidden_layers: int = 28
    num_attention_heads: int = 28
    num_key_value_heads: int = 4
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e6
    mrope_section: tuple[int, int, int] = (16, 24, 24)
    tie_word_embeddings: bool = False

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @classmethod
    def from_dict(cls, json: Mapping[str, Any]) -> "LanguageConfig":
        """Read the text part of a config.json: the flat old layout or a `text_config`.

        The rotary numbers may stand in `rope_scaling` or in the newer `rope_parameters`. Raises ValueError
        when their sections don't fill half a head.
        """
        return read_numbers(cls, json)


def read_numbers(kind: type[C], json: Mapping[str, Any]) -> C:
    """A decoder's config of `kind` from a config.json; what isn't there keeps its default. See `LanguageConfig`."""
    rope = {**(json.get("rope_scaling") or {}), **(json.get("rope_parameters") or {})}
    known = {field.name: json[field.name] for field in fields(kind) if json.get(field.name) is not None}
    known |= {name: rope[name] for name in ("rope_theta", "mrope_section") if name in rope}
    if "mrope_section" in known:
        known["mrope_section"] = tuple(known["mrope_section"])
    config = kind(**known)
    if 2 * sum(config.mrope_section) != config.head_dim:
        raise ValueError(f"mrope_section {config.mrope_section} must sum to half of head_dim {config.head_dim}")
    return config


class RMSNorm(nn.Module):
    """x / rms(x) * weight; the mean square is taken in fp32 whatever x is."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


class GatedMLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, width: int, inner: int, bias: bool = False) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, inner, bias=bias)
        self.up_proj = nn.Linear(width, inner, bias=bias)
        self.down_proj = nn.Linear(inner, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Attend(nn.Module):
    """Causal attention of the last T of S positions; a module so that training or a kernel can replace it.

    q (B, heads, T, d), k and v (B, kv_heads, S, d) with S >= T -> (B, heads, T, d).
    """

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        queries, keys, group = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
        if group > 1:
            k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        mask = None
        if 1 < queries < keys:
            mask = torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril(keys - queries)
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=1 < queries == keys)


def rotary(positions: Tensor, config: LanguageConfig) -> tuple[Tensor, Tensor]:
    """Cosines and sines (B, 1, T, head_dim), fp32, of positions (3, B, T) on the time, height and width axes.

    The first section of frequencies turns with time, the second with height, the third with width (M-RoPE).
    For text the three positions are equal, and this is ordinary RoPE.
    """
    half = config.head_dim // 2
    steps = torch.arange(half, dtype=torch.float32, device=positions.device) / half
    frequencies = 1.0 / config.rope_theta**steps
    # no list as an index: a GPU would wait for it at every call
    parts = [positions[axis, ..., None].expand(-1, -1, n) for axis, n in enumerate(config.mrope_section)]
    angles = torch.cat(parts, -1).float() * frequencies  # (B, T, half)
    angles = torch.cat([angles, angles], -1).unsqueeze(1)  # (B, 1, T, head_dim)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (x_i, x_{i + d/2}), the half-split convention of this family."""
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


class Attention(nn.Module):
    """Grouped-query self-attention; q, k, v may have a bias, the output projection has none."""

    def __init__(self, config: Decoder, bias: bool = True) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        queries = config.num_attention_heads * config.head_dim
        keys = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, queries, bias)
        self.k_proj = nn.Linear(config.hidden_size, keys, bias)
        self.v_proj = nn.Linear(config.hidden_size, keys, bias)
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=False)
        self.attend = Attend()

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor], past: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        q, k, v = self.heads(x)
        cos, sin = (table.to(q.dtype) for table in rope)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if past is not None:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        out = self.attend(q, k, v).transpose(1, 2).flatten(2)  # (B, T, heads * d)
        return self.o_proj(out), (k, v)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, heads, T, d), keys and values (B, kv_heads, T, d) of x (B, T, D), not yet rotated."""
        q, k, v = (
            layer(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        return q, k, v


class DecoderLayer(nn.Module):
    def __init__(self, config: Decoder, attention: Attention | None = None) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config) if attention is None else attention
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = GatedMLP(config.hidden_size, config.intermediate_size)

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor], past: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        attended, present = self.self_attn(self.input_layernorm(x), rope, past)
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x)), present


class QwenLanguageModel(nn.Module):
    """Embedding, decoder layers and the final norm; the hub calls this part `model.`"""

    def __init__(self, config: LanguageConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, tokens: Tensor, positions: Tensor | None = None, cache: Cache | None = None
    ) -> tuple[Tensor, Cache]:
        """Run ids (B, T) or embeddings (B, T, D) after what `cache` holds.

        `positions` (3, B or 1, T) are needed only when the sequence holds pictures. Returns the states after
        the final norm (B, T, D) and the grown cache; the cache given is left as it was. States of right
        padding mean nothing, and nothing else depends on them.
        """
        x = tokens if tokens.is_floating_point() else self.embed_tokens(tokens)
        start = cache[0][0].shape[2] if cache else 0
        if positions is None:
            positions = torch.arange(start, start + x.shape[1], device=x.device).expand(3, 1, -1)
        rope = rotary(positions, self.config)
        grown: Cache = []
        for index, layer in enumerate(self.layers):
            x, present = layer(x, rope, cache[index] if cache else None)
            grown.append(present)
        return self.norm(x), grown


def expand_cache(cache: Cache, batch: int) -> Cache:
    """Repeat a cache of batch 1 for `batch` rows without copying (views; gradients sum over the rows)."""
    return [(k.expand(batch, -1, -1, -1), v.expand(batch, -1, -1, -1)) for k, v in cache]


@torch.no_grad()
def initialize(module: nn.Module, std: float = 0.02) -> None:
    """Give a new model the starting weights of its family: normal with `std`, biases zero, norms one."""
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Embedding | nn.Conv3d):
            part.weight.normal_(0.0, std)
            if not isinstance(part, nn.Embedding) and part.bias is not None:
                part.bias.zero_()
        elif isinstance(part, RMSNorm):
            part.weight.fill_(1.0)
