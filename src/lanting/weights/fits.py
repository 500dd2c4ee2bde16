"""Whether the networks of one model belong together, by their configs alone: before anything is built or read.

A text encoder of another width fails in the middle of the first step, one of another build draws noise without a word.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lanting.core.errors import ModelError
from lanting.specs import ModelSpec
from lanting.specs.detect import SINGLE_STREAM
from lanting.weights.checkpoint import Checkpoint

HEAD = "lm_head.weight"  # with which a language model writes
Configs = Mapping[str, Mapping[str, Any]]
WIDTH, CHANNELS, LATENTS = (3584, 4096), (64, 64), (16, 64)  # of the releases, where a config leaves them out


def check_fits(configs: Configs) -> None:
    """Raises ModelError where transformer, text encoder and VAE (their config.json) are of different models."""
    body, reader, vae = (configs.get(name, {}) for name in ("transformer", "text_encoder", "vae"))
    single = body.get("_class_name") == SINGLE_STREAM
    wanted, given = (
        "Qwen3-VL" if third else "Qwen2.5-VL" for third in (single, reader.get("model_type") == "qwen3_vl")
    )
    if wanted != given:
        raise ModelError(
            "the text encoder is a {given}, and this transformer reads with {wanted}: give another with --text-encoder",
            given=given,
            wanted=wanted,
        )
    text = reader.get("text_config") or reader
    width, asked = text.get("hidden_size"), body.get("context_in_dim" if single else "joint_attention_dim")
    if (width or WIDTH[single]) != (asked or WIDTH[single]):
        raise ModelError(
            "the text encoder's states have {width} numbers, and the transformer reads {asked}: they are of different "
            "models",
            width=width or WIDTH[single],
            asked=asked or WIDTH[single],
        )
    side = int(body.get("patch_size") or (1 if single else 2))
    channels, latents = body.get("in_channels") or CHANNELS[single], vae.get("z_dim") or LATENTS[single]
    if channels != latents * side**2:
        raise ModelError(
            "the VAE has {latents} channels where the transformer wants {wanted}: they are of different models",
            latents=latents,
            wanted=channels // side**2,
        )


def with_writing(spec: ModelSpec, config: Mapping[str, Any], files: Checkpoint) -> ModelSpec:
    """The release, which writes only where the text encoder that is here (its config.json and its files) is a
    Qwen2.5-VL with its head: repacked ones may lack it. A table of words in its place (`tie_word_embeddings`) belongs
    to smaller models than any that a release reads with.
    """
    return replace(spec, writes=spec.writes and config.get("model_type") != "qwen3_vl" and HEAD in files.infos)
