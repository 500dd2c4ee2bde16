"""What GGUF files call our tensors, and the configs that their metadata amounts to; no torch.

Transformers keep the official names, perhaps under ComfyUI's prefix. Qwen2.5-VL goes by llama.cpp's names, in two
files: the language model, and an "mmproj" file with the vision tower, whose joint tensors are stored in pieces (the
projection to queries, keys and values in three, the patch convolution's two moments in two). Rows are never permuted
and norms never shifted for this family. Files that stable-diffusion.cpp wrote keep the official names here too.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from lanting.weights.gguf import GgufHeader
from lanting.weights.headers import TensorInfo

PREFIXES = ("model.diffusion_model.", "diffusion_model.")
LANGUAGE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
VISION = {"v.post_ln": "visual.merger.ln_q", "mm.0": "visual.merger.mlp.0", "mm.2": "visual.merger.mlp.2"}
BLOCK = {
    "ln1": "norm1",
    "ln2": "norm2",
    "attn_qkv": "attn.qkv",
    "attn_out": "attn.proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
QKV = ("attn_q", "attn_k", "attn_v")
PATCHES = ("v.patch_embd.weight", "v.patch_embd.weight.1")
PROJECTOR = "qwen2.5vl_merger"


@dataclass(frozen=True, slots=True)
class Pieces:
    """A tensor of ours that a file stores in parts, to be put together along `axis`: 0 joins rows, 2 stacks."""

    names: tuple[str, ...]
    axis: int


def official(name: str) -> str:
    """Our name for one tensor of any of these files; names that need no change pass."""
    for prefix in PREFIXES:
        if name.startswith(prefix):
            return name.removeprefix(prefix)
    stem, _, ending = name.rpartition(".")
    if stem in LANGUAGE or stem in VISION:
        return f"{LANGUAGE.get(stem) or VISION[stem]}.{ending}"
    if (layer := re.fullmatch(r"blk\.(\d+)\.(\w+)", stem)) and layer[2] in LAYER:
        return f"model.layers.{layer[1]}.{LAYER[layer[2]]}.{ending}"
    if (block := re.fullmatch(r"v\.blk\.(\d+)\.(\w+)", stem)) and block[2] in BLOCK:
        return f"visual.blocks.{block[1]}.{BLOCK[block[2]]}.{ending}"
    return name


def joined(names: Iterable[str]) -> dict[str, Pieces]:
    """Our tensors that these names hold in pieces; a tensor that lacks a piece is left alone, to be named as it is."""
    have = set(names)
    found: dict[str, Pieces] = {}
    if have.issuperset(PATCHES):
        found["visual.patch_embed.proj.weight"] = Pieces(PATCHES, 2)
    for name in have:
        if match := re.fullmatch(r"v\.blk\.(\d+)\.attn_q\.(weight|bias)", name):
            parts = tuple(f"v.blk.{match[1]}.{part}.{match[2]}" for part in QKV)
            if have.issuperset(parts):
                found[f"visual.blocks.{match[1]}.attn.qkv.{match[2]}"] = Pieces(parts, 0)
    return found


def text_config(header: GgufHeader) -> dict[str, Any]:
    """The language half of a config.json, from a `qwen2vl` file; empty where its metadata does not hold one."""
    about = {key.partition(".")[2]: header.number(key) for key in header.metadata if key.startswith("qwen2vl.")}
    table = header.tensors.get("token_embd.weight")
    wanted = {
        "hidden_size": "embedding_length",
        "intermediate_size": "feed_forward_length",
        "num_hidden_layers": "block_count",
        "num_attention_heads": "attention.head_count",
        "num_key_value_heads": "attention.head_count_kv",
    }
    if table is None or len(table.shape) != 2 or any(about.get(key) is None for key in wanted.values()):
        return {}
    config: dict[str, Any] = {ours: int(about[key] or 0) for ours, key in wanted.items()}
    config |= {"vocab_size": table.shape[0], "tie_word_embeddings": "output.weight" not in header.tensors}
    if eps := about.get("attention.layer_norm_rms_epsilon"):
        config["rms_norm_eps"] = float(f"{eps:.6g}")  # float32 in the file
    rope: dict[str, Any] = {"rope_theta": about["rope.freq_base"]} if about.get("rope.freq_base") else {}
    sections = header.metadata.get("qwen2vl.rope.dimension_sections")
    if isinstance(sections, tuple) and len(sections) >= 3 and all(isinstance(side, int) for side in sections):
        rope["mrope_section"] = list(sections[:3])
    return config | {"rope_parameters": rope}


def vision_config(header: GgufHeader) -> dict[str, Any]:
    """The vision half, from an mmproj file: counts from its metadata, sizes from its tensors."""
    shapes = {name: info.shape for name, info in header.tensors.items()}
    patch, gate = shapes.get(PATCHES[0]), shapes.get("v.blk.0.ffn_gate.weight")
    out, heads = shapes.get("mm.2.weight"), header.number("clip.vision.attention.head_count")
    if not (patch and len(patch) == 4 and gate and out and heads):
        return {}
    depth = 1 + max(int(m[1]) for name in shapes if (m := re.match(r"v\.blk\.(\d+)\.", name)))
    if depth > len(shapes):  # a block has tensors
        return {}
    every = int(header.number("clip.vision.n_wa_pattern") or 8)  # every so many blocks see the whole picture
    return {
        "depth": depth,
        "hidden_size": patch[0],
        "intermediate_size": gate[0],
        "num_heads": int(heads),
        "out_hidden_size": out[0],
        "in_channels": patch[1],
        "patch_size": patch[2],
        "fullatt_block_indexes": [index for index in range(depth) if (index + 1) % max(1, every) == 0],
    }


def is_projector(header: GgufHeader) -> bool:
    """Whether this is the vision tower of Qwen2.5-VL (an "mmproj" file)."""
    kinds = {header.metadata.get(key) for key in ("clip.projector_type", "clip.vision.projector_type")}
    return header.architecture == "clip" and (PROJECTOR in kinds or "v.blk.0.ffn_gate.weight" in header.tensors)


def joint_info(parts: Iterable[TensorInfo], axis: int) -> TensorInfo | None:
    """The entry of a tensor in pieces: its bytes count from where the first piece begins. None where they don't fit."""
    pieces = list(parts)
    first = pieces[0]
    end = first.start + sum(piece.size for piece in pieces)
    rows, *rest = first.shape or (0,)
    if axis:
        same = all(piece.shape == first.shape for piece in pieces)
        fits, shape = same and len(first.shape) >= axis, (*first.shape[:axis], len(pieces), *first.shape[axis:])
    else:
        fits = bool(first.shape) and all(list(piece.shape[1:]) == rest for piece in pieces)
        rows = sum(piece.shape[0] for piece in pieces) if fits else rows
        shape = (rows, *rest)
    dtype = first.dtype if all(piece.dtype == first.dtype for piece in pieces) else "F32"
    return TensorInfo(dtype, shape, first.start, end) if fits else None
