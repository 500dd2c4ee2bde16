"""From training checkpoints to the official folder layout, in bfloat16, as diffusers and transformers write it.

The autoencoder goes back to its 3-D shape (zeros in the time slices that one frame never meets), the text model
and its vision tower are stored under their hub names, and the scheduler is a plain flow-match Euler without shift.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lanting.core.errors import ModelError
from lanting.nn.qwen_language import LanguageConfig
from lanting.nn.qwen_vl import QwenVL, QwenVLConfig
from lanting.nn.vae import to_video_weights
from lanting.train.kept import read_checkpoint, write_tensors
from lanting.train.model import NanoConfig
from lanting.train.vae import DECODER, WEIGHTS, load_vae

VERSIONS = {"_diffusers_version": "0.38.0"}
SCHEDULER = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    **VERSIONS,
    "num_train_timesteps": 1000,
    "shift": 1.0,
    "use_dynamic_shifting": True,
    "base_shift": 0.0,
    "max_shift": 0.0,
    "base_image_seq_len": 256,
    "max_image_seq_len": 8192,
    "shift_terminal": None,
    "time_shift_type": "exponential",
}
INDEX = {
    "_class_name": "QwenImagePipeline",
    **VERSIONS,
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "Qwen2_5_VLForConditionalGeneration"],
    "tokenizer": ["transformers", "Qwen2Tokenizer"],
    "transformer": ["diffusers", "QwenImageTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKLQwenImage"],
}


def text_config(config: NanoConfig, ids: Mapping[str, int]) -> dict[str, Any]:
    """transformers' config.json of the text encoder."""
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "tie_word_embeddings": config.language.tie_word_embeddings,
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
        "text_config": language_table(config.language, ids),
        "vision_config": vision_table(config),
        "dtype": "bfloat16",
    }


def language_table(language: LanguageConfig, ids: Mapping[str, int]) -> dict[str, Any]:
    """The part about the language model."""
    return {
        "model_type": "qwen2_5_vl_text",
        "vocab_size": language.vocab_size,
        "hidden_size": language.hidden_size,
        "intermediate_size": language.intermediate_size,
        "num_hidden_layers": language.num_hidden_layers,
        "num_attention_heads": language.num_attention_heads,
        "num_key_value_heads": language.num_key_value_heads,
        "rms_norm_eps": language.rms_norm_eps,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": language.tie_word_embeddings,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": language.rope_theta,
            "mrope_section": list(language.mrope_section),
        },
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
        "pad_token_id": ids["<|endoftext|>"],
    }


def vision_table(config: NanoConfig) -> dict[str, Any]:
    """The part about the vision tower."""
    return {
        "model_type": "qwen2_5_vl",
        "depth": config.vision.depth,
        "hidden_size": config.vision.hidden_size,
        "intermediate_size": config.vision.intermediate_size,
        "num_heads": config.vision.num_heads,
        "out_hidden_size": config.language.hidden_size,
        "fullatt_block_indexes": list(config.vision.fullatt_block_indexes),
        "window_size": config.vision.window_size,
        "patch_size": config.vision.patch_size,
        "temporal_patch_size": config.vision.temporal_patch_size,
        "spatial_merge_size": config.vision.spatial_merge_size,
    }


def special_ids(tokenizer: Path) -> dict[str, int]:
    """Ids of the added tokens of a tokenizer.json."""
    added = json.loads((tokenizer / "tokenizer.json").read_text(encoding="utf-8"))["added_tokens"]
    return {entry["content"]: entry["id"] for entry in added}


def export_nano(run: Path, out: Path) -> Path:
    """Write `out` from a run's averaged weights; raises ModelError when the run has none yet."""
    checkpoint = run / "checkpoint.pt"
    if not checkpoint.exists():
        raise ModelError("{folder} holds no trained weights yet; run 'lanting train nano' first", folder=run)
    kept = read_checkpoint(checkpoint)
    state, config = kept["average"], NanoConfig.from_dict(kept["config"])
    part = out.with_name(out.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    transformer = {k.removeprefix("transformer."): v for k, v in state.items() if k.startswith("transformer.")}
    shape = {**asdict(config.transformer), "_class_name": "QwenImageTransformer2DModel", **VERSIONS}
    shape["axes_dims_rope"] = list(config.transformer.axes_dims_rope)
    write_component(part / "transformer", "diffusion_pytorch_model", transformer, shape)

    tuned = (run / "vae" / DECODER).exists()
    vae = load_vae(run / "vae", DECODER if tuned else WEIGHTS)
    values = json.loads((run / "vae" / "config.json").read_text(encoding="utf-8"))
    video = to_video_weights(vae.state_dict(), vae.config)
    write_component(part / "vae", "diffusion_pytorch_model", video, values)

    encoder = text_config(config, special_ids(run / "tokenizer"))
    write_component(part / "text_encoder", "model", text_weights(state, encoder), encoder)
    shutil.copytree(run / "tokenizer", part / "tokenizer")
    write_json(part / "scheduler" / "scheduler_config.json", SCHEDULER)
    write_json(part / "model_index.json", INDEX)
    shutil.rmtree(out, ignore_errors=True)
    part.rename(out)
    return out


def text_weights(state: Mapping[str, Tensor], encoder: Mapping[str, Any]) -> dict[str, Tensor]:
    """The trained language model and vision tower under their hub names."""
    whole = QwenVL(QwenVLConfig.from_dict(encoder)).state_dict()
    trained = {k.replace("language.", "model.", 1): v for k, v in state.items() if k.startswith("language.")}
    trained |= {k: v for k, v in state.items() if k.startswith("visual.")}
    missing = set(whole) - {"lm_head.weight"} ^ set(trained)
    assert not missing, f"trained and stored tensors differ: {sorted(missing)[:3]}"
    return trained


def write_component(folder: Path, stem: str, state: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {k: v.detach().to(torch.bfloat16).contiguous() for k, v in state.items()}
    write_tensors(folder / f"{stem}.safetensors", tensors, {"format": "pt"})
    write_json(folder / "config.json", config)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
