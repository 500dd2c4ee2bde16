"""A tiny Qwen-Image-2.1 with random weights, as a whole folder that diffusers' pipeline and our loader open alike."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import tiny
import torch
from diffusers import (
    AutoencoderKLQwenImage21,
    FlowMatchEulerDiscreteScheduler,
    QwenImage21Pipeline,
    QwenImage21Transformer2DModel,
)
from transformers import AutoTokenizer, Qwen3VLConfig, Qwen3VLForConditionalGeneration, Qwen3VLProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor

from lanting.train.vocabulary import VOCAB_SIZE, build_tokenizer

NET = {
    "in_channels": 8,
    "out_channels": 8,
    "attention_head_dim": 32,
    "num_attention_heads": 2,
    "context_in_dim": 32,
    "axes_dims_rope": (4, 14, 14),
}
PREPROCESSOR = {
    "image_processor_type": "Qwen2VLImageProcessor",
    "size": {"shortest_edge": 32 * 32, "longest_edge": 256 * 256},
    "patch_size": 16,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.5] * 3,
    "image_std": [0.5] * 3,
}
MESSAGE = "<|im_start|>{{ m.role }}\n{% for c in m.content %}{{ c.text }}{% endfor %}<|im_end|>\n"
CHAT = "{% for m in messages %}" + MESSAGE + "{% endfor %}"


class Processor(Qwen3VLProcessor):
    """Theirs, but for a check of its parts' types that wants torchvision."""

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> type:
        return type(argument)


def transformer() -> QwenImage21Transformer2DModel:
    torch.manual_seed(0)
    return tiny.randomise(QwenImage21Transformer2DModel(num_layers=2, **NET).eval(), 0.1)


def vae() -> AutoencoderKLQwenImage21:
    torch.manual_seed(2)
    mean, std = torch.randn(8).tolist(), (torch.rand(8) + 0.5).tolist()
    sizes: dict[str, Any] = {"base_dim": 4, "decoder_base_dim": 6, "z_dim": 8, "num_res_blocks": 1}
    net = AutoencoderKLQwenImage21(**sizes, latents_mean=mean, latents_std=std).eval()
    with torch.no_grad():
        for name, weight in net.named_parameters():
            if name.endswith("gamma"):
                weight.uniform_(0.5, 1.5)
            else:
                weight.normal_(0, 0.9 / weight[0].numel() ** 0.5 if weight.ndim > 1 else 0.1)
    return net


def text_encoder() -> Qwen3VLForConditionalGeneration:
    torch.manual_seed(3)
    rope = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [4, 2, 2], "mrope_interleaved": True}
    text = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "rope_parameters": rope,
    }
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 2,
        "out_hidden_size": 32,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0],
    }
    ids = {key: tiny._special(token) for key, token in tiny._SPECIAL_IDS.items()}
    config = Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False, **ids)
    return tiny.randomise(Qwen3VLForConditionalGeneration(config).eval(), 0.15)


def save_folder(folder: Path, sample_sigmas: list[float] | None = None, shard: str = "10GB") -> Path:
    """A complete checkpoint in the published layout. `sample_sigmas` makes it a Turbo."""
    transformer().save_pretrained(folder / "transformer", max_shard_size=shard)
    vae().save_pretrained(folder / "vae")
    tiny.scheduler().save_pretrained(folder / "scheduler")
    text_encoder().save_pretrained(folder / "text_encoder")
    build_tokenizer(folder / "processor")
    write(folder / "processor" / "preprocessor_config.json", PREPROCESSOR)
    index = {
        "_class_name": "QwenImage21Pipeline",
        "_diffusers_version": diffusers.__version__,
        "sample_sigmas": sample_sigmas,
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "Qwen3VLForConditionalGeneration"],
        "processor": ["transformers", "Qwen3VLProcessor"],
        "transformer": ["diffusers", "QwenImage21Transformer2DModel"],
        "vae": ["diffusers", "AutoencoderKLQwenImage21"],
    }
    write(folder / "model_index.json", index)
    return folder


def write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2), encoding="utf-8")


def open_with_diffusers(folder: Path) -> QwenImage21Pipeline:
    """The saved folder as diffusers' pipeline, assembled by hand since its processor wants torchvision."""
    pictures = Qwen2VLImageProcessorPil(**{k: v for k, v in PREPROCESSOR.items() if k != "image_processor_type"})
    tokenizer = AutoTokenizer.from_pretrained(folder / "processor")
    pipe = QwenImage21Pipeline(
        FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler"),
        AutoencoderKLQwenImage21.from_pretrained(folder / "vae").eval(),
        Qwen3VLForConditionalGeneration.from_pretrained(folder / "text_encoder").eval(),
        Processor(pictures, tokenizer, Qwen3VLVideoProcessor(), chat_template=CHAT),
        QwenImage21Transformer2DModel.from_pretrained(folder / "transformer").eval(),
        json.loads((folder / "model_index.json").read_text())["sample_sigmas"],
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe
