"""Writing Qwen2.5-VL as others expect it in GGUF: the language model, and the vision tower in an "mmproj" file.

Names, joint tensors in pieces and metadata are those of llama.cpp's converter, which ComfyUI-GGUF and
stable-diffusion.cpp read as well; the reverse of `gguf_names`. The types follow llama.cpp's mixes:

    tensor                            type               why
    one side                          F32                norms and biases, which readers want exact
    attn_v, ffn_down of every third   the mix's `value`  what attention copies, and the inputs with outliers; the first
      layer and the outer quarters      and `down`       and last layers change most
    output                            Q6_K, or Q8_0      chooses single words
    the vision tower                  F16                 8 % of the weights, with outliers, in rows no block fills
    everything else                   `base`
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lanting.core.errors import ModelError
from lanting.weights.gguf_mix import MIXES, Mix, fitting
from lanting.weights.gguf_names import BLOCK, LANGUAGE, LAYER, PATCHES, PROJECTOR, QKV, VISION
from lanting.weights.gguf_write import Entry, Report, Value, write_gguf

Shapes = Mapping[str, tuple[int, ...]]
Read = Callable[[str], Tensor]
MEAN, SPREAD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]  # of CLIP's pictures
NORMAL, CONTROL, USER, UNUSED = 1, 3, 4, 5  # what llama.cpp calls kinds of tokens


def write_text_encoder(
    path: Path, shapes: Shapes, read: Read, mix: str, about: Mapping[str, Any], report: Report | None = None
) -> Path | None:
    """Write `path` and, where the model sees, "mmproj-" and its name beside it; returns the latter.

    shapes, read  official name -> shape, values
    about         `config` (config.json) and, for programs that bring no tokenizer, `tokenizer`: the folder of one

    Raises ModelError for weights that can't be written, OutputError for a place that can't.
    """
    config = about["config"]
    text = config.get("text_config") or config
    seen = {name: shape for name, shape in shapes.items() if name.startswith("visual.")}
    beside = path.with_name(f"mmproj-{path.name}") if seen else None
    if beside is not None:
        vision = list(_vision_entries(seen, read))
        write_gguf(beside, _vision_notes(config.get("vision_config") or {}, seen), vision, report)
    words = {name: shape for name, shape in shapes.items() if name not in seen}
    layers = int(text["num_hidden_layers"])
    entries = [
        Entry(stored, shape, language_type(stored, shape, MIXES[mix], layers), lambda name=name: read(name))
        for name, shape in words.items()
        for stored in [_language_name(name)]
    ]
    own: dict[str, Value] = {"lanting.mix": mix, "lanting.config": json.dumps(dict(config), sort_keys=True)}
    notes = _language_notes(text, mix) | own | _tokens(about.get("tokenizer"), int(text["vocab_size"]))
    write_gguf(path, notes, entries, report)
    return beside


def language_type(stored: str, shape: tuple[int, ...], mix: Mix, layers: int) -> str:
    """The block type of a tensor of the language model, by llama.cpp's name for it."""
    plain = "F16" if mix.base == "F16" else "BF16"
    if len(shape) < 2:
        return "F32"
    kind, parts = mix.base, stored.split(".")
    if parts[0] == "output" and mix.base.endswith("_K"):
        kind = "Q6_K"
    elif parts[0] == "blk":
        layer, outer = int(parts[1]), layers // 8
        more = layer < outer or layer >= 7 * layers // 8 or (layer - outer) % 3 == 2
        better = {"attn_v": mix.value, "ffn_down": mix.down}.get(parts[2], "")
        kind = better if more and better else kind
    return fitting(kind, shape[-1], plain)


def _language_name(name: str) -> str:
    stem, _, ending = name.rpartition(".")
    outside = {ours: theirs for theirs, ours in LANGUAGE.items()}
    inside = {ours: theirs for theirs, ours in LAYER.items()}
    if stem in outside:
        return f"{outside[stem]}.{ending}"
    head, _, rest = stem.removeprefix("model.layers.").partition(".")
    if not stem.startswith("model.layers.") or rest not in inside:
        raise _misplaced(name)
    return f"blk.{head}.{inside[rest]}.{ending}"


def _misplaced(name: str) -> ModelError:
    return ModelError("{name} has no place in a GGUF file of Qwen2.5-VL: the model is of another kind", name=name)


