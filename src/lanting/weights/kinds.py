"""What a set of tensors is, judged by names and shapes: the whole knowledge is in the patterns below.

A guess needs the tensors that make the thing what it is (a transformer's modulation, a VAE's two convolutions),
never a file's name. Files for ComfyUI carry the same names under a prefix.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lanting.core.errors import ModelError
from lanting.core.lang import Phrase
from lanting.weights.headers import TensorInfo
from lanting.weights.schemes.foreign import REFUSED

PREFIXES = (
    "model.diffusion_model.",
    "diffusion_model.",
    "text_encoders.qwen25_7b.transformer.",
    "vae.",
    "transformer.",
    "controlnet.",
    "control_model.",
)
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")  # endings of files that can run code when they are opened
LORA = re.compile(r"(\.lora_(A|B|down|up|a|b)\b|lora_(down|up)\.weight|\.(hada|lokr)_w\d)")
DOWN = re.compile(r"(lora_A|lora_down|lora_a)(\.|$)")
WAN_VAE = ("conv1.weight", "decoder.conv1.weight", "encoder.downsamples.0.residual.2.weight")  # under Wan's own names
ZERO_COND_T = "__index_timestep_zero__"  # an empty tensor by which ComfyUI and we know Edit-2511
SCALES = (".weight_scale", ".scale_weight", ".comfy_quant", ".weight_scale_2", ".weight.absmax", ".SCB", ".scales")


def pickled(path: Path | str) -> ModelError:
    """The sentence for a file of that sort."""
    return ModelError(
        "{path} is pickled, which can run code, and is never opened: get a safetensors file", path=str(path)
    )


@dataclass(frozen=True, slots=True)
class Kind:
    """`name`: transformer, controlnet, vae, text_encoder, lora, all-in-one or unknown; `detail` in words."""

    name: str
    detail: str = ""
    release: str | None = None  # where tensors alone tell it


def guess_kind(infos: Mapping[str, TensorInfo]) -> Kind:
    """The best guess at what these tensors are."""
    if any(LORA.search(name) for name in infos):
        return _lora(infos)
    sorts = {name.split(".", 1)[0] for name in infos if name.startswith(("model.diffusion_model.", "vae.", "text_enc"))}
    if len(sorts) > 1:
        return Kind("all-in-one", Phrase("transformer, VAE and text encoder in one file"))
    bare = {_strip(name).replace(".qweight", ".weight"): info for name, info in infos.items()}
    for judge in (_blockwise, _chain, _transformer, _vae, _text_encoder):
        if (kind := judge(bare)) is not None:
            scaled = any(name.endswith(SCALES) for name in bare)
            return replace(kind, detail=Phrase("{what} with scales", what=kind.detail)) if scaled else kind
    return Kind("unknown", foreign(infos))


def foreign(names: Iterable[str]) -> str:
    """How tensors are packed that nothing here reads, "" where they aren't: whole files have names of their own."""
    parts = {name.rpartition(".")[2] for name in names}
    if "qweight" not in parts:
        return next((scheme for part, scheme in REFUSED.items() if part in parts), "")
    return "SVDQuant (nunchaku)" if parts & {"smooth_factor", "smooth", "proj_down", "lora_down"} else "AWQ / GPTQ"


