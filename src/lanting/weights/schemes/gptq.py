"""Codes of a few bits in words of 32, as AWQ and GPTQ store them, told from headers without torch.

A weight is codes, zero points and scales of groups of inputs: value = (code - zero) x scale. Shapes tell whose they are
(n codes of b bits take n b / 32 words):

    AWQ, gemm            codes (in, out b / 32), zeros (groups, out b / 32), scales (groups, out)
    GPTQ                 codes (in b / 32, out), zeros and scales as AWQ's, and `g_idx` (in,), the group of each input

Sources: autoawq 0.2.9 (`utils/packing_utils.py`, `modules/linear`), auto_gptq 0.7.1 (`nn_modules/qlinear`), GPTQModel
(`utils/model.py`, for the versions of zero points). compressed-tensors' are in `weights.schemes.compressed`.
"""

from __future__ import annotations

import struct
from collections import Counter
from functools import lru_cache
from typing import TYPE_CHECKING

from lanting.core.errors import ModelError
from lanting.core.lang import Phrase
from lanting.weights.form import Form
from lanting.weights.schemes.foreign import contradicts, packing_of, unreadable

if TYPE_CHECKING:
    from lanting.weights.checkpoint import Checkpoint

WORD, HALF = 32, 128  # bits; of all codes of 8 bits
SCALES = {"F16": 2, "BF16": 2, "F32": 4}  # types that scales have, and their bytes
INTEGERS = {"I32": "i", "I64": "q"}
AWQ, GPTQ, GPTQ_V2 = "AWQ", "GPTQ", "GPTQ v2"


def words(checkpoint: Checkpoint, path: str) -> Form | None:
    """How the weight of `path` is stored in AWQ or GPTQ, whose words hold codes of a column; None where it is in
    neither. Raises ModelError for one that can't be."""
    if f"{path}.scales" not in checkpoint.infos or checkpoint.infos[f"{path}.weight"].dtype not in ("I32", "I16", "I8"):
        return None
    codes, scales = checkpoint.infos[f"{path}.weight"], checkpoint.infos[f"{path}.scales"]
    zeros = checkpoint.infos.get(f"{path}.qzeros")
    if zeros is None or codes.dtype != "I32" or zeros.dtype != "I32":
        raise unreadable(checkpoint, path, Phrase("{scheme} in a layout of single kernels", scheme=_scheme(checkpoint)))
    if (len(zeros.shape), len(scales.shape)) != (2, 2) or scales.dtype not in SCALES or not zeros.count * scales.count:
        raise misfits(checkpoint, path)
    (high, wide), (groups, rows) = codes.shape, scales.shape
    bits = zeros.shape[1] * WORD // rows
    awq, gptq = (high, zeros.shape[1]), (high, rows)
    if zeros.shape[0] != groups or bits not in range(1, 9) or zeros.shape[1] * WORD != rows * bits:
        what = Phrase("{scheme} in a layout of single kernels", scheme=_scheme(checkpoint))
        raise unreadable(checkpoint, path, what)
    columns = high if (high, wide) == awq else high * WORD // bits
    if (high, wide) not in (awq, gptq) or (wide == rows and high * WORD != columns * bits) or columns % groups:
        raise misfits(checkpoint, path)
    if (high, wide) == awq and bits != 4:
        raise unreadable(checkpoint, path, Phrase("AWQ of {bits} bits", bits=bits))
    group = columns // groups
    names = {"weight": f"{path}.weight", "zeros": f"{path}.qzeros", "scale": f"{path}.scales"}
    if (high, wide) == awq:
        layout = AWQ
    else:
        layout = _version(checkpoint, path, bits)
        names |= order(checkpoint, path, "g_idx", columns, group)
    each, stored = SCALES[scales.dtype], checkpoint.raw(names["zeros"], zeros.size) if bits == 8 else b""
    if bits == 8 and "order" not in names and stored == bytes([HALF - (layout == GPTQ)]) * zeros.size:
        return signed(path, (rows, columns), group, layout, each)
    held = held_bytes((rows, columns), bits, groups, each + 4, "order" in names)
    return Form(f"uint{bits}", (rows, columns), group=group, names=names, layout=layout, held=held)


