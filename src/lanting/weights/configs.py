"""The config.json that a single file does not bring: read off the shapes of its tensors, without torch.

Depths, widths and markers are all in the shapes; what is not (how a head's width is split for positions, the
statistics of latents) is the same in every release. Files of our own carry their config in the header, which wins.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from lanting.core.errors import ModelError
from lanting.core.lang import Phrase
from lanting.specs.detect import SINGLE_STREAM
from lanting.weights.checkpoint import Checkpoint
from lanting.weights.forms import FLAGS, shapes
from lanting.weights.kinds import ZERO_COND_T
from lanting.weights.single import OWN_NOTES

SCHEDULER: dict[str, Any] = {  # of every release; distilled ones replace parts of it by their spec's own
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "invert_sigmas": False,
    "max_image_seq_len": 8192,
    "max_shift": 0.9,
    "num_train_timesteps": 1000,
    "shift": 1.0,
    "shift_terminal": 0.02,
    "stochastic_sampling": False,
    "time_shift_type": "exponential",
    "use_beta_sigmas": False,
    "use_dynamic_shifting": True,
    "use_exponential_sigmas": False,
    "use_karras_sigmas": False,
}
BLOCKWISE = "QwenImageBlockWiseControlNet"  # what DiffSynth calls the class; its repositories have no config.json
CHAIN = "QwenImage21ControlNet"  # VideoX-Fun's for 2.1; behind which blocks it is added, nothing in it tells
FUN = "QwenImageFunControlNet"  # and for the first family
VISION_HEAD = 80  # width of a vision head in every Qwen2.5-VL
QWEN3_VISION_HEAD = 72  # and in Qwen3-VL-8B


def own_notes(checkpoint: Checkpoint) -> dict[str, Any]:
    """What our own writer noted in the header; empty for files of others."""
    try:
        notes = json.loads(checkpoint.metadata.get(OWN_NOTES, "{}"))
    except (ValueError, RecursionError):
        notes = None
    if not isinstance(notes, dict) or not isinstance(notes.get("config", {}), dict):
        raise ModelError("the {label} has notes of ours that can't be read: write it again", label=checkpoint.label)
    return notes


def _told(checkpoint: Checkpoint) -> dict[str, Any]:
    """What another program's note of the config says that no tensor tells (nunchaku's files have one)."""
    try:
        config = json.loads(checkpoint.metadata.get("config", "{}"))
    except (ValueError, RecursionError):
        config = None
    clean = config.get("zero_cond_t") if isinstance(config, dict) else None
    return {"zero_cond_t": True} if clean is True else {}


def config_of(component: str, checkpoint: Checkpoint) -> dict[str, Any]:
    """What config.json of this component would say. Raises ModelError where the tensors tell of no such network."""
    if config := own_notes(checkpoint).get("config"):
        return config
    own = {"transformer": _transformer, "vae": _vae, "text_encoder": _text_encoder, "controlnet": _controlnet}
    flags = {name: info.shape for name, info in checkpoint.infos.items() if name in FLAGS}
    try:
        config = own[component](Sides(shapes(checkpoint) | flags))
        return config | _told(checkpoint) if "zero_cond_t" in config else config
    except (LookupError, ZeroDivisionError, ValueError) as error:
        what = component.replace("_", " ")
        lack = error.args[0] if error.args and isinstance(error.args[0], Phrase) else str(error)
        raise ModelError(
            "the {label} is no complete {what} (it lacks {error}): get another",
            **{"label": checkpoint.label, "what": what, "error": lack},
        ) from None


class Sides:
    """Shapes by name, and what is counted in them."""

    def __init__(self, table: Mapping[str, tuple[int, ...]]):
        self.table = table

    def __getitem__(self, name: str) -> tuple[int, ...]:
        return self.table[name]

    def __contains__(self, name: str) -> bool:
        return name in self.table

    def blocks(self, stem: str) -> int:
        """How many there are: the highest index behind `stem` and one. Raises LookupError without any."""
        rest = (name.removeprefix(stem).split(".")[0] for name in self.table if name.startswith(stem))
        indices = {int(index) for index in rest if index.isdigit() and index.isascii()}
        if not indices:
            raise LookupError(stem)
        return max(indices) + 1


def _transformer(sides: Sides) -> dict[str, Any]:
    if "txt_in.text_norm.weight" in sides:
        return _single_stream(sides)
    width, channels = sides["img_in.weight"]
    (head,) = sides["transformer_blocks.0.attn.norm_q.weight"]
    layered = "time_text_embed.addition_t_embedding.weight" in sides
    axes = _axes(head)
    return {
        "_class_name": "QwenImageTransformer2DModel",
        "num_layers": sides.blocks("transformer_blocks."),
        "num_attention_heads": width // head,
        "attention_head_dim": head,
        "joint_attention_dim": sides["txt_in.weight"][1],
        "in_channels": channels,
        "out_channels": sides["proj_out.weight"][0] // 4,
        "patch_size": 2,
        "axes_dims_rope": axes,
        "zero_cond_t": ZERO_COND_T in sides,
        "use_additional_t_cond": layered,
        "use_layer3d_rope": layered,
    }


def _axes(head: int) -> list[int]:
    """How a head's width is shared out among frames, rows and columns, in every release."""
    if head % 16:
        raise ValueError(Phrase("a config: heads of {head} tell nothing of their positions", head=head))
    return [head // 8, head * 7 // 16, head * 7 // 16]


def _single_stream(sides: Sides) -> dict[str, Any]:
    """Qwen-Image-2.1's."""
    width, channels = sides["img_in.weight"]
    (head,) = sides["transformer_blocks.0.attn.norm_q.weight"]
    axes = _axes(head)
    return {
        "_class_name": SINGLE_STREAM,
        "num_layers": sides.blocks("transformer_blocks."),
        "num_attention_heads": width // head,
        "attention_head_dim": head,
        "context_in_dim": sides["txt_in.in_layer.weight"][1],
        "in_channels": channels,
        "out_channels": sides["proj_out.weight"][0],
        "patch_size": 1,
        "mlp_ratio": sides["transformer_blocks.0.img_mlp.out.weight"][1] // width,
        "axes_dims_rope": axes,
        "causal_condition": True,
    }


def _controlnet(sides: Sides) -> dict[str, Any]:
    """How a head is split for positions is left to the model that it belongs to."""
    if "control_img_in.weight" in sides:
        return _chain(sides)
    width, channels = sides["img_in.weight"]
    if "controlnet_blocks.0.y_rms.weight" in sides:
        depth = sides.blocks("controlnet_blocks.")
        return {"_class_name": BLOCKWISE, "num_layers": depth, "width": width, "in_channels": channels}
    (head,) = sides["transformer_blocks.0.attn.norm_q.weight"]
    return {
        "_class_name": "QwenImageControlNetModel",
        "num_layers": sides.blocks("transformer_blocks."),
        "num_attention_heads": width // head,
        "attention_head_dim": head,
        "joint_attention_dim": sides["txt_in.weight"][1],
        "in_channels": channels,
        "extra_condition_channels": sides["controlnet_x_embedder.weight"][1] - channels,
    }


def _chain(sides: Sides) -> dict[str, Any]:
    """VideoX-Fun's ControlNets."""
    width, channels = sides["control_img_in.weight"]
    (head,) = sides["control_blocks.0.attn.norm_q.weight"]
    found: dict[str, Any] = {
        "_class_name": FUN,
        "control_blocks": sides.blocks("control_blocks."),
        "num_attention_heads": width // head,
        "attention_head_dim": head,
        "control_in_dim": channels,
    }
    if "control_blocks.0.img_mod.1.weight" in sides:
        return found
    return {**found, "_class_name": CHAIN, "mlp_ratio": sides["control_blocks.0.img_mlp.out.weight"][1] // width}


def _vae(sides: Sides) -> dict[str, Any]:
    if "decoder.up_blocks.0.upsampler.resample.1.weight" in sides:
        return _vae_21(sides)
    base, colours = sides["encoder.conv_in.weight"][:2]
    return {
        "_class_name": "AutoencoderKLQwenImage",
        "base_dim": base,
        "z_dim": sides["decoder.conv_in.weight"][1],
        "dim_mult": [1, 2, 4, 4],
        "num_res_blocks": sides.blocks("decoder.up_blocks.0.resnets.") - 1,
        "attn_scales": [],
        "temperal_downsample": [False, True, True],
        "dropout": 0.0,
        "input_channels": colours,
    }


def _vae_21(sides: Sides) -> dict[str, Any]:
    """Qwen-Image-2.1's; its statistics are those of the release."""
    base, colours = sides["encoder.conv_in.weight"][:2]
    return {
        "_class_name": "AutoencoderKLQwenImage21",
        "base_dim": base,
        "decoder_base_dim": sides["decoder.conv_out.weight"][1],
        "z_dim": sides["decoder.conv_in.weight"][1],
        "dim_mult": [1, 2, 4, 8, 8],
        "num_res_blocks": sides.blocks("encoder.down_blocks.0.resnets."),
        "attn_scales": [],
        "temperal_downsample": [False, True, True, True],
        "in_channels": colours,
        "out_channels": sides["decoder.conv_out.weight"][0],
        "is_residual": True,
    }


def _text_encoder(sides: Sides) -> dict[str, Any]:
    if "model.layers.0.self_attn.q_norm.weight" in sides:
        return _qwen3(sides)
    vocabulary, width = sides["model.embed_tokens.weight"]
    queries = sides["model.layers.0.self_attn.q_proj.weight"][0]
    head = 128  # in every Qwen2.5-VL
    tied = "lm_head.weight" not in sides and width == 2048  # the 3B model's; of others some files leave the head out
    text = {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": sides["model.layers.0.mlp.gate_proj.weight"][0],
        "num_hidden_layers": sides.blocks("model.layers."),
        "num_attention_heads": queries // head,
        "num_key_value_heads": sides["model.layers.0.self_attn.k_proj.weight"][0] // head,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "rope_scaling": {"mrope_section": [16, 24, 24], "rope_type": "default"},
        "tie_word_embeddings": tied,
    }
    config = {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "image_token_id": 151655,
        "tie_word_embeddings": tied,
        "text_config": text,
    }
    if "visual.patch_embed.proj.weight" in sides:
        inner = sides["visual.patch_embed.proj.weight"][0]
        config["vision_config"] = {
            "depth": sides.blocks("visual.blocks."),
            "hidden_size": inner,
            "intermediate_size": sides["visual.blocks.0.mlp.gate_proj.weight"][0],
            "num_heads": inner // VISION_HEAD,
            "out_hidden_size": width,
        }
    else:
        config["vision_config"] = {"out_hidden_size": width}
    return config


def _qwen3(sides: Sides) -> dict[str, Any]:
    """Qwen3-VL, the reader of 2.1: heads tell their width by their norms."""
    vocabulary, width = sides["model.embed_tokens.weight"]
    (head,) = sides["model.layers.0.self_attn.q_norm.weight"]
    text = {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": sides["model.layers.0.mlp.gate_proj.weight"][0],
        "num_hidden_layers": sides.blocks("model.layers."),
        "num_attention_heads": sides["model.layers.0.self_attn.q_proj.weight"][0] // head,
        "num_key_value_heads": sides["model.layers.0.self_attn.k_proj.weight"][0] // head,
        "head_dim": head,
        "rms_norm_eps": 1e-6,
        "rope_theta": 5e6,
        "rope_scaling": {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"},
    }
    config = {
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "model_type": "qwen3_vl",
        "image_token_id": 151655,
        "tie_word_embeddings": False,
        "text_config": text,
        "vision_config": {"out_hidden_size": width},
    }
    if "visual.pos_embed.weight" in sides:
        count, inner = sides["visual.pos_embed.weight"]
        depth, deep = sides.blocks("visual.blocks."), sides.blocks("visual.deepstack_merger_list.")
        config["vision_config"] = {
            "depth": depth,
            "hidden_size": inner,
            "intermediate_size": sides["visual.blocks.0.mlp.linear_fc1.weight"][0],
            "num_heads": inner // QWEN3_VISION_HEAD,
            "out_hidden_size": width,
            "num_position_embeddings": count,
            "deepstack_visual_indexes": [8 * (place + 1) for place in range(deep)],
        }
    return config
