"""What nunchaku writes in place of a Linear's weight (SVDQuant), told from headers, without torch.

    X.qweight  int8 (out, in / 2)     codes of 4 bits in the tiles of its kernels (`weights.schemes.svdq_tiles`), with
               `wscales`, `smooth_factor`, `proj_down`, `proj_up`; e2m1 codes also `wcscales` or `wtscale`
    X.qweight  int32 (out / 4, in / 2)  a modulation: codes with a scale and an offset for each 64 inputs
Three Linears that read the same rows are one in its files; all that belongs to single rows begins anew every 128 of
them, so each third is a tensor of its own at its own place and nothing is read to part them. Such files are written for
nunchaku's own forward pass, which other files with the same tensors (of diffusers) are not; of these alone
    the modulations' rows are shift, scale, gate ... of the first feature, then of the second; 1 is added to the scales
    int4: what `net.2` reads is shifted by 0.171875, GELU's least being -0.17, and the bias makes up for it
Sources: deepcompressor's `backend/nunchaku`; nunchaku's `models/linear.py`, `transformer_qwenimage.py`, kernels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from lanting.core.errors import ModelError
from lanting.weights.form import SVDQUANT, Form
from lanting.weights.headers import TensorInfo

if TYPE_CHECKING:
    from lanting.weights.checkpoint import Checkpoint

PLAIN, SHIFTED = SVDQUANT, f"{SVDQUANT} shifted inputs"  # layouts: with a low rank
ROWS, SIX = f"{SVDQUANT} no low rank", f"{SVDQUANT} six in turn"  # and without: modulations in order, in nunchaku's
LAYOUTS = (PLAIN, SHIFTED, ROWS, SIX)
FUSED = {
    ".attn.to_qkv": (".attn.to_q", ".attn.to_k", ".attn.to_v"),
    ".attn.add_qkv_proj": (".attn.add_q_proj", ".attn.add_k_proj", ".attn.add_v_proj"),
}
UNBIASED = "txt_in.text_norm.weight"  # is only in 2.1, whose Linears have none: such files give them zeros
MODULATIONS = (".img_mod.1", ".txt_mod.1")
AFTER_GELU = (".img_mlp.net.2", ".txt_mlp.net.2")
NAMES = {  # what older files call them
    "qweight": "weight",
    "lora_down": "proj_down",
    "lora_up": "proj_up",
    "smooth": "smooth_factor",
    "smooth_orig": "smooth_factor_orig",
}
SHARED = ("proj_down", "smooth_factor", "smooth_factor_orig", "wtscale")  # by all rows
SIDES = ("wscales", "wzeros", "wcscales", "proj_up", *SHARED)  # beside a weight; `smooth_factor_orig` is never used
TILE = 128  # rows, and inputs
PACK = 16  # ranks
GROUP, SMALL_GROUP = 64, 16  # inputs that share a scale: integers and modulations, e2m1
HALVES = ("F16", "BF16")
FLOATS = (*HALVES, "F32")


def named(checkpoint: Checkpoint) -> Checkpoint:
    """The same tensors under our names, fused Linears as three; `layers` says which layout each has. Any other
    program's checkpoint as it is. Raises ModelError where rows have no thirds, or their order is unknown."""
    infos = checkpoint.infos
    packed = [stem for name in infos if f"{(stem := name.removesuffix('.qweight'))}.wscales" in infos and stem != name]
    if not packed:
        return checkpoint
    whole = any(path.endswith(tuple(FUSED)) for path in packed)
    if whole:
        _check_modulations(checkpoint)
    found: dict[str, TensorInfo] = {}
    where = {}
    paths = {path: _parted(path) for path in packed}
    for name, info in infos.items():
        path, _, part = name.rpartition(".")
        part = NAMES.get(part, part)
        if part == "bias" and path in paths and UNBIASED in infos and not any(checkpoint.raw(name)):
            continue
        pieces = _pieces(checkpoint, name, part, len(paths[path])) if path in paths else (info,)
        stems = [f"{ours}.{part}" for ours in paths[path]] if path in paths else [name]
        for ours, piece in zip(stems, pieces, strict=True):
            found[ours], where[ours] = piece, checkpoint.where[name]
    layers = {ours: {"format": _layout(infos, path, whole)} for path, each in paths.items() for ours in each}
    return replace(checkpoint, infos=found, where=where, layers={**checkpoint.layers, **layers})