def _vision_entries(seen: Shapes, read: Read) -> Iterator[Entry]:
    """The tower's tensors; those that the format splits are read once for each piece."""
    outside = {ours: theirs for theirs, ours in VISION.items()}
    inside = {ours: theirs for theirs, ours in BLOCK.items()}
    for name, shape in seen.items():
        stem, _, ending = name.rpartition(".")
        kind, rows = "F32" if ending == "bias" or "norm" in stem or "ln_q" in stem else "F16", shape[0]
        head, _, inner = stem.removeprefix("visual.blocks.").partition(".")
        if stem == "visual.patch_embed.proj":
            for place, stored in enumerate(PATCHES):
                values = lambda name=name, place=place: read(name)[:, :, place].contiguous()  # noqa: E731
                yield Entry(stored, (*shape[:2], *shape[3:]), kind, values)
        elif inner == "attn.qkv":
            for place, stored in enumerate(QKV):
                values = lambda name=name, place=place: read(name).chunk(3)[place]  # noqa: E731
                yield Entry(f"v.blk.{head}.{stored}.{ending}", (rows // 3, *shape[1:]), kind, values)
        elif stem in outside or inner in inside:
            stored = outside.get(stem) or f"v.blk.{head}.{inside[inner]}"
            yield Entry(f"{stored}.{ending}", shape, kind, lambda name=name: read(name))
        else:
            raise _misplaced(name)


def _language_notes(text: Mapping[str, Any], mix: str) -> dict[str, Value]:
    rope = {**(text.get("rope_scaling") or {}), **(text.get("rope_parameters") or {})}
    return {
        "general.architecture": "qwen2vl",
        "general.type": "model",
        "general.name": "Qwen2.5-VL",
        "general.quantization_version": 2,
        "general.file_type": MIXES[mix].number,
        "qwen2vl.context_length": int(text.get("max_position_embeddings", 128000)),
        "qwen2vl.embedding_length": int(text["hidden_size"]),
        "qwen2vl.block_count": int(text["num_hidden_layers"]),
        "qwen2vl.feed_forward_length": int(text["intermediate_size"]),
        "qwen2vl.attention.head_count": int(text["num_attention_heads"]),
        "qwen2vl.attention.head_count_kv": int(text["num_key_value_heads"]),
        "qwen2vl.attention.layer_norm_rms_epsilon": float(text.get("rms_norm_eps", 1e-6)),
        "qwen2vl.rope.freq_base": float(rope.get("rope_theta", text.get("rope_theta", 1e6))),
        "qwen2vl.rope.dimension_sections": [*(int(side) for side in rope.get("mrope_section", (16, 24, 24))), 0],
    }


def _vision_notes(vision: Mapping[str, Any], seen: Shapes) -> dict[str, Value]:
    width, _, _, patch, _ = seen["visual.patch_embed.proj.weight"]
    return {
        "general.architecture": "clip",
        "general.type": "clip-vision",  # llama.cpp's new word, "mmproj", is refused by ComfyUI-GGUF of 2025
        "general.name": "Qwen2.5-VL",
        "general.quantization_version": 2,
        "general.file_type": MIXES["f16"].number,
        "clip.has_vision_encoder": True,
        "clip.projector_type": PROJECTOR,
        "clip.use_silu": True,
        "clip.vision.image_size": 560,
        "clip.vision.patch_size": patch,
        "clip.vision.embedding_length": width,
        "clip.vision.feed_forward_length": seen["visual.blocks.0.mlp.gate_proj.weight"][0],
        "clip.vision.projection_dim": seen["visual.merger.mlp.2.weight"][0],
        "clip.vision.block_count": int(vision.get("depth", 32)),
        "clip.vision.attention.head_count": int(vision.get("num_heads", 16)),
        "clip.vision.attention.layer_norm_epsilon": 1e-6,
        "clip.vision.spatial_merge_size": int(vision.get("spatial_merge_size", 2)),
        "clip.vision.n_wa_pattern": int(next(iter(vision.get("fullatt_block_indexes") or [7]))) + 1,
        "clip.vision.image_mean": MEAN,
        "clip.vision.image_std": SPREAD,
    }


def _tokens(folder: Path | None, count: int) -> dict[str, Value]:
    """The vocabulary, for programs that bring none; nothing where there is no tokenizer.json to take it from."""
    place = None if folder is None else folder / "tokenizer.json"
    if place is None or not place.is_file():
        return {}
    try:
        table = json.loads(place.read_text(encoding="utf-8"))
        ids: dict[str, int] = table["model"]["vocab"]
        merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in table["model"]["merges"]]
        added = {int(token["id"]): token for token in table.get("added_tokens", ())}
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ModelError(
            "{path} is not a readable tokenizer ({error}): download it again", path=str(place), error=str(error)
        ) from None
    words = [f"[PAD{number}]" for number in range(count)]
    kinds = [UNUSED] * count
    for word, number in ids.items():
        if number < count:
            words[number], kinds[number] = word, NORMAL
    for number, token in added.items():
        if number < count:
            words[number], kinds[number] = token["content"], CONTROL if token.get("special") else USER
    ends = {token["content"]: number for number, token in added.items()}
    notes: dict[str, Value] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": words,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.add_bos_token": False,
    }
    for key, word in (("eos", "<|im_end|>"), ("padding", "<|endoftext|>"), ("bos", "<|endoftext|>")):
        if word in ends:
            notes[f"tokenizer.ggml.{key}_token_id"] = ends[word]
    return notes
