"""Tiny Qwen-Image models with random weights: diffusers' modules, ours with the same weights, whole folders.

Every weight is random, so that no path is silent, and decoded pictures use most of the grey scale. A folder
saved here has the layout of a published release and opens in diffusers and in our loader alike.
"""

from __future__ import annotations

import importlib
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImageControlNetModel,
    QwenImageTransformer2DModel,
)
from PIL import Image
from torch import nn
from transformers import AutoTokenizer, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from lanting.flow.latents import LatentCodec
from lanting.nn.controlnet import ControlNetConfig, QwenImageControlNet
from lanting.nn.mmdit import QwenImageTransformer, TransformerConfig
from lanting.nn.vae import AutoencoderKLQwenImage as ImageVAE
from lanting.nn.vae import VAEConfig, to_image_weights
from lanting.train.vocabulary import VOCAB_SIZE, build_tokenizer, make_tokenizer

diffusers.utils.logging.set_verbosity_error()

JOINT = 32  # width of the text states
NET = {
    "patch_size": 2,
    "in_channels": 64,
    "out_channels": 16,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": JOINT,
    "axes_dims_rope": (4, 6, 6),
}
FLAGS: dict[str, dict[str, bool]] = {
    "qwen-image": {},
    "qwen-image-edit": {},
    "qwen-image-edit-2509": {},
    "qwen-image-edit-2511": {"zero_cond_t": True},
    "qwen-image-layered": {"use_additional_t_cond": True, "use_layer3d_rope": True},
}
SCHEDULE = {
    "use_dynamic_shifting": True,
    "base_shift": 0.5,
    "max_shift": 0.9,
    "base_image_seq_len": 256,
    "max_image_seq_len": 8192,
    "shift_terminal": 0.02,
}
LIGHTNING = {**SCHEDULE, "base_shift": math.log(3), "max_shift": math.log(3), "shift_terminal": None}
PIPELINES = {  # task, or release where a task has several: module suffix and class
    "text_to_image": ("", "QwenImagePipeline"),
    "image_to_image": ("_img2img", "QwenImageImg2ImgPipeline"),
    "inpaint": ("_inpaint", "QwenImageInpaintPipeline"),
    "edit": ("_edit", "QwenImageEditPipeline"),
    "edit_plus": ("_edit_plus", "QwenImageEditPlusPipeline"),
    "edit_inpaint": ("_edit_inpaint", "QwenImageEditInpaintPipeline"),
    "layered": ("_layered", "QwenImageLayeredPipeline"),
    "controlnet": ("_controlnet", "QwenImageControlNetPipeline"),
    "controlnet_inpaint": ("_controlnet_inpaint", "QwenImageControlNetInpaintPipeline"),
}
FOLDER_CLASS = {
    "qwen-image": "QwenImagePipeline",
    "qwen-image-edit": "QwenImageEditPipeline",
    "qwen-image-edit-2509": "QwenImageEditPlusPipeline",
    "qwen-image-edit-2511": "QwenImageEditPlusPipeline",
    "qwen-image-layered": "QwenImageLayeredPipeline",
}


# ---------------------------------------------------------------- modules
def transformer(release: str = "qwen-image", layers: int = 2) -> QwenImageTransformer2DModel:
    torch.manual_seed(0)
    net = QwenImageTransformer2DModel(num_layers=layers, **NET, **FLAGS[release]).eval()
    return randomise(net, 0.1)


def controlnet(extra: int = 0, layers: int = 1) -> QwenImageControlNetModel:
    torch.manual_seed(1)
    net = QwenImageControlNetModel(num_layers=layers, extra_condition_channels=extra, **NET).eval()
    return randomise(net, 0.1)


def vae(channels: int = 3) -> AutoencoderKLQwenImage:
    torch.manual_seed(2)
    net = AutoencoderKLQwenImage(base_dim=4, num_res_blocks=1, input_channels=channels).eval()
    with torch.no_grad():
        for name, weight in net.named_parameters():
            if name.endswith("gamma"):
                weight.uniform_(0.5, 1.5)
            else:
                weight.normal_(0, 1.2 / weight[0].numel() ** 0.5 if weight.ndim > 1 else 0.1)
    return net


def scheduler(config: dict[str, Any] | None = None) -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(**(SCHEDULE if config is None else config))