def signed(path: str, shape: tuple[int, int], group: int, layout: str, each: int) -> Form:
    """Codes of 8 bits that are worth code less 128 times a scale of `each` bytes: our int8 with groups."""
    names = {"weight": f"{path}.weight", "scale": f"{path}.{'scales' if layout.startswith(GPTQ) else 'weight_scale'}"}
    groups = shape[1] // group
    held = shape[0] * (shape[1] + groups * each)
    return Form("int8", shape, (shape[0], groups), group, names=names, layout=layout, held=held)


def held_bytes(shape: tuple[int, int], bits: int, groups: int, each: int, order: bool) -> int:
    """Bytes of an `AffineLinear`, whose scale and offset of a group take `each` together."""
    return shape[0] * (shape[1] * bits // 8 + groups * each) + (4 * shape[1] if order else 0)


def _version(checkpoint: Checkpoint, path: str, bits: int) -> str:
    """GPTQ's zero points are stored less one, but not in its second version. config.json tells; without one a zero
    point in the middle of all codes does, which is what symmetric weights have."""
    packing = packing_of(checkpoint)
    said = next(
        (str(packing[key]) for key in ("checkpoint_format", "packing_format", "format") if packing.get(key)), ""
    )
    if packing.get("is_marlin_format") or said in ("marlin", "bitblas", "exllama"):
        raise unreadable(checkpoint, path, Phrase("{scheme} in a layout of single kernels", scheme="GPTQ"))
    if said in ("gptq", "gptq_v2"):
        return GPTQ if said == "gptq" else GPTQ_V2
    if said.endswith(("auto_gptq", "gptqmodel")):  # AutoRound's
        return GPTQ if said.endswith("auto_gptq") else GPTQ_V2
    if packing.get("quant_method") == "gptq":
        return GPTQ  # written before there was another
    name = f"{path}.qzeros"
    stored = checkpoint.raw(name, checkpoint.infos[name].size)
    for layout, zero in ((GPTQ, (1 << bits - 1) - 1), (GPTQ_V2, 1 << bits - 1)):
        whole = sum(zero << bits * place for place in range(8)).to_bytes(bits, "little")  # 8 codes fill whole bytes
        if stored == whole * (len(stored) // bits):
            return layout
    raise ModelError(
        "the {label} is GPTQ of one of two versions, which only its config.json tells: give the whole folder",
        label=checkpoint.label,
    )


def order(checkpoint: Checkpoint, path: str, part: str, columns: int, group: int) -> dict[str, str]:
    """The part that says which group each input is of, where groups are not simply one behind the other."""
    name = f"{path}.{part}"
    if name not in checkpoint.infos:
        return {}
    found = numbers(checkpoint, name, columns)
    if found == _in_turn(columns, group) or set(found) == {-1}:  # -1: never set
        return {}
    if sorted(Counter(found).items()) != [(each, group) for each in range(columns // group)]:
        raise misfits(checkpoint, path)
    return {"order": name}


@lru_cache
def _in_turn(columns: int, group: int) -> tuple[int, ...]:
    return tuple(column // group for column in range(columns))


def numbers(checkpoint: Checkpoint, name: str, count: int) -> tuple[int, ...]:
    """All numbers of a small tensor. Raises ModelError where they are not `count`."""
    info = checkpoint.infos[name]
    if info.dtype not in INTEGERS or info.count != count:
        raise misfits(checkpoint, name.rpartition(".")[0])
    return struct.unpack(f"<{count}{INTEGERS[info.dtype]}", checkpoint.raw(name))


def _scheme(checkpoint: Checkpoint) -> str:
    said = str(packing_of(checkpoint).get("quant_method", "")).upper()
    return said if said in ("AWQ", "GPTQ") else "AWQ / GPTQ"


def misfits(checkpoint: Checkpoint, path: str) -> ModelError:
    return contradicts(checkpoint, path, Phrase("codes, scales and zero points do not fit"))
