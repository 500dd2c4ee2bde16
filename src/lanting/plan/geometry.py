"""The networks as numbers: from a component's config.json, or the published releases' own where nothing is here.

These are the configs of `lanting.nn` without torch; a test compares the tensors that follow from them (`sizes`) with
the real networks'.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, TypeVar

T = TypeVar("T", "Transformer", "Vae", "Language", "Vision")


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
class Geometry:
    """All networks of a model. `tied`: the text encoder's head is its embedding."""

    transformer: Transformer = Transformer()
    vae: Vae = Vae()
    language: Language = Language()
    vision: Vision = Vision()
    tied: bool = False

    @classmethod
    def from_configs(cls, configs: Mapping[str, Mapping[str, Any]]) -> Geometry:
        """From the configs "transformer", "vae" and "text_encoder"; what they leave out is the releases' own."""
        reader = configs.get("text_encoder", {})
        text = reader.get("text_config") or reader
        return cls(
            _read(Transformer, configs.get("transformer", {})),
            _read(Vae, configs.get("vae", {})),
            _read(Language, text),
            _read(Vision, reader.get("vision_config") or {}),
            bool(reader.get("tie_word_embeddings", text.get("tie_word_embeddings", False))),
        )


def _read(kind: type[T], config: Mapping[str, Any]) -> T:
    """Known keys that are not null; lists become tuples."""
    known = {field.name for field in fields(kind)}
    given: dict[str, Any] = {key: value for key, value in config.items() if key in known and value is not None}
    given |= {key: tuple(value) for key, value in given.items() if isinstance(value, list)}
    return kind(**given)
