"""How a file's Linears are stored, told from headers and small notes, without torch.

A packed weight is a tensor `X.weight` of an unusual type and side tensors or notes that say what it means. What is
read here:
    plain 8-bit floats                        a whole file cast down, no scales
    `scaled_fp8`, `X.scale_weight`            ComfyUI's older scheme; `X.scale_input` is for kernels of fp8 inputs
    `X.weight_scale`, `X.comfy_quant`         ComfyUI's newer one, a JSON note per layer as bytes or one for all in the
                                              file's `_quantization_metadata`: fp8, int8 (also rotated), NVFP4, MXFP8,
                                              and our int4
    `X.weight.quant_state...`, `X.SCB`        bitsandbytes' (`schemes.bnb`)
    `X.qweight`, `X.qzeros`, `X.scales`       AWQ's and GPTQ's (`schemes.gptq`)
    `X.weight_packed`, `X.weight_shape`       compressed-tensors' (`schemes.compressed`)
    `X.qweight`, `X.wscales`                  nunchaku's SVDQuant (`schemes.svdq`, which renames them first)
    `X.scales` beside 32-bit words            MLX's (`schemes.mlx`)
    `X.scale`, `X.zero_point`, `X.svd_up`     SDNQ's (`schemes.sdnq`), whose types config.json tells
    a GGUF block type                         its own bytes
A missing scale or an unknown scheme is refused: it would load, and draw plausible noise.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from lanting.core.errors import ModelError
from lanting.core.lang import Phrase
from lanting.nn.blocks import TYPES
from lanting.weights.checkpoint import Checkpoint
from lanting.weights.form import SECOND, Form
from lanting.weights.headers import TensorInfo
from lanting.weights.kinds import ZERO_COND_T
from lanting.weights.schemes import bnb, mlx, sdnq, svdq
from lanting.weights.schemes.compressed import compressed
from lanting.weights.schemes.foreign import MODELOPT, REFUSED, packing_of
from lanting.weights.schemes.foreign import SIDES as FOREIGN_SIDES
from lanting.weights.schemes.foreign import unreadable as _unreadable
from lanting.weights.schemes.gptq import words

SCALE_NAMES = ("weight_scale", "scale_weight", "weight_scale_inv")  # which the last one is, for all its name
UNUSED = ("scale_input", "input_scale", "comfy_quant")  # beside a weight, and of no use for its value
UNKNOWN = ("pre_quant_scale", "weight_s_rel", "weight_s_channel", "weight_codebook", "qweight")
FLAGS = ("scaled_fp8", ZERO_COND_T)  # tensors that only say something by being there
STRAYS = ("logit_scale",)  # a number of CLIP's that ComfyUI saves beside every text encoder, and none reads
FP8 = {"F8_E4M3": "fp8 e4m3", "F8_E5M2": "fp8 e5m2"}
FORMATS = {  # what ComfyUI calls them, and what we do
    "float8_e4m3fn": "fp8 e4m3",
    "float8_e5m2": "fp8 e5m2",
    "int8_tensorwise": "int8",
    "int8_blockwise": "int8",
    "lanting_int4": "int4",
    "nvfp4": "nvfp4",
    "mxfp8": "mxfp8",
}
TILED = {"nvfp4": (16, ("F8_E4M3",)), "mxfp8": (32, ("F8_E8M0", "U8"))}  # inputs that share a scale, and its types
FLOATS = ("F16", "BF16", "F32", "F64")


def read_forms(checkpoint: Checkpoint) -> dict[str, Form]:
    """Path -> form of every weight that is packed; what isn't named is stored as plain floats.

    Raises ModelError for schemes this version can't read.
    """
    notes = schemes(checkpoint)
    in_rows = packing_of(checkpoint).get("quant_method") == MODELOPT
    forms: dict[str, Form] = {}
    for name, info in checkpoint.infos.items():
        path, dot, part = name.rpartition(".")
        scheme = notes.get(path, {}).get("format")
        if dot and part in REFUSED:
            raise _unreadable(checkpoint, path, REFUSED[part])
        if part in UNKNOWN or (part == SECOND and scheme != "nvfp4" and not in_rows):
            raise _unreadable(checkpoint, path, str(scheme) if scheme else Phrase("a scheme with {part}", part=part))
        if dot and part == "weight" and f"{path}.scale" in checkpoint.infos:
            if (found := sdnq.numbered(checkpoint, path)) is not None:
                forms[path] = found
            continue
        if not dot or part != "weight" or len(info.shape) != 2:
            continue
        form = _form(checkpoint, path, info, notes.get(path, {}))
        if form is not None:
            forms[path] = form
    return forms


def side_tensors(infos: Mapping[str, TensorInfo]) -> set[str]:
    """The names that are no part of the network itself: scales, notes, flags and strays."""
    sides = (*bnb.SIDES, *FOREIGN_SIDES, *mlx.SIDES, *sdnq.SIDES, *sdnq.DOUBLE, *svdq.SIDES)
    endings = tuple(f".{part}" for part in (*SCALE_NAMES, *UNUSED, SECOND, *sides))
    return {name for name in infos if name.endswith(endings) or name in (*FLAGS, *STRAYS)}


def shapes(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the values of every tensor of the network, packed or not."""
    forms, aside = read_forms(checkpoint), side_tensors(checkpoint.infos)
    return {
        name: forms[path].shape if (path := name.removesuffix(".weight")) in forms and name != path else info.shape
        for name, info in checkpoint.infos.items()
        if name not in aside
    }


