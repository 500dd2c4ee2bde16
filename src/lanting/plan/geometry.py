"""The networks as numbers: from a component's config.json, or the published releases' own where nothing is here.

Qwen-Image-2.1 is of another build in all of its parts: classes of their own, chosen by the transformer's class.

These are the configs of `lanting.nn` without torch; a test compares the tensors that follow from them (`sizes`) with
the real networks'.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, TypeVar

from lanting.specs.detect import SINGLE_STREAM

T = TypeVar("T", "Transformer", "Vae", "Language", "Vision", "SingleStream", "Vae21", "Language3", "Vision3")


@dataclass(frozen=True, slots=True)
class Transformer:
    """Keys of transformer/config.json; defaults are the 20.4 B releases."""

    num_layers: int = 60
    num_attention_heads: int = 24
    attention_head_dim: int = 128
    joint_attention_dim: int = 3584
    in_channels: int = 64
    out_channels: int = 16
    patch_size: int = 2
    zero_cond_t: bool = False
    use_additional_t_cond: bool = False

    @property
    def width(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @property
    def linears(self) -> int:
        """Weights in a block's Linears, modulation aside."""
        return 2 * self.met

    @property
    def met(self) -> int:
        """As many of them as a token meets: those of one stream."""
        return 12 * self.width**2

    @property
    def largest(self) -> int:
        """Weights in the largest of them."""
        return 4 * self.width**2

    @property
    def modulating(self) -> int:
        """Weights in a stream's modulation."""
        return 6 * self.width**2


@dataclass(frozen=True, slots=True)
class SingleStream:
    """The transformer of Qwen-Image-2.1; defaults are the 7.1 B release."""

    num_layers: int = 32
    num_attention_heads: int = 32
    attention_head_dim: int = 128
    context_in_dim: int = 4096
    in_channels: int = 64
    out_channels: int = 64
    patch_size: int = 1
    mlp_ratio: int = 3

    @property
    def width(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @property
    def linears(self) -> int:
        """Weights in a block's Linears."""
        return self.met

    @property
    def met(self) -> int:
        """As many of them as a token meets: all."""
        return (4 + 3 * self.mlp_ratio) * self.width**2

    @property
    def largest(self) -> int:
        """Weights in the largest of them."""
        return self.mlp_ratio * self.width**2

    @property
    def modulating(self) -> int:
        """None: one modulation, outside the blocks, serves all of them."""
        return 0


@dataclass(frozen=True, slots=True)
class Vae:
    """Keys of vae/config.json."""

    base_dim: int = 96
    z_dim: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    temperal_downsample: tuple[bool, ...] = (False, True, True)
    input_channels: int = 3


@dataclass(frozen=True, slots=True)
class Vae21:
    """Of Qwen-Image-2.1. `decoder_base_dim` 0: as the encoder's."""

    base_dim: int = 96
    decoder_base_dim: int = 144
    z_dim: int = 64
    dim_mult: tuple[int, ...] = (1, 2, 4, 8, 8)
    num_res_blocks: int = 2
    temperal_downsample: tuple[bool, ...] = (False, True, True, True)
    in_channels: int = 4
    out_channels: int = 4

    @property
    def decoder_width(self) -> int:
        return self.decoder_base_dim or self.base_dim


@dataclass(frozen=True, slots=True)
class Language:
    """The text part of text_encoder/config.json."""

    vocab_size: int = 152064
    hidden_size: int = 3584
    intermediate_size: int = 18944
    num_hidden_layers: int = 28
    num_attention_heads: int = 28
    num_key_value_heads: int = 4

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


@dataclass(frozen=True, slots=True)
class Language3:
    """Of Qwen3-VL; defaults are the 8B model."""

    vocab_size: int = 151936
    hidden_size: int = 4096
    intermediate_size: int = 12288
    num_hidden_layers: int = 36
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    head_dim: int = 128


@dataclass(frozen=True, slots=True)
class Vision:
    """The picture reader's part of it."""

    depth: int = 32
    hidden_size: int = 1280
    intermediate_size: int = 3420
    out_hidden_size: int = 3584
    in_channels: int = 3
    patch_size: int = 14
    temporal_patch_size: int = 2
    spatial_merge_size: int = 2


@dataclass(frozen=True, slots=True)
class Vision3:
    """Of Qwen3-VL; each of `deepstack_visual_indexes` has a merger of its own."""

    depth: int = 27
    hidden_size: int = 1152
    intermediate_size: int = 4304
    num_heads: int = 16
    out_hidden_size: int = 4096
    in_channels: int = 3
    patch_size: int = 16
    temporal_patch_size: int = 2
    spatial_merge_size: int = 2
    num_position_embeddings: int = 2304
    deepstack_visual_indexes: tuple[int, ...] = (8, 16, 24)


Body = Transformer | SingleStream
Coder = Vae | Vae21
Words = Language | Language3
Eye = Vision | Vision3


@dataclass(frozen=True, slots=True)
class Geometry:
    """All networks of a model. `tied`: the text encoder's head is its embedding."""

    transformer: Body = Transformer()
    vae: Coder = Vae()
    language: Words = Language()
    vision: Eye = Vision()
    tied: bool = False

    @property
    def single_stream(self) -> bool:
        """It is Qwen-Image-2.1's."""
        return isinstance(self.transformer, SingleStream)

    @classmethod
    def from_configs(cls, configs: Mapping[str, Mapping[str, Any]]) -> Geometry:
        """From the configs "transformer", "vae" and "text_encoder"; what they leave out is the releases' own."""
        body, vae, reader = (configs.get(name, {}) for name in ("transformer", "vae", "text_encoder"))
        text, eye = reader.get("text_config") or reader, reader.get("vision_config") or {}
        tied = bool(reader.get("tie_word_embeddings", text.get("tie_word_embeddings", False)))
        if body.get("_class_name") != SINGLE_STREAM:
            return cls(_read(Transformer, body), _read(Vae, vae), _read(Language, text), _read(Vision, eye), tied)
        body = {**body, "out_channels": body.get("out_channels") or body.get("in_channels")}  # null: as many as go in
        if "decoder_base_dim" in vae:
            vae = {**vae, "decoder_base_dim": vae["decoder_base_dim"] or 0}
        return cls(_read(SingleStream, body), _read(Vae21, vae), _read(Language3, text), _read(Vision3, eye), tied)


def _read(kind: type[T], config: Mapping[str, Any]) -> T:
    """Known keys that are not null; lists become tuples."""
    known = {field.name for field in fields(kind)}
    given: dict[str, Any] = {key: value for key, value in config.items() if key in known and value is not None}
    given |= {key: tuple(value) for key, value in given.items() if isinstance(value, list)}
    return kind(**given)
