"""What compressed-tensors (llm-compressor's format) writes, told from headers without torch.

    pack-quantized   codes (out, in b / 32 words), scales (out, groups), the shape as numbers, maybe zeros (out b / 32
                     words, groups) and the group of each input
    int-quantized    signed bytes and scales, as our int8; with zeros beside them they are codes of 8 bits
    nvfp4, mxfp4     codes (out, in / 2), scales in rows, for NVFP4 a number that divides them; NVIDIA's ModelOpt writes
                     the same with one that multiplies them
    mxfp8            8-bit floats with exponents for scales, in rows
float-quantized, and int-quantized without zeros, are what `weights.forms` reads anyway. Scales of inputs are left.
Source: compressed-tensors 0.20.1 (`compressors`), and versions before 0.12 for the groups of inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lanting.core.lang import Phrase
from lanting.weights.form import Form
from lanting.weights.schemes.foreign import MODELOPT, packing_of, unreadable
from lanting.weights.schemes.gptq import SCALES, WORD, held_bytes, misfits, numbers, order, signed

if TYPE_CHECKING:
    from lanting.weights.checkpoint import Checkpoint

COMPRESSED, BYTES, FLOATS = "compressed-tensors", "compressed-tensors int8", "compressed-tensors floats"
OPTIMIZED = "ModelOpt"
FACTOR = "weight_scale_2"
DIVISOR, GROUPS = "weight_global_scale", "weight_g_idx"
TILE, SMALL_TILE = 32, 16  # inputs that share a scale: of MX floats, of NVFP4


def compressed(checkpoint: Checkpoint, path: str, noted: bool) -> Form | None:
    """How the weight of `path` is stored; None where it is none of these, or a note of ComfyUI's says what it is.
    Raises ModelError for one that can't be."""
    code = checkpoint.infos[f"{path}.weight"].dtype
    scales = checkpoint.infos.get(f"{path}.weight_scale")
    if f"{path}.weight_shape" in checkpoint.infos:
        return _packed(checkpoint, path)
    if scales is None or noted:
        return None
    if code == "I8" and any(f"{path}.{part}" in checkpoint.infos for part in ("weight_zero_point", GROUPS)):
        return _bytes(checkpoint, path)
    if f"{path}.{GROUPS}" in checkpoint.infos:
        raise unreadable(checkpoint, path, Phrase("floats in groups of inputs that do not stand together"))
    if f"{path}.{FACTOR}" in checkpoint.infos and packing_of(checkpoint).get("quant_method") == MODELOPT:
        return _floats(checkpoint, path)
    if f"{path}.{DIVISOR}" in checkpoint.infos or (code in ("U8", "F8_E4M3") and scales.dtype == "U8"):
        return _floats(checkpoint, path)
    return None