def config_notes(name: str, kind: Kind, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Sentences where a component's config says otherwise than its tensors, of which `shapes` are the values'."""
    found: list[tuple[str, object, object]] = []  # (key, what the config says, what the tensors say)
    shape = {_strip(key): sides for key, sides in shapes.items()}
    if kind.name in ("transformer", "controlnet"):
        found.append(("num_layers", config.get("num_layers"), _blocks(shape, "transformer_blocks") or None))
        found.append(("joint_attention_dim", config.get("joint_attention_dim"), _side(shape, "txt_in.weight", 1)))
        found.append(("in_channels", config.get("in_channels"), _side(shape, "img_in.weight", 1)))
        extra = "time_text_embed.addition_t_embedding.weight" in shape
        found.append(("use_additional_t_cond", bool(config.get("use_additional_t_cond")), extra))
    if kind.name == "vae" and "quant_conv.weight" in shape:
        key = "in_channels" if config.get("_class_name") == "AutoencoderKLQwenImage21" else "input_channels"
        found.append((key, config.get(key, 3), _side(shape, "encoder.conv_in.weight", 1)))
        found.append(("z_dim", config.get("z_dim"), _side(shape, "decoder.conv_in.weight", 1)))
    if kind.name == "text_encoder":
        text = config.get("text_config") if isinstance(config.get("text_config"), dict) else config
        assert text is not None
        found.append(("num_hidden_layers", text.get("num_hidden_layers"), _blocks(shape, "layers")))
        found.append(("vocab_size", text.get("vocab_size"), _side(shape, "embed_tokens.weight", 0)))
    return [
        Phrase(
            "{name}/config.json says {key} = {said}, but the tensors say {seen}.",
            **{"name": name, "key": key, "said": said, "seen": seen},
        )
        for key, said, seen in found
        if said is not None and seen is not None and said != seen
    ]


def _lora(infos: Mapping[str, TensorInfo]) -> Kind:
    ranks = sorted({min(info.shape) for name, info in infos.items() if DOWN.search(name) and len(info.shape) >= 2})
    blocks = _blocks(infos, "transformer_blocks")
    rank = Phrase("no plain ranks")
    if ranks:
        several = len(ranks) > 1
        rank = Phrase("rank {a} to {b}", a=ranks[0], b=ranks[-1]) if several else Phrase("rank {a}", a=ranks[0])
    return Kind("lora", Phrase("{rank}, {count} blocks", rank=rank, count=blocks) if blocks else rank)


def _blockwise(bare: Mapping[str, TensorInfo]) -> Kind | None:
    """DiffSynth's ControlNets."""
    if "controlnet_blocks.0.y_rms.weight" not in bare or "img_in.weight" not in bare:
        return None
    what = Phrase("blockwise, {count} blocks", count=_blocks(bare, "controlnet_blocks"))
    return Kind("controlnet", _with_mask(what, bare, "img_in.weight"))


def _chain(bare: Mapping[str, TensorInfo]) -> Kind | None:
    """VideoX-Fun's ControlNets: Qwen-Image's, whose blocks have a modulation each, and Qwen-Image-2.1's."""
    newer = "control_blocks.0.img_mlp.out.weight" in bare
    if "control_img_in.weight" not in bare or not (newer or "control_blocks.0.img_mod.1.weight" in bare):
        return None
    what = Phrase("a chain of {count} blocks", count=_blocks(bare, "control_blocks"))
    release = "qwen-image-2.1" if newer else None
    return Kind("controlnet", _with_mask(what, bare, "control_img_in.weight"), release)


def _with_mask(what: Phrase, bare: Mapping[str, TensorInfo], entrance: str) -> Phrase:
    """The mask of a net that repaints are 4 channels beyond the latents' 16 by 4, or beyond twice as many; or one."""
    channels = _side({name: info.shape for name, info in bare.items()}, entrance, 1) or 0
    return Phrase("{what}, reads a mask", what=what) if channels % 16 else what


def _transformer(bare: Mapping[str, TensorInfo]) -> Kind | None:
    if "txt_in.text_norm.weight" in bare and "modulation.1.weight" in bare:
        count = _blocks(bare, "transformer_blocks")
        return Kind("transformer", Phrase("{count} blocks of one stream", count=count), "qwen-image-2.1")
    if "transformer_blocks.0.img_mod.1.weight" not in bare or "txt_norm.weight" not in bare:
        return None
    blocks = _blocks(bare, "transformer_blocks")
    plain = Phrase("{count} blocks", count=blocks)
    if any(name.startswith(("controlnet_blocks.", "controlnet_x_embedder.")) for name in bare):
        return Kind("controlnet", _with_mask(plain, bare, "controlnet_x_embedder.weight"))
    if "time_text_embed.addition_t_embedding.weight" in bare:
        return Kind("transformer", Phrase("{count} blocks, layered", count=blocks), "qwen-image-layered")
    if ZERO_COND_T in bare:
        return Kind("transformer", Phrase("{count} blocks, clean references", count=blocks), "qwen-image-edit-2511")
    return Kind("transformer", plain)


def _vae(bare: Mapping[str, TensorInfo]) -> Kind | None:
    shape = {name: info.shape for name, info in bare.items()}
    if "quant_conv.weight" in shape and "decoder.conv_in.weight" in shape:
        return Kind("vae", Phrase("{count} colour channels", count=_side(shape, "encoder.conv_in.weight", 1)))
    if set(WAN_VAE) <= set(shape):
        count = _side(shape, "encoder.conv1.weight", 1)
        return Kind("vae", Phrase("{count} colour channels, Wan's tensor names", count=count))
    return None


def _text_encoder(bare: Mapping[str, TensorInfo]) -> Kind | None:
    layers = _blocks(bare, "layers")
    if not layers and "visual.blocks.0.norm1.weight" in bare:  # GGUF keeps the half that sees in a file of its own
        alone = Phrase("its picture reader alone, {count} blocks", count=_blocks(bare, "blocks"))
        return Kind("text_encoder", alone)
    if not layers or not any(name.endswith("layers.0.self_attn.q_proj.weight") for name in bare):
        return None
    sees = any(name.split(".")[0] == "visual" or ".visual." in name for name in bare)
    if sees:
        return Kind("text_encoder", Phrase("{count} layers, reads pictures", count=layers))
    return Kind("text_encoder", Phrase("{count} layers, no picture reader", count=layers))


def _blocks(names: Iterable[str], stem: str) -> int:
    """Highest index after `stem` plus one; vision towers, which have `blocks`, don't count."""
    found = (re.search(rf"(?:^|[._]){stem}[._](\d+)[._]", name) for name in names)
    return max((int(match[1]) + 1 for match in found if match), default=0)


def _side(shape: Mapping[str, tuple[int, ...]], ending: str, axis: int) -> int | None:
    """One side of the tensor whose name ends so; None where there is none."""
    for name, sides in shape.items():
        if (name == ending or name.endswith("." + ending)) and len(sides) > axis:
            return sides[axis]
    return None


def _strip(name: str) -> str:
    """The official name of a tensor that carries a file format's prefix."""
    for prefix in PREFIXES:
        if name.startswith(prefix):
            return name.removeprefix(prefix)
    return name
