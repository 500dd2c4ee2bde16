"""Which release a folder is, told from its JSON files alone. A pure function: the caller reads the files.

The configs tell text-to-image, edit, edit-plus and layered apart; releases that differ only in weights
(Qwen-Image and 2512, Edit-2509 and its descendants) are told by name, and when no name helps the older one
is assumed, whose defaults suit both.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lanting.core.errors import ModelError

# pipeline class -> releases it may be, the assumed one first
BY_CLASS: dict[str, tuple[str, ...]] = {
    "QwenImagePipeline": ("qwen-image", "qwen-image-2512", "nano"),
    "QwenImageImg2ImgPipeline": ("qwen-image", "qwen-image-2512", "nano"),
    "QwenImageInpaintPipeline": ("qwen-image", "qwen-image-2512", "nano"),
    "QwenImageControlNetPipeline": ("qwen-image", "qwen-image-2512"),
    "QwenImageControlNetInpaintPipeline": ("qwen-image", "qwen-image-2512"),
    "QwenImageEditPipeline": ("qwen-image-edit",),
    "QwenImageEditInpaintPipeline": ("qwen-image-edit",),
    "QwenImageEditPlusPipeline": ("qwen-image-edit-2509", "qwen-image-edit-2511", "nano"),
    "QwenImageLayeredPipeline": ("qwen-image-layered",),
    "QwenImage21Pipeline": ("qwen-image-2.1", "qwen-image-2.1-turbo"),
}
SINGLE_STREAM = "QwenImage21Transformer2DModel"  # the transformer of 2.1


def detect(
    model_index: Mapping[str, Any],
    transformer: Mapping[str, Any],
    vae: Mapping[str, Any] | None = None,
    hint: str = "",
) -> str:
    """The release's name, for `get_spec`.

    model_index  model_index.json, {} where there is none
    transformer  transformer/config.json
    vae          vae/config.json
    hint         the folder's or the repository's name; decides only between releases the configs can't tell
    apart

    Raises ModelError for another family and for configs that contradict one another.
    """
    _check_family(model_index, transformer)
    if transformer.get("_class_name") == SINGLE_STREAM:
        few = "turbo" if model_index.get("sample_sigmas") else hint
        return _by_name(BY_CLASS["QwenImage21Pipeline"], few)
    if _layered(transformer, vae or {}):
        return "qwen-image-layered"
    name = str(model_index.get("_class_name", ""))
    if name == "QwenImageLayeredPipeline":
        raise ModelError("this folder calls itself layered, but its transformer and VAE are not: is it mixed up?")
    if transformer.get("zero_cond_t"):
        return "qwen-image-edit-2511"
    candidates = BY_CLASS.get(name) or _without_index(model_index)
    # the flag is what 2511 is; a folder that lost it would load and draw badly, so the name may not claim it
    return _by_name(candidates, hint, str(model_index.get("_name_or_path", "")))


def _check_family(model_index: Mapping[str, Any], transformer: Mapping[str, Any]) -> None:
    pipeline = str(model_index.get("_class_name", "QwenImagePipeline"))
    kind = str(transformer.get("_class_name", "QwenImageTransformer2DModel"))
    if not pipeline.startswith("QwenImage") or kind not in ("QwenImageTransformer2DModel", SINGLE_STREAM):
        other = pipeline if not pipeline.startswith("QwenImage") else kind
        raise ModelError("this folder holds a {kind}, which is not of the Qwen-Image family", kind=other)
    if (kind == SINGLE_STREAM) != (pipeline == "QwenImage21Pipeline") and "_class_name" in model_index:
        raise ModelError(
            "this folder's pipeline is {pipeline}, but its transformer a {kind}: is it mixed up?",
            pipeline=pipeline,
            kind=kind,
        )


def _layered(transformer: Mapping[str, Any], vae: Mapping[str, Any]) -> bool:
    rope, channels = bool(transformer.get("use_layer3d_rope")), vae.get("input_channels", 4)
    if rope and channels != 4:
        raise ModelError("the transformer is a layered one, but the VAE has {count} channels, not 4", count=channels)
    return rope


def _without_index(model_index: Mapping[str, Any]) -> tuple[str, ...]:
    """No pipeline class to go by: a picture processor marks an edit release."""
    if "processor" in model_index:
        return ("qwen-image-edit-2509", "qwen-image-edit", "qwen-image-edit-2511")
    return ("qwen-image", "qwen-image-2512", "nano")


def _by_name(candidates: tuple[str, ...], *hints: str) -> str:
    """The candidate whose distinguishing ending ("2512", "nano") occurs in a hint; else the first."""
    for hint in hints:
        words = hint.lower().replace("_", "-").replace("/", "-").replace(".", "-").split("-")
        for name in candidates[1:]:
            if name.rsplit("-", 1)[-1] in words:
                return name
    return candidates[0]