def schemes(checkpoint: Checkpoint) -> dict[str, dict[str, Any]]:
    """Path -> what the file says of that layer's scheme."""
    found = {
        path: {"format": note} if isinstance(note, str) else _table(checkpoint, note, path)
        for path, note in checkpoint.layers.items()
    }
    for name in checkpoint.infos:
        if name.endswith(".comfy_quant"):
            found[name.removesuffix(".comfy_quant")] = _parse(checkpoint, checkpoint.raw(name), name)
    return found


def _form(checkpoint: Checkpoint, path: str, info: TensorInfo, note: Mapping[str, Any]) -> Form | None:
    """The form of `path`; None for plain floats."""
    rows, columns = info.shape
    names = {"weight": f"{path}.weight"}
    block = TYPES.get(info.dtype)
    if block is not None and block.packed:
        return Form(info.dtype, (rows, columns), names=names)
    if info.dtype in FLOATS:
        return None  # a scale beside it, if any, is a 1 that older converters wrote for every layer
    noted = bool(note.get("format"))
    found = bnb.four_bits(checkpoint, path) or words(checkpoint, path) or compressed(checkpoint, path, noted)
    if (found := found or mlx.packed(checkpoint, path)) is not None:
        return found
    if (layout := str(note.get("format"))) in svdq.LAYOUTS:
        return svdq.packed_as(checkpoint, path, layout)
    kind = _kind(checkpoint, path, info.dtype, note)
    if kind in TILED:
        return _tiled(checkpoint, path, kind, info)
    scale_name = _scales(checkpoint, path, kind, noted)
    scale = None if scale_name is None else checkpoint.infos[scale_name].shape
    names |= {} if scale_name is None else {"weight_scale": scale_name}
    group = 0
    if kind == "int4":
        columns *= 2  # two values a byte
        group = columns // scale[1] if scale is not None and len(scale) == 2 and scale[0] == rows and scale[1] else 0
        if not group or group % 2 or columns % group:
            raise ModelError(
                "the {label} has scales of {scale} for {path}, which can't be: get another",
                **{"label": checkpoint.label, "scale": scale, "path": path},
            )
    return Form(kind, (rows, columns), scale, group, _rotation(checkpoint, path, columns, note), names=names)