def _packed(checkpoint: Checkpoint, path: str) -> Form:
    codes, scales = checkpoint.infos[f"{path}.weight"], checkpoint.infos.get(f"{path}.weight_scale")
    zeros = checkpoint.infos.get(f"{path}.weight_zero_point")
    rows, columns = numbers(checkpoint, f"{path}.weight_shape", 2)
    if codes.dtype != "I32" or scales is None or scales.dtype not in SCALES or rows < 1 or columns < 1:
        raise misfits(checkpoint, path)
    bits, groups = codes.shape[1] * WORD // columns, scales.count // rows
    said = _said_bits(packing_of(checkpoint))
    if codes.shape != (rows, -(-columns * bits // WORD)) or bits not in range(1, 9) or (said and bits not in said):
        raise unreadable(checkpoint, path, Phrase("words of compressed-tensors that are not full"))
    if not groups or scales.shape != (rows, groups) or columns % groups:
        raise misfits(checkpoint, path)
    names = {"weight": f"{path}.weight", "scale": f"{path}.weight_scale"}
    if zeros is not None:
        if zeros.dtype != "I32" or zeros.shape != (-(-rows * bits // WORD), groups):
            raise misfits(checkpoint, path)
        names["zeros"] = f"{path}.weight_zero_point"
    names |= order(checkpoint, path, GROUPS, columns, columns // groups)
    each = SCALES[scales.dtype]
    if bits == 8 and columns % 8 == 0 and names.keys() == {"weight", "scale"}:
        return signed(path, (rows, columns), columns // groups, COMPRESSED, each)
    held = held_bytes((rows, columns), bits, groups, 2 * each if zeros is None else each + 4, "order" in names)
    return Form(f"uint{bits}", (rows, columns), group=columns // groups, names=names, layout=COMPRESSED, held=held)


def _bytes(checkpoint: Checkpoint, path: str) -> Form:
    """Signed bytes with zero points or an order: a scale for all, for each row, or for groups of a row."""
    (rows, columns), scale = checkpoint.infos[f"{path}.weight"].shape, checkpoint.infos[f"{path}.weight_scale"]
    zeros = checkpoint.infos.get(f"{path}.weight_zero_point")
    groups = scale.shape[1] if len(scale.shape) == 2 else 1
    fits = scale.shape in ((), (1,), (rows,), (rows, groups)) and scale.dtype in SCALES and groups
    if not fits or columns % groups or (zeros is not None and (zeros.shape, zeros.dtype) != (scale.shape, "I8")):
        raise misfits(checkpoint, path)
    names = {"weight": f"{path}.weight", "scale": f"{path}.weight_scale"}
    names |= {} if zeros is None else {"zeros": f"{path}.weight_zero_point"}
    names |= order(checkpoint, path, GROUPS, columns, columns // groups)
    held = held_bytes((rows, columns), 8, groups, SCALES[scale.dtype] + 4, "order" in names)
    return Form("uint8", (rows, columns), group=columns // groups, names=names, layout=BYTES, held=held)


def _floats(checkpoint: Checkpoint, path: str) -> Form:
    """Floats of 4 or 8 bits with an 8-bit scale for every few."""
    code, scale = checkpoint.infos[f"{path}.weight"], checkpoint.infos[f"{path}.weight_scale"]
    number = DIVISOR if f"{path}.{DIVISOR}" in checkpoint.infos else FACTOR
    divisor = checkpoint.infos.get(f"{path}.{number}")
    kind = "nvfp4" if divisor is not None else "fp4" if code.dtype == "U8" else "mxfp8"
    group, wanted = (SMALL_TILE, "F8_E4M3") if divisor is not None else (TILE, "U8")
    rows, columns = code.shape[0], code.shape[1] * (1 if kind == "mxfp8" else 2)
    types = code.dtype == ("F8_E4M3" if kind == "mxfp8" else "U8") and scale.dtype == wanted
    if not types or columns % group or scale.shape != (rows, columns // group):
        raise misfits(checkpoint, path)
    names = {"weight": f"{path}.weight", "weight_scale": f"{path}.weight_scale"}
    if divisor is not None:
        if divisor.count != 1 or divisor.dtype not in SCALES:
            raise misfits(checkpoint, path)
        names[number] = f"{path}.{number}"
    each = {"nvfp4": 1, "fp4": 4, "mxfp8": 2}[kind]
    held = code.size + rows * (columns // group) * each
    shared = (rows, columns // group)
    layout = OPTIMIZED if FACTOR in names else FLOATS
    group = group if kind == "fp4" else 0
    return Form(kind, (rows, columns), shared, group, names=names, layout=layout, held=held)


def _said_bits(packing: Mapping[str, Any]) -> set[int]:
    """Bits of weights in any of the groups that a config names."""
    groups = packing.get("config_groups")
    schemes = groups.values() if isinstance(groups, Mapping) else ()
    weights = [scheme.get("weights") for scheme in schemes if isinstance(scheme, Mapping)]
    return {each["num_bits"] for each in weights if isinstance(each, Mapping) and isinstance(each.get("num_bits"), int)}
