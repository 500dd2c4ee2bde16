"""The dialects of LoRA files: which change of which layer a tensor's name speaks of. No torch.

A name is a prefix, a layer, and a role. Prefixes are wrappers of the program that wrote the file and say nothing;
behind some of them the layer's dots are written as underscores, which is read back through the model's own names, so
nothing is guessed. Rejected: one table per dialect, because tools mix prefixes and roles freely. What is in use:

    diffusers         transformer.transformer_blocks.0.attn.to_q.lora_A.weight, .lora_B.weight; or .lora.down.weight
    PEFT              base_model.model.transformer_blocks.0.attn.to_q.lora_A.weight
    DiffSynth         [pipe.dit.]transformer_blocks.0.attn.to_q.lora_A.default.weight
    Lightning         transformer_blocks.0.attn.to_q.lora_down.weight, .lora_up.weight, .alpha
    ai-toolkit        diffusion_model.transformer_blocks.0.attn.to_q.lora_A.weight
    ComfyUI           diffusion_model.transformer_blocks.0.attn.to_q.lora_down.weight, .alpha; .diff, .diff_b
    Kohya, musubi     lora_unet_transformer_blocks_0_attn_to_q.lora_down.weight, .alpha
    LyCORIS           lycoris_transformer_blocks_0_attn_to_q.lokr_w1, .lokr_w2_a, .hada_w1_a, .dora_scale, .alpha
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import accumulate

PREFIXES = (
    "base_model.model.",
    "model.diffusion_model.",
    "diffusion_model.",
    "transformer.",
    "pipe.dit.",
    "dit.",
    "module.",
)
FLAT = ("lora_unet_", "lora_transformer_", "lycoris_")  # behind these, dots are written as underscores
ROLES = (
    (r"lora_(?:A|down)(?:\.\w+)?\.weight|lora(?:_linear_layer)?\.down\.weight", "down"),
    (r"lora_(?:B|up)(?:\.\w+)?\.weight|lora(?:_linear_layer)?\.up\.weight", "up"),
    (r"(?:lora_(?:B|up)(?:\.\w+)?\.bias)", "up_bias"),
    (r"dora_scale|lora_magnitude_vector(?:\.\w+)?", "magnitude"),
    (r"(lokr_w[12](?:_[ab])?|hada_w[12]_[ab])(?:\.\w+)?", ""),  # called what they are
    (r"alpha", "alpha"),
    (r"diff", "diff"),
    (r"diff_b", "bias"),
)
PATTERNS = tuple((re.compile(rf"(?P<layer>.+)\.(?:{pattern})"), role) for pattern, role in ROLES)
TEXT = re.compile(r"(?:base_model\.model\.)?(text_encoders?\b|text_model\b|lora_te\d?_|conditioner\.|te\d?\.)")
STRANGE = re.compile(  # changes that exist, and are none of ours: Tucker cores, rotations, GLoRA, whole biases, norms
    r"\.(lokr_t2|hada_t[12]|lora_mid\.weight|b?oft_\w+|[ab][12]\.weight|[wb]_norm|set_weight|lora_(A|down)(\.\w+)?\.bias)$"
)
FUSED = {  # several Linears written as one, row under row
    "to_qkv": ("to_q", "to_k", "to_v"),
    "add_qkv_proj": ("add_q_proj", "add_k_proj", "add_v_proj"),
    "to_added_qkv": ("add_q_proj", "add_k_proj", "add_v_proj"),
    "gate_up": ("gate_layer", "proj"),  # of Qwen-Image-2.1
}
Sides = Mapping[str, tuple[int, int]]
"""Path -> (out, in) of every Linear of a transformer."""


@dataclass(frozen=True, slots=True)
class Name:
    """A tensor's name taken apart."""

    prefix: str  # what stood before the layer, for telling dialects apart
    layer: str
    role: str  # down, up, alpha, magnitude, up_bias, diff, bias, lokr_w1, lokr_w2_a, hada_w1_a, ...
    flat: bool = False  # the layer's dots are underscores