def text_encoder() -> Qwen2_5_VLForConditionalGeneration:
    torch.manual_seed(3)
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}
    text = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": JOINT,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "rms_norm_eps": 1e-6,
        "rope_parameters": rope,
        "tie_word_embeddings": False,
    }
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 2,
        "out_hidden_size": JOINT,
        "fullatt_block_indexes": [1],
    }
    ids = {key: _special(token) for key, token in _SPECIAL_IDS.items()}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False, **ids)
    return randomise(Qwen2_5_VLForConditionalGeneration(config).eval(), 0.15)


_SPECIAL_IDS = {
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
}


def _special(token: str) -> int:
    found = make_tokenizer().token_to_id(token)
    assert found is not None
    return found


def randomise(net: Any, std: float) -> Any:
    """Normal weights everywhere; scales (one-dimensional weights of norms) around 1."""
    with torch.no_grad():
        for name, weight in net.named_parameters():
            scale = weight.ndim == 1 and name.endswith("weight")
            weight.normal_(1.0 if scale else 0.0, std)
    return net


# ---------------------------------------------------------------- our modules, the same weights
def our_transformer(theirs: QwenImageTransformer2DModel) -> QwenImageTransformer:
    ours = QwenImageTransformer(TransformerConfig.from_dict(theirs.config)).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours.to(theirs.dtype)


def our_controlnet(theirs: QwenImageControlNetModel) -> QwenImageControlNet:
    ours = QwenImageControlNet(ControlNetConfig.from_dict(theirs.config)).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours.to(theirs.dtype)


def our_codec(theirs: AutoencoderKLQwenImage) -> LatentCodec:
    config = VAEConfig.from_dict(dict(theirs.config))
    ours = ImageVAE(config).eval()
    ours.load_state_dict(to_image_weights(theirs.state_dict()), strict=True)
    ours = ours.to(theirs.dtype)
    return LatentCodec(ours, config.latents_mean, config.latents_std, pixel_channels=config.input_channels)


# ---------------------------------------------------------------- diffusers' pipelines
class NoTextEncoder(nn.Module):
    """Stands in where prompt_embeds are given; pipelines ask it for its dtype only."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.dtype = dtype


def pipeline_module(kind: str) -> Any:
    return importlib.import_module(f"diffusers.pipelines.qwenimage.pipeline_qwenimage{PIPELINES[kind][0]}")


def pipeline(kind: str, **components: Any) -> Any:
    """A diffusers pipeline over the given modules; what isn't given is empty."""
    cls = getattr(pipeline_module(kind), PIPELINES[kind][1])
    parts: dict[str, Any] = {"scheduler": scheduler(), "tokenizer": None, **components}
    parts.setdefault("text_encoder", NoTextEncoder(parts["transformer"].dtype))
    if kind in ("edit", "edit_plus", "edit_inpaint", "layered"):
        parts.setdefault("processor", None)
    pipe = cls(**parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def patch_reference(monkeypatch: Any, area: int | None = None) -> None:
    """Make diffusers comparable: take the mode of a posterior instead of a sample, wherever it is taken, and
    resize input pictures to `area` square pixels instead of a megapixel."""
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode())
    for kind in PIPELINES:
        module, cls = pipeline_module(kind), getattr(pipeline_module(kind), PIPELINES[kind][1])
        monkeypatch.setattr(cls, "_execution_device", property(lambda self: torch.device("cpu")))
        if area is not None and hasattr(module, "calculate_dimensions"):
            original = module.calculate_dimensions
            small = lambda _, ratio, original=original: original(area, ratio)  # noqa: E731
            monkeypatch.setattr(module, "calculate_dimensions", small)


