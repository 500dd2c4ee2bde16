"""The networks that `full_size.py` writes: names, shapes and configs of Qwen-Image and of Qwen-Image-2.1."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from lanting.nn.mmdit import QwenImageTransformer, TransformerConfig
from lanting.nn.qwen3_language import Qwen3LanguageConfig
from lanting.nn.qwen3_vl import Qwen3VL, Qwen3VLConfig
from lanting.nn.qwen_language import LanguageConfig
from lanting.nn.qwen_vl import QwenVL, QwenVLConfig
from lanting.nn.single_stream import QwenImage21Transformer, SingleStreamConfig
from lanting.nn.vae import AutoencoderKLQwenImage, VAEConfig
from lanting.nn.vae21 import AutoencoderKLQwenImage21, VAE21Config
from lanting.specs.detect import SINGLE_STREAM
from lanting.train.vocabulary import make_tokenizer
from lanting.weights.stored import construct

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Nets:
    """Tensors of the three networks, and what their folders say."""

    transformer: Shapes
    text_encoder: Shapes
    vae: Shapes
    configs: dict[str, dict[str, Any]]  # by component
    pipeline: str
    tokenizer: str  # its folder


@dataclass(frozen=True)
class Release:
    """The published numbers."""

    parameters: int
    layers: int
    reader_layers: int
    make: Callable[[int, int], Nets]


def shapes_of(make: Callable[[], nn.Module]) -> Shapes:
    """Name -> shape, without memory."""
    return {name: tuple(tensor.shape) for name, tensor in construct(make, "benchmark").state_dict().items()}


def qwen_image(layers: int, reader_layers: int) -> Nets:
    net, reader = TransformerConfig(num_layers=layers), LanguageConfig(num_hidden_layers=reader_layers)
    text = asdict(reader) | {"rope_scaling": {"mrope_section": list(reader.mrope_section)}}
    return Nets(
        shapes_of(lambda: QwenImageTransformer(net)),
        shapes_of(lambda: QwenVL(QwenVLConfig(reader), vision=True, head=True)),
        shapes_of(lambda: AutoencoderKLQwenImage(VAEConfig())),
        {"transformer": asdict(net), "text_encoder": text, "vae": asdict(VAEConfig())},
        "QwenImagePipeline",
        "tokenizer",
    )


def qwen_image_21(layers: int, reader_layers: int) -> Nets:
    net = SingleStreamConfig(num_layers=layers)
    reader = Qwen3VLConfig(Qwen3LanguageConfig(num_hidden_layers=reader_layers))
    slot = make_tokenizer().token_to_id("<|image_pad|>")
    text = {"model_type": "qwen3_vl", "image_token_id": slot, "text_config": {"num_hidden_layers": reader_layers}}
    return Nets(
        shapes_of(lambda: QwenImage21Transformer(net)),
        shapes_of(lambda: Qwen3VL(reader)),
        shapes_of(lambda: AutoencoderKLQwenImage21(VAE21Config())),
        {
            "transformer": asdict(net) | {"_class_name": SINGLE_STREAM},
            "text_encoder": text,
            "vae": asdict(VAE21Config()) | {"_class_name": "AutoencoderKLQwenImage21"},
        },
        "QwenImage21Pipeline",
        "processor",
    )


RELEASES = {
    "qwen-image": Release(20_430_401_088, 60, 28, qwen_image),
    "qwen-image-2.1": Release(7_115_124_736, 32, 36, qwen_image_21),
}
