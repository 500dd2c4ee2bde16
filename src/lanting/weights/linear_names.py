"""Every Linear of a transformer by name and shape, from its config's numbers alone: no torch, no tensors.

Quantized files store other shapes, and a model that is not here yet stores none; the numbers always tell.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lanting.core.errors import ModelError
from lanting.specs.detect import SINGLE_STREAM

NUMBERS = {  # the official releases, and the largest that is believed
    "num_layers": (60, 1000),
    "num_attention_heads": (24, 1024),
    "attention_head_dim": (128, 4096),
    "joint_attention_dim": (3584, 1 << 20),
    "in_channels": (64, 1 << 16),
    "out_channels": (16, 1 << 16),
    "patch_size": (2, 64),
}
NUMBERS_21 = {  # the same for Qwen-Image-2.1
    "num_layers": (32, 1000),
    "num_attention_heads": (32, 1024),
    "attention_head_dim": (128, 4096),
    "context_in_dim": (4096, 1 << 20),
    "in_channels": (64, 1 << 16),
    "out_channels": (64, 1 << 16),
    "mlp_ratio": (3, 64),
}
SINE = 256  # length of the timestep's sinusoid
SQUARE = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "to_out.0", "to_add_out")


def transformer_linears(config: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """Path -> (out, in). Entries that `config` (of a transformer's config.json) lacks are those of the 20.4 B
    releases, or of Qwen-Image-2.1. Raises ModelError for numbers that describe no network."""
    if config.get("_class_name") == SINGLE_STREAM:
        return _single_stream(_checked(config, NUMBERS_21))
    number = _checked(config, NUMBERS)
    width = number["num_attention_heads"] * number["attention_head_dim"]
    found = {
        "img_in": (width, number["in_channels"]),
        "txt_in": (width, number["joint_attention_dim"]),
        "time_text_embed.timestep_embedder.linear_1": (width, SINE),
        "time_text_embed.timestep_embedder.linear_2": (width, width),
        "norm_out.linear": (2 * width, width),
        "proj_out": (number["patch_size"] ** 2 * number["out_channels"], width),
    }
    for block in range(number["num_layers"]):
        found |= {f"transformer_blocks.{block}.{name}": sides for name, sides in _block(width).items()}
    return found


def _checked(config: Mapping[str, Any], numbers: Mapping[str, tuple[int, int]]) -> dict[str, int]:
    """These numbers of a config, or the usual ones where it has none."""
    number: dict[str, int] = {}
    for key, (usual, most) in numbers.items():
        told = config.get(key)
        value = usual if told is None else told
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= most:
            raise ModelError(
                "the transformer's config.json says {key} = {value}, which describes no network: download it again",
                **{"key": key, "value": str(value)[:40]},
            )
        number[key] = value
    return number


def _block(width: int) -> dict[str, tuple[int, int]]:
    found = {f"attn.{name}": (width, width) for name in SQUARE}
    for stream in ("img", "txt"):
        found[f"{stream}_mod.1"] = (6 * width, width)
        found[f"{stream}_mlp.net.0.proj"] = (4 * width, width)
        found[f"{stream}_mlp.net.2"] = (width, 4 * width)
    return found


def _single_stream(number: Mapping[str, int]) -> dict[str, tuple[int, int]]:
    """Qwen-Image-2.1: one stream, one modulation for all blocks."""
    width = number["num_attention_heads"] * number["attention_head_dim"]
    hidden = number["mlp_ratio"] * width
    found = {
        "img_in": (width, number["in_channels"]),
        "txt_in.in_layer": (width, number["context_in_dim"]),
        "txt_in.out_layer": (width, width),
        "time_text_embed.timestep_embedder.linear_1": (width, SINE),
        "time_text_embed.timestep_embedder.linear_2": (width, width),
        "modulation.1": (4 * width, width),
        "norm_out.linear": (width, width),
        "proj_out": (number["out_channels"], width),
    }
    inside = {f"attn.{name}": (width, width) for name in ("to_q", "to_k", "to_v", "to_out.0")}
    inside |= {f"img_mlp.{name}": (hidden, width) for name in ("proj", "gate_layer")}
    inside["img_mlp.out"] = (width, hidden)
    for block in range(number["num_layers"]):
        found |= {f"transformer_blocks.{block}.{name}": sides for name, sides in inside.items()}
    return found