@dataclass(frozen=True, slots=True)
class Target:
    """A Linear that a layer's name means, and which rows of the file's tensors are its own (None: all)."""

    path: str
    rows: tuple[int, int] | None = None
    height: int = 0  # rows of the file's tensors, where they are shared


def parse(key: str) -> Name | None:
    """The parts of a tensor's name; None where it has no role that a LoRA knows."""
    found = ((match, role) for pattern, role in PATTERNS if (match := pattern.fullmatch(key)))
    match, role = next(found, (None, ""))
    if match is None:
        return None
    layer = match["layer"]
    while stripped := next((layer.removeprefix(p) for p in PREFIXES if layer.startswith(p)), ""):
        layer = stripped
    flat = next((p for p in FLAT if layer.startswith(p)), "")
    prefix = key[: key.index(layer)] + flat
    return Name(prefix, layer.removeprefix(flat), role or match[2], bool(flat))


class Layers:
    """The Linears of a model under every name that files give them."""

    def __init__(self, linears: Sides):
        self.linears = linears
        self.dotted: dict[str, tuple[Target, ...]] = {path: (Target(path),) for path in linears}
        for path in linears:
            parent, _, last = path.rpartition(".")
            if last in ("to_q", "add_q_proj", "gate_layer"):
                self.dotted |= self._fused(f"{parent}." if parent else "", last)
            if last == "0" and parent not in linears:  # DiffSynth's first version has attn.to_out without an index
                self.dotted[parent] = (Target(path),)
        self.flat = {name.replace(".", "_"): targets for name, targets in self.dotted.items()}

    def _fused(self, parent: str, first: str) -> dict[str, tuple[Target, ...]]:
        found: dict[str, tuple[Target, ...]] = {}
        for name, parts in FUSED.items():
            if parts[0] == first and all(f"{parent}{part}" in self.linears for part in parts):
                heights = [self.linears[f"{parent}{part}"][0] for part in parts]
                ends = list(accumulate(heights))
                found[f"{parent}{name}"] = tuple(
                    Target(f"{parent}{part}", (end - height, end), ends[-1])
                    for part, height, end in zip(parts, heights, ends, strict=True)
                )
        return found

    def find(self, name: Name) -> tuple[Target, ...]:
        """The Linears a name means; none where the model has no such layer."""
        return (self.flat if name.flat else self.dotted).get(name.layer, ())


def dialect_of(keys: Iterable[str]) -> str:
    """Which program's way of writing this is; "mixed" where the names do not agree."""
    names = [name for key in keys if (name := parse(key)) is not None]
    found = {_dialect(name, key) for key in keys if (name := parse(key)) is not None}
    found.discard("")
    if not names:
        return "unknown"
    if not found:  # names without any sign of their own
        return "LyCORIS" if any(name.role.startswith(("lokr", "hada")) for name in names) else "bare"
    if found == {"Lightning", "ComfyUI"}:
        return "ComfyUI"
    return found.pop() if len(found) == 1 else "mixed"


def _dialect(name: Name, key: str) -> str:
    """The dialect that one name speaks; "" where it could be several."""
    old = ".lora.down." in key or ".lora.up." in key
    halves = "down" in key or ".lora_up" in key
    if name.flat:
        return "LyCORIS" if name.prefix.endswith("lycoris_") else "Kohya (musubi-tuner)"
    if name.role not in ("down", "up"):
        return ""
    if name.prefix.startswith("base_model."):
        return "PEFT"
    if name.prefix.startswith(("pipe.dit.", "dit.")) or re.search(r"lora_[AB]\.\w+\.weight", key):
        return "DiffSynth"
    if "diffusion_model." in name.prefix:
        return "ComfyUI" if halves else "ai-toolkit"
    if name.prefix.startswith("transformer."):
        return "diffusers" if old or not halves else "OneTrainer"
    return "diffusers" if old else "Lightning" if halves else "PEFT without a prefix"
