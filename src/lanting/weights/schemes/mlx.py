"""What MLX writes, and mflux and mlx-vlm with it: names, kernels and packed weights, told from headers, without torch.

A packed weight is `X.weight`, 32-bit words of codes one behind the other from the lowest bit on, with `X.scales` and
`X.biases` for each group of inputs: value = code x scale + bias, what `nn.affine.AffineLinear` holds. MLX's other modes
have bytes for scales and no biases. mflux saves its own modules' names and no config.json; kernels have their channels
last; tables that a module only computes are saved, too. Sources: mlx 0.32 (`nn.quantize`), mflux 0.24 (its weight
definitions and mappings; versions before 0.11 had `img_norm1.mod_linear`), mlx-vlm.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

from lanting.weights.form import Form
from lanting.weights.headers import TensorInfo
from lanting.weights.schemes.foreign import PACKING, contradicts, packing_of

if TYPE_CHECKING:
    from lanting.weights.checkpoint import Checkpoint

MLX = "MLX"
SIDES = ("scales", "biases")
GROUP, GROUPS, BITS = 64, (64, 32, 128), (2, 3, 4, 5, 6, 8)  # inputs that share a scale: MLX's usual, and all
MODES = {128: ("fp4", 32), 64: ("nvfp4", 16), 256: ("mxfp8", 32)}  # bits of a group -> mxfp4 and its like
FLOATS = ("nvfp4", "mxfp8")  # whose groups are always as large
Parts = tuple[tuple[str, str], ...]  # patterns and what they become, in this order

NETWORK: Parts = (
    (r"(transformer_blocks\.\d+\.)(img|txt)_(?:norm1\.)?mod_linear\.", r"\1\2_mod.1."),
    (r"(transformer_blocks\.\d+\.)(img|txt)_ff\.mlp_in\.", r"\1\2_mlp.net.0.proj."),
    (r"(transformer_blocks\.\d+\.)(img|txt)_ff\.mlp_out\.", r"\1\2_mlp.net.2."),
    (r"\.attn\.attn_to_out\.", ".attn.to_out."),
    (r"^modulation\.layers\.", "modulation."),
)
CODEC: Parts = (
    (r"\.conv3d\.", "."),
    (r"^decoder\.up_block(\d)", r"decoder.up_blocks.\1"),
    (r"\.skip_conv\.", ".conv_shortcut."),
    (r"\.resample_conv\.", ".resample.1."),
    (r"\.(norm\d?|norm_out)\.weight$", r".\1.gamma"),
)
CODEC_21: Parts = (
    (r"(down|up)sampler\.conv\.", r"\1sampler.resample.1."),
    (r"\.conv\.", "."),
    (r"\.(norm\d?|norm_out)\.weight$", r".\1.gamma"),
)
DOWN = re.compile(r"encoder\.down_blocks\.(\d+)\.(resnets|downsamplers)\.(\d+)\.")
READER: Parts = (
    (r"^language_model\.lm_head\.", "lm_head."),
    (r"^(?:language_model\.model|language_model|encoder)\.(?!visual\.)", "model."),
    (r"^(?:layers|embed_tokens|norm)\.", r"model.\g<0>"),
    (r"^(?:encoder\.visual|vision_tower)\.", "visual."),
    (r"\.merger\.mlp_0\.", ".merger.mlp.0."),
    (r"\.merger\.mlp_1\.", ".merger.mlp.2."),
)
COMPUTED = re.compile(r"(^|\.)inv_freq$|^time_text_embed\.time_proj\.|^pos_embed\.")  # what no network stores
SIGNS = {  # names that only MLX's files have: what they are of
    "transformer_blocks.0.attn.attn_to_out.0.weight": NETWORK,
    "modulation.layers.1.weight": NETWORK,
    "time_text_embed.time_proj.freqs": NETWORK,
    "decoder.conv_in.conv3d.weight": CODEC,
    "decoder.conv_in.conv.weight": CODEC_21,
    "encoder.embed_tokens.weight": READER,
    "embed_tokens.weight": READER,
    "language_model.embed_tokens.weight": READER,
    "language_model.model.embed_tokens.weight": READER,
}
KERNELS = ("decoder.conv_in.weight", "visual.patch_embed.proj.weight")  # square in their last two axes, with us
LOST = "norm_out.linear.bias"  # mflux 0.16 to 0.21 saved none of the older releases' and drew as if it were 0


def translated(checkpoint: Checkpoint) -> Checkpoint:
    """The same tensors under our names and with kernels in our order; untouched where they are not MLX's. Raises
    ModelError where two have the same name then."""
    rules = next((rules for sign, rules in SIGNS.items() if sign in checkpoint.infos), ())
    if not rules and not any(_channels_last(checkpoint.infos.get(name)) for name in KERNELS):
        return checkpoint
    rename = _renaming(rules, checkpoint.infos)
    names: dict[str, str] = {}
    for theirs in checkpoint.infos:
        if not COMPUTED.search(theirs) and names.setdefault(rename(theirs), theirs) != theirs:
            raise contradicts(checkpoint, theirs, names[rename(theirs)])
    found = checkpoint.renamed(names)
    infos, where = dict(found.infos), dict(found.where)
    if any(_channels_last(infos.get(name)) for name in KERNELS):
        infos = {name: _channels_second(info) for name, info in infos.items()}
    last = infos.get("norm_out.linear.weight")
    if rules is NETWORK and "img_in.bias" in infos and last is not None and LOST not in infos:
        infos[LOST], where[LOST] = TensorInfo("BF16", last.shape[:1], 0, 0), where["norm_out.linear.weight"]
    table = {rename(f"{name}.")[:-1]: said for name, said in packing_of(checkpoint).items()}
    notes = {PACKING: json.dumps(table)} if table else {}
    return replace(found, infos=infos, where=where, metadata={**found.metadata, **notes})


def packed(checkpoint: Checkpoint, path: str) -> Form | None:
    """How the weight of `path` is packed; None where that is not MLX's way, or its parts can't be."""
    words, scales, biases = (checkpoint.infos.get(f"{path}.{part}") for part in ("weight", *SIDES))
    if words is None or words.dtype != "U32" or scales is None or len(words.shape) != 2 or len(scales.shape) != 2:
        return None
    rows, groups = scales.shape
    bits = words.shape[1] * 32 // groups if groups else 0  # of a group
    if rows != words.shape[0] or not groups or words.shape[1] * 32 % groups:
        return None
    names = {"weight": f"{path}.weight", "weight_scale": f"{path}.scales"}
    if biases is None:
        kind, group = MODES.get(bits, ("", 0)) if scales.dtype == "U8" else ("", 0)
        own = 0 if kind in FLOATS else group
        shape = rows, groups * group
        return Form(kind, shape, (rows, groups), own, names=names, layout=MLX) if kind else None
    asked = _group(checkpoint, path)
    group = next((size for size in ((asked,) if asked else GROUPS) if bits in [size * each for each in BITS]), 0)
    if not group or biases.shape != scales.shape or {biases.dtype, scales.dtype} - {"F16", "BF16", "F32"}:
        return None
    names["weight_offset"] = f"{path}.biases"
    kind, shape = f"uint{bits // group}", (rows, groups * group)
    return Form(kind, shape, (rows, groups), group, names=names, layout=MLX)


def _renaming(rules: Parts, names: Iterable[str]) -> Callable[[str], str]:
    """Their name -> ours. The encoder of the older VAE is one row of parts with us: so many ResNets, a resampler."""
    places = [int(found[3]) for name in names if (found := DOWN.match(name)) and found[2] == "resnets"]
    per_block = max(places, default=-1) + 2

    def rename(name: str) -> str:
        if rules is CODEC and (place := DOWN.match(name)):
            within = int(place[3]) if place[2] == "resnets" else per_block - 1
            name = f"encoder.down_blocks.{int(place[1]) * per_block + within}.{name[place.end() :]}"
        for pattern, ours in rules:
            name = re.sub(pattern, ours, name)
        return name

    return rename


def _channels_last(info: TensorInfo | None) -> bool:
    return info is not None and len(info.shape) in (4, 5) and info.shape[-1] != info.shape[-2]


def _channels_second(info: TensorInfo) -> TensorInfo:
    """A kernel (out, ..., in) as (out, in, ...); other tensors as they are."""
    last = len(info.shape) - 1
    if last < 3:
        return info
    axes = (0, last, *range(1, last))
    return replace(info, shape=tuple(info.shape[axis] for axis in axes), axes=axes)


def _group(checkpoint: Checkpoint, path: str) -> int:
    """Inputs that share a scale, as the folder's config says it of this weight or of all; 0: it says nothing."""
    table = packing_of(checkpoint)
    own = table.get(path)
    said = own.get("group_size") if isinstance(own, dict) else table.get("group_size")
    return said if isinstance(said, int) and said in GROUPS else 0