# ---------------------------------------------------------------- pictures
def picture(width: int, height: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    """Soft coloured noise, so that resampling and the VAE have something to do."""
    rough = np.random.default_rng(seed).integers(0, 256, (height // 8 + 2, width // 8 + 2, len(mode)))
    return Image.fromarray(rough.squeeze().astype(np.uint8)).resize((width, height), Image.Resampling.BICUBIC)


def mask(width: int, height: int, box: tuple[int, int, int, int]) -> Image.Image:
    """White in `box` (left, top, right, bottom), black around it."""
    sheet = Image.new("L", (width, height))
    sheet.paste(255, box)
    return sheet


# ---------------------------------------------------------------- folders
def save_folder(folder: Path, release: str = "qwen-image", layers: int = 2, shard: str = "10GB") -> Path:
    """A complete tiny checkpoint of `release` in the published layout: configs, weights, tokenizer,
    processor.

    `shard` is the largest weight file ("200KB" makes several and an index).
    """
    channels = 4 if release == "qwen-image-layered" else 3
    transformer(release, layers).save_pretrained(folder / "transformer", max_shard_size=shard)
    vae(channels).save_pretrained(folder / "vae")
    scheduler().save_pretrained(folder / "scheduler")
    text_encoder().save_pretrained(folder / "text_encoder", max_shard_size=shard)
    build_tokenizer(folder / "tokenizer")
    index = {
        "_class_name": FOLDER_CLASS[release],
        "_diffusers_version": diffusers.__version__,
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "Qwen2_5_VLForConditionalGeneration"],
        "tokenizer": ["transformers", "Qwen2Tokenizer"],
        "transformer": ["diffusers", "QwenImageTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKLQwenImage"],
    }
    if release != "qwen-image":
        index["processor"] = ["transformers", "Qwen2VLProcessor"]
        build_tokenizer(folder / "processor")
        _write(folder / "processor" / "preprocessor_config.json", PREPROCESSOR)
    _write(folder / "model_index.json", index)
    return folder


def save_controlnet(folder: Path, extra: int = 0, layers: int = 1) -> Path:
    """A tiny ControlNet in its published layout: config.json and one weight file."""
    controlnet(extra, layers).save_pretrained(folder)
    return folder


PREPROCESSOR = {
    "image_processor_type": "Qwen2VLImageProcessor",
    "min_pixels": 3136,
    "max_pixels": 12845056,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}


def _write(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2), encoding="utf-8")


def open_with_diffusers(folder: Path, kind: str, **extra: Any) -> Any:
    """The saved folder as the diffusers pipeline of `kind`.

    Assembled by hand for two reasons: transformers' own Qwen2VLProcessor can't be built without torchvision,
    and diffusers 0.42 forgets to pass mm_token_type_ids, without which transformers 5 gives pictures the
    positions of plain text (the released weights were trained with three-dimensional ones). Both are mended
    here.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    encoder = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder / "text_encoder").eval()
    parts: dict[str, Any] = {
        "transformer": QwenImageTransformer2DModel.from_pretrained(folder / "transformer").eval(),
        "vae": AutoencoderKLQwenImage.from_pretrained(folder / "vae").eval(),
        "scheduler": FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler"),
        "tokenizer": tokenizer,
        "text_encoder": see_pictures(encoder),
        **extra,
    }
    if kind in ("edit", "edit_plus", "edit_inpaint", "layered"):
        parts["processor"] = Processor(tokenizer)
    return pipeline(kind, **parts)


def see_pictures(encoder: Any) -> Any:
    """Pass mm_token_type_ids on every call."""
    forward = encoder.forward

    def with_types(input_ids: torch.Tensor, **rest: Any) -> Any:
        if rest.get("pixel_values") is not None:
            rest["mm_token_type_ids"] = (input_ids == encoder.config.image_token_id).int()
        return forward(input_ids=input_ids, **rest)

    encoder.forward = with_types
    return encoder


class Processor:
    """What diffusers needs of Qwen2VLProcessor, over its torchvision-free image processor."""

    def __init__(self, tokenizer: Any) -> None:
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        self.tokenizer = tokenizer
        self.image_processor = Qwen2VLImageProcessorPil(
            **{key: PREPROCESSOR[key] for key in ("patch_size", "temporal_patch_size", "merge_size")},
            min_pixels=PREPROCESSOR["min_pixels"],
            max_pixels=PREPROCESSOR["max_pixels"],
        )

    def __call__(self, text: Any, images: Any = None, **options: Any) -> Any:
        rows = [text] if isinstance(text, str) else list(text)
        seen: dict[str, Any] = {}
        if images is not None:
            each = list(images) if isinstance(images, list) else [images]
            # every prompt of a batch is shown the same pictures
            seen = dict(self.image_processor(images=each * len(rows), return_tensors="pt"))
            counts = iter((seen["image_grid_thw"].prod(-1) // 4).tolist())
            for i, row in enumerate(rows):
                parts = row.split("<|image_pad|>")
                rows[i] = parts[0] + "".join("<|image_pad|>" * next(counts) + part for part in parts[1:])
        return Batch(**self.tokenizer(rows, **options), **seen)


class Batch(SimpleNamespace):
    """A dict with attributes and `.to`, as transformers returns."""

    def to(self, device: Any) -> Batch:
        return self

    def __getitem__(self, key: str) -> Any:
        return getattr(self, key)

    def get(self, key: str) -> Any:
        return getattr(self, key, None)