def packed_as(checkpoint: Checkpoint, path: str, layout: str) -> Form:
    """How the weight of `path` is stored, of a checkpoint that went through `named`. Raises ModelError for parts that
    are missing or don't fit."""
    beside = {part: checkpoint.infos.get(f"{path}.{part}") for part in ("weight", "bias", *SIDES)}
    there = {part: info for part, info in beside.items() if info is not None}
    packed, wanted = (_modulation if layout in (ROWS, SIX) else _low_rank)(there)
    rows, columns = packed.shape
    sides = {PLAIN: (TILE, TILE), SHIFTED: (TILE, TILE), ROWS: (4, GROUP), SIX: (6 * 4, GROUP)}[layout]
    odd = [part for part, (types, size) in wanted.items() if not _fits(there.get(part), types, size)]
    odd = ["qweight"] if not rows or not columns or rows % sides[0] or columns % sides[1] else odd
    if odd:
        raise ModelError(
            "the {label} stores {path} as SVDQuant does, and its {part} is missing or does not fit: download it again",
            **{"label": checkpoint.label, "path": path, "part": odd[0]},
        )
    names = {part: f"{path}.{part}" for part in wanted}
    return replace(packed, scale=(rows, columns // packed.group), names=names, layout=layout)


Wanted = dict[str, tuple[tuple[str, ...], int | tuple[int, ...]]]
"""Part -> the types it may have, and its count or its shape."""


def _low_rank(there: Mapping[str, TensorInfo]) -> tuple[Form, Wanted]:
    """With a low rank; and what each part must be."""
    rows, half = there["weight"].shape
    small = "wscales" in there and there["wscales"].dtype == "F8_E4M3"
    group = SMALL_GROUP if small else GROUP
    down = there.get("proj_down")
    rank = down.shape[1] if down is not None and len(down.shape) == 2 and down.shape[1] % PACK == 0 else 0
    wanted: Wanted = {
        "weight": (("I8", "U8"), rows * half),
        "wscales": (("F8_E4M3",) if small else HALVES, rows * 2 * half // group),
        "smooth_factor": (FLOATS, 2 * half),
        "proj_down": (FLOATS, (2 * half, rank) if rank else -1),
        "proj_up": (FLOATS, (rows, rank)),
    }
    optional = {"bias": rows, "wcscales": rows if small else -1, "wtscale": 1 if small else -1}
    wanted |= {part: (FLOATS, count) for part, count in optional.items() if part in there}
    return Form("nvfp4" if small else "int4", (rows, 2 * half), group=group, rank=rank), wanted


def _modulation(there: Mapping[str, TensorInfo]) -> tuple[Form, Wanted]:
    """Without. Scales may be more than there are groups: older writers fill up."""
    quarter, half = there["weight"].shape
    rows, columns = 4 * quarter, 2 * half
    scales = there["wscales"].shape if "wscales" in there else (0,)
    fit = len(scales) == 2 and scales[-1] == rows and scales[0] * GROUP >= columns
    wanted: Wanted = {"weight": (("I32",), quarter * half)}
    wanted |= dict.fromkeys(("wscales", "wzeros"), (HALVES, scales if fit else -1))
    wanted |= {"bias": (FLOATS, (rows,))} if "bias" in there else {}
    return Form("uint4", (rows, columns), group=GROUP), wanted


def _fits(info: TensorInfo | None, types: tuple[str, ...], wanted: int | tuple[int, ...]) -> bool:
    return info is not None and info.dtype in types and wanted in (info.count, info.shape)


def _layout(infos: Mapping[str, TensorInfo], path: str, whole: bool) -> str:
    """`whole`: the file is one for nunchaku's own forward pass."""
    if f"{path}.wzeros" in infos:
        return SIX if whole and path.endswith(MODULATIONS) else ROWS
    integers = infos[f"{path}.wscales"].dtype in HALVES
    return SHIFTED if whole and integers and path.endswith(AFTER_GELU) else PLAIN


def _parted(path: str) -> tuple[str, ...]:
    """The Linears that are fused in one, or itself."""
    for fused, each in FUSED.items():
        if path.endswith(fused):
            return tuple(path.removesuffix(fused) + one for one in each)
    return (path,)


def _pieces(checkpoint: Checkpoint, name: str, part: str, count: int) -> Iterator[TensorInfo]:
    """A tensor's thirds, from the first rows to the last; all of it for each where all rows share it."""
    info = checkpoint.infos[name]
    if count == 1 or part in SHARED:
        yield from (info,) * count
        return
    axis = len(info.shape) - 1 if part == "wscales" else 0
    rows = info.shape[axis] if info.shape else 0
    if not rows or rows % (TILE * count) or info.size % count:
        raise ModelError(
            "the {label} has {name} of shape {shape}, which has no thirds: get another",
            **{"label": checkpoint.label, "name": name, "shape": info.shape},
        )
    shape = tuple(side // count if place == axis else side for place, side in enumerate(info.shape))
    size = info.size // count
    for place in range(count):
        begin = info.start + place * size
        yield replace(info, shape=shape, start=begin, end=begin + size)


def _check_modulations(checkpoint: Checkpoint) -> None:
    """Of modulations that nunchaku itself would not read nobody knows in which order their rows are."""
    for name in checkpoint.infos:
        path, _, part = name.rpartition(".")
        if path.endswith(MODULATIONS) and part in ("weight", "qweight") and f"{path}.wzeros" not in checkpoint.infos:
            raise ModelError(
                "the {label} is fused as nunchaku's files are, but {path} is not packed as it is there: get another",
                **{"label": checkpoint.label, "path": path},
            )