def _scales(checkpoint: Checkpoint, path: str, kind: str, noted: bool) -> str | None:
    """The name of a weight's scales; 8-bit floats that no note speaks of may have none."""
    beside = (f"{path}.{part}" for part in (*SCALE_NAMES, bnb.ROWS))
    name = next((name for name in beside if name in checkpoint.infos), None)
    if name is None and (kind in ("int8", "int4") or noted):
        raise _unscaled(checkpoint, path, kind)
    if name is None:
        return None
    if name.endswith(bnb.ROWS) and not bnb.in_rows(checkpoint, path):
        raise _unreadable(checkpoint, path, Phrase("8 bits in the layout of one GPU"))
    if checkpoint.infos[name].dtype not in FLOATS:
        what = Phrase("{kind} with scales of type {dtype}", kind=kind, dtype=checkpoint.infos[name].dtype)
        raise _unreadable(checkpoint, path, what)
    return name


def _tiled(checkpoint: Checkpoint, path: str, kind: str, info: TensorInfo) -> Form:
    """NVFP4 or MXFP8: an 8-bit scale for every few inputs, kept in tiles of 128 x 4."""
    group, types = TILED[kind]
    rows, columns = info.shape[0], info.shape[1] * (2 if kind == "nvfp4" else 1)
    names = {"weight": f"{path}.weight", "weight_scale": f"{path}.weight_scale"}
    names |= {SECOND: f"{path}.{SECOND}"} if kind == "nvfp4" else {}
    found = [checkpoint.infos.get(name) for name in names.values()]
    padded = -(-rows // 128) * 128 * -(-(columns // group) // 4) * 4
    counts = [None if one is None else one.count for one in found[1:]]
    scales = found[1]
    if columns % group or counts != [padded, 1][: len(counts)] or scales is None or scales.dtype not in types:
        raise _unscaled(checkpoint, path, kind)
    return Form(kind, (rows, columns), (rows, columns // group), names=names)


def _kind(checkpoint: Checkpoint, path: str, dtype: str, note: Mapping[str, Any]) -> str:
    """What a weight of this type is, by its note or by its type alone."""
    said = note.get("format")
    if said is not None and not (isinstance(said, str) and said in FORMATS):
        raise _unreadable(checkpoint, path, repr(said))
    kind = FORMATS[said] if said is not None else FP8.get(dtype, "int8" if dtype == "I8" else "")
    fits = {"int8": ("I8",), "int4": ("U8",), "fp8 e4m3": ("F8_E4M3", "U8"), "fp8 e5m2": ("F8_E5M2", "U8")}
    fits |= {"nvfp4": ("U8",), "mxfp8": ("F8_E4M3", "U8")}
    if dtype not in fits.get(kind, ()):
        raise _unreadable(checkpoint, path, Phrase("{what} of type {dtype}", what=said or "numbers", dtype=dtype))
    return kind


def _rotation(checkpoint: Checkpoint, path: str, columns: int, note: Mapping[str, Any]) -> int:
    if not note.get("convrot"):
        return 0
    size = note.get("convrot_groupsize", 256)
    if not isinstance(size, int) or size not in (4, 16, 64, 256) or columns % size:
        raise _unreadable(checkpoint, path, Phrase("rotated in blocks of {size}", size=repr(size)))
    return size


def _parse(checkpoint: Checkpoint, text: str | bytes, name: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        raise _damaged(checkpoint, name) from None
    return _table(checkpoint, value, name)


def _table(checkpoint: Checkpoint, value: Any, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _damaged(checkpoint, name)
    return value


def _damaged(checkpoint: Checkpoint, name: str) -> ModelError:
    return ModelError(
        "the {label} says in {name} what can't be read: download it again", label=checkpoint.label, name=name
    )


def _unscaled(checkpoint: Checkpoint, path: str, kind: str) -> ModelError:
    return ModelError(
        "the {label} has no scales for {path}, which is {kind}: download it again",
        **{"label": checkpoint.label, "path": path, "kind": kind},
    )
