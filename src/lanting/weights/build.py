"""The family's networks from their checkpoints: which class a config asks for, and what of its file is wanted.

How a network is built, checked and filled is in `weights.stored`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeVar

import torch

from lanting.core.errors import ModelError
from lanting.nn.blockwise import BlockwiseConfig, BlockwiseControlNet
from lanting.nn.controlnet import ControlNetConfig, QwenImageControlNet
from lanting.nn.controlnet21 import ControlNet21Config, QwenImage21ControlNet
from lanting.nn.controlnet_fun import FunConfig, QwenImageFunControlNet
from lanting.nn.mmdit import QwenImageTransformer, TransformerConfig
from lanting.nn.qwen3_vl import Qwen3VL, Qwen3VLConfig
from lanting.nn.qwen_vl import QwenVL, QwenVLConfig
from lanting.nn.single_stream import QwenImage21Transformer, SingleStreamConfig
from lanting.nn.vae import AutoencoderKLQwenImage, VAEConfig, to_image_weights
from lanting.nn.vae21 import AutoencoderKLQwenImage21, VAE21Config
from lanting.specs.detect import SINGLE_STREAM
from lanting.weights.checkpoint import Checkpoint
from lanting.weights.configs import BLOCKWISE, CHAIN, FUN
from lanting.weights.stored import Placing, Stored, construct, fill

Transformer = QwenImageTransformer | QwenImage21Transformer
TextEncoder = QwenVL | Qwen3VL
ControlNet = QwenImageControlNet | BlockwiseControlNet | QwenImageFunControlNet | QwenImage21ControlNet
FEW = 64  # blocks that any config may ask for


def check_depth(config: Mapping[str, Any], checkpoint: Checkpoint) -> None:
    """A config that asks for more blocks than there are tensors would be built for hours before it is refused."""
    for table in (config, config.get("text_config"), config.get("vision_config")):
        for key in ("num_layers", "num_hidden_layers", "depth"):
            asked = table.get(key) if isinstance(table, Mapping) else None
            if isinstance(asked, int) and asked > max(FEW, len(checkpoint.infos)):
                raise ModelError(
                    "the {label} has {count} tensors and its config.json asks for {key} = {asked}: config and weights "
                    "belong to different models",
                    **{"label": checkpoint.label, "count": len(checkpoint.infos), "key": key, "asked": asked},
                )


C = TypeVar("C", TransformerConfig, SingleStreamConfig, FunConfig, ControlNet21Config)


def positioned(config: C) -> C:
    """The same, where positions fill a head; a network of other numbers would fail in its first step only."""
    if sum(config.axes_dims_rope) != config.attention_head_dim:
        raise ValueError(f"axes_dims_rope {config.axes_dims_rope} must add up to {config.attention_head_dim}")
    return config


def store_transformer(checkpoint: Checkpoint, config: Mapping[str, Any], placing: Placing) -> Stored[Transformer]:
    """The transformer of a `transformer/` folder or of a file, still empty; its config says which one it is."""
    check_depth(config, checkpoint)

    def make() -> Transformer:
        if config.get("_class_name") == SINGLE_STREAM:
            return QwenImage21Transformer(positioned(SingleStreamConfig.from_dict(config)))
        return QwenImageTransformer(positioned(TransformerConfig.from_dict(config)))

    return Stored(construct(make, checkpoint.label), checkpoint, placing)


def store_controlnet(checkpoint: Checkpoint, config: Mapping[str, Any], placing: Placing) -> Stored[ControlNet]:
    """InstantX's (Union: 5 blocks, Inpainting: 6 blocks and a mask channel), DiffSynth's blockwise or VideoX-Fun's,
    that for Qwen-Image-2.1 among them; still empty."""
    check_depth(config, checkpoint)

    def make() -> ControlNet:
        if config.get("_class_name") == BLOCKWISE:
            sides = (int(config[key]) for key in ("num_layers", "width", "in_channels"))
            return BlockwiseControlNet(BlockwiseConfig(*sides))
        if config.get("_class_name") == CHAIN:
            return QwenImage21ControlNet(positioned(ControlNet21Config.from_dict(config)))
        if config.get("_class_name") == FUN:
            return QwenImageFunControlNet(positioned(FunConfig.from_dict(config)))
        return QwenImageControlNet(ControlNetConfig.from_dict(config))

    return Stored(construct(make, checkpoint.label), checkpoint, placing)


def store_text_encoder(
    checkpoint: Checkpoint, config: Mapping[str, Any], placing: Placing, *, vision: bool = True, head: bool = True
) -> Stored[TextEncoder]:
    """Qwen2.5-VL or Qwen3-VL of a `text_encoder/` folder, or of a file, still empty.

    Without `vision` (releases that read words only) and `head` (unless it is to write words itself) those weights
    are not read: of the 7B model 1.35 GB and 1.09 GB in bfloat16.
    """
    check_depth(config, checkpoint)

    def make() -> TextEncoder:
        if config.get("model_type") == "qwen3_vl":
            return Qwen3VL(Qwen3VLConfig.from_dict(config), vision=vision)
        return QwenVL(QwenVLConfig.from_dict(config), vision=vision, head=head)

    module = construct(make, checkpoint.label)
    if vision and not any(name.startswith("visual.") for name in checkpoint.names()):
        raise ModelError(
            "the {label} has no vision tower, and pictures are to be read: put its mmproj file beside a GGUF file, or "
            "get the whole text encoder",
            label=checkpoint.label,
        )
    leave = placing.leave if vision else (*placing.leave, "visual.")
    if getattr(module, "lm_head", None) is None or module.config.tie_word_embeddings:  # some store the tied one twice
        leave += ("lm_head.",)
    return Stored(module, checkpoint, replace(placing, leave=leave))


def build_transformer(checkpoint: Checkpoint, config: Mapping[str, Any], placing: Placing) -> Transformer:
    """The transformer with its weights."""
    return store_transformer(checkpoint, config, placing).fill()


def build_text_encoder(
    checkpoint: Checkpoint, config: Mapping[str, Any], placing: Placing, *, vision: bool = True, head: bool = True
) -> TextEncoder:
    """The text encoder with its weights; see `store_text_encoder`."""
    return store_text_encoder(checkpoint, config, placing, vision=vision, head=head).fill()


def build_vae(checkpoint: Checkpoint, config: Mapping[str, Any], placing: Placing) -> AutoencoderKLQwenImage:
    """The autoencoder of a `vae/` folder, reduced to what single pictures need; channels-last."""
    label = checkpoint.label

    def make() -> AutoencoderKLQwenImage:
        if config.get("_class_name") == "AutoencoderKLQwenImage21":
            return AutoencoderKLQwenImage21(VAE21Config.from_dict(config))
        return AutoencoderKLQwenImage(VAEConfig.from_dict(config))

    module = construct(make, label)
    moved = {}
    for stored in checkpoint.tensors():  # one by one: of the file's three slices two are let go at once
        for name, tensor in to_image_weights(dict([stored])).items():
            tensor = tensor.to(device=placing.device, dtype=placing.dtype)
            moved[name] = tensor.contiguous(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor
    return fill(module, moved, label)
