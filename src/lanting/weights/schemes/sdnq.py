"""What SDNQ writes beside its weights, told from headers and the folder's config.json, without torch.

diffusers and transformers save a model that SDNQ quantized with `X.scale`, with `X.zero_point` where numbers have no
sign, and with `X.svd_up` and `X.svd_down` where a thin product was taken off first. Codes of few bits are one run of
bytes whose shape says nothing: the type of each module, and what was rotated or transposed, stands in config.json's
`quantization_config`. Source: SDNQ 0.2.8 (`quantizer.py`, `dequantizer.py`, `utils.py`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from lanting.core.lang import Phrase
from lanting.nn.number_types import LEVELS, RUN, number_type
from lanting.weights.form import Form
from lanting.weights.schemes.foreign import PACKING, contradicts, table_of, unreadable

if TYPE_CHECKING:
    from lanting.weights.checkpoint import Checkpoint
    from lanting.weights.headers import TensorInfo

SDNQ, TURNED = "SDNQ", "SDNQ turned"  # stored as it is, and transposed
SIDES = ("scale", "zero_point", "svd_up", "svd_down")
DOUBLE = ("scale_2", "scale_zero_point", "zero_point_scale", "zero_point_2")  # where scales were rounded, too
FLOATS = ("F16", "BF16", "F32", "F64")
NATIVE = {"I8": "int8", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}  # types whose codes are not packed
KINDS = {"int8": "int8", "float8_e4m3fn": "fp8 e4m3", "float8_e5m2": "fp8 e5m2"}
SHORT = {  # what a config may call a type
    f"{sign}fp{bits}": f"float{bits}_e{exponent}m{bits - exponent - (not sign)}fn{sign}"
    for bits, exponent in zip(range(2, 9), (1, 1, 2, 2, 3, 3, 4), strict=True)
    for sign in ("", "u")
}


def numbered(checkpoint: Checkpoint, path: str) -> Form | None:
    """How the weight of `path` is stored; None where no scale of SDNQ's stands beside it. Raises ModelError for one
    that can't be, or whose type nothing says."""
    weight, scale = checkpoint.infos[f"{path}.weight"], checkpoint.infos.get(f"{path}.scale")
    if scale is None or weight.dtype in FLOATS:
        return None
    book = _book(checkpoint.metadata.get(PACKING, "{}"))
    if not str(book.common.get("quant_method", "")).startswith("sdnq"):
        raise unreadable(checkpoint, path, Phrase("SDNQ, without the config.json of its folder"))
    said = book.of(path)
    name = _type(book, said, path)
    _check(checkpoint, path, said, name)
    parts = {"weight": "weight", "scale": "scale", "zero": "zero_point", "up": "svd_up", "down": "svd_down"}
    names = {part: f"{path}.{each}" for part, each in parts.items() if f"{path}.{each}" in checkpoint.infos}
    bits = 8 if name in KINDS else (number_type(name) or _none(checkpoint, path)).bits
    turned = _turned(checkpoint, path, book.kept_for_kernels(said, path) and name in (*KINDS, "uint8"))
    levels = bool(said.get("use_codebook"))
    shape, groups = _levels(checkpoint, path, bits) if levels else _sides(checkpoint, path, bits, turned)
    layout = TURNED if turned else SDNQ
    rank = _rank(checkpoint, path, shape)
    rotate = _rotation(checkpoint, path, shape[1], said)
    form = Form(f"uint{bits}", shape, names=names, layout=layout, rotate=rotate, rank=rank)
    if name in KINDS:
        return replace(form, kind=KINDS[name], scale=() if scale.count == 1 else (shape[0], groups))
    form = replace(form, scale=(shape[0], groups), group=shape[1] // groups)
    if levels:
        return replace(form, scale=(shape[0], groups, 1 << bits), numbers=name + LEVELS)
    plain = name.startswith("uint") and 8 % bits == 0 and shape[1] % RUN == 0 and (not rotate or rank > 0)
    return replace(form, numbers="" if plain else name)


def _none(checkpoint: Checkpoint, path: str) -> Any:
    raise contradicts(checkpoint, path, "no type")


def _check(checkpoint: Checkpoint, path: str, said: Mapping[str, Any], name: str) -> None:
    """Raises ModelError for what is not read, and where the type is not that of the tensor."""
    told, stored = number_type(name), checkpoint.infos[f"{path}.weight"].dtype
    if any(f"{path}.{part}" in checkpoint.infos for part in DOUBLE):
        raise unreadable(checkpoint, path, Phrase("SDNQ with scales of few bits"))
    if told is None and name not in KINDS:
        raise unreadable(checkpoint, path, Phrase("SDNQ's {name}", name=name))
    if NATIVE.get(stored, "") != (name if name in KINDS else "") or (name not in KINDS and stored != "U8"):
        raise contradicts(checkpoint, path, f"{name} as {stored}")
    zero, levels = f"{path}.zero_point" in checkpoint.infos, bool(said.get("use_codebook"))
    if levels and not name.startswith("uint"):
        raise contradicts(checkpoint, path, f"{name}, use_codebook")
    if zero != (told is not None and not told.signed and not levels):
        raise contradicts(checkpoint, path, f"{name}, zero_point: {zero}")


def _turned(checkpoint: Checkpoint, path: str, kept: bool) -> bool:
    """Whether a weight is stored (in, out): then its scales are (1, out), or one, where the config must tell."""
    weight, scale = checkpoint.infos[f"{path}.weight"], checkpoint.infos[f"{path}.scale"]
    if scale.count > 1:
        return len(scale.shape) == 2 and scale.shape[0] == 1
    return kept and len(weight.shape) == 2 and min(weight.shape) >= 32 and not any(side % 16 for side in weight.shape)


def _sides(checkpoint: Checkpoint, path: str, bits: int, turned: bool) -> tuple[tuple[int, int], int]:
    """((out, in), groups of a row): scales are (out, groups, 1), (out, 1), (1, out) of a transposed weight, or one."""
    weight, scale = checkpoint.infos[f"{path}.weight"], checkpoint.infos[f"{path}.scale"]
    zero, values = checkpoint.infos.get(f"{path}.zero_point", scale), weight.size * 8 // bits
    if scale.count == 1:
        rows = _outputs(checkpoint, path, weight, turned)
    else:
        rows = scale.shape[1] if turned else scale.shape[0]
    groups = scale.count // rows if scale.count > 1 else 1
    columns = values // rows if rows else 0
    if not columns or rows * columns * bits != weight.size * 8 or zero.shape != scale.shape or groups < 1:
        raise contradicts(checkpoint, path, f"{bits} bits, {weight.shape}, {scale.shape}")
    if columns % groups or (scale.count > 1 and scale.count != rows * groups) or scale.dtype not in FLOATS:
        raise contradicts(checkpoint, path, f"{scale.dtype} {scale.shape}, {rows} x {columns}")
    return (rows, columns), groups


def _levels(checkpoint: Checkpoint, path: str, bits: int) -> tuple[tuple[int, int], int]:
    """The same where each group has a list of levels, or each row: (out, groups, 2^bits) or (out, 2^bits)."""
    weight, scale = checkpoint.infos[f"{path}.weight"], checkpoint.infos[f"{path}.scale"]
    rows, groups = (*scale.shape[:-1], 1)[:2] if len(scale.shape) in (2, 3) else (0, 0)
    columns = weight.size * 8 // bits // rows if rows else 0
    whole = columns and groups and rows * columns * bits == weight.size * 8 and not columns % groups
    if not whole or scale.shape[-1] != 1 << bits or scale.dtype not in FLOATS:
        raise contradicts(checkpoint, path, f"{bits} bits, {weight.shape}, {scale.shape}")
    return (rows, columns), groups


def _outputs(checkpoint: Checkpoint, path: str, weight: TensorInfo, turned: bool) -> int:
    """The rows of a weight with one scale for all of it: by its shape, by its bias, or by its thin product."""
    if len(weight.shape) == 2 and (weight.dtype in NATIVE or turned):
        return weight.shape[1] if turned else weight.shape[0]
    bias, up = checkpoint.infos.get(f"{path}.bias"), checkpoint.infos.get(f"{path}.svd_up")
    if bias is not None:
        return bias.count
    return max(up.shape) if up is not None and up.shape else 0


def _rank(checkpoint: Checkpoint, path: str, shape: tuple[int, int]) -> int:
    up, down = (checkpoint.infos.get(f"{path}.{part}") for part in ("svd_up", "svd_down"))
    if up is None and down is None:
        return 0
    (rows, columns), sides = shape, None if up is None or down is None else (up.shape, down.shape)
    for rank in () if up is None or len(up.shape) != 2 else up.shape:
        if sides in (((rows, rank), (rank, columns)), ((rank, rows), (columns, rank))):
            return rank
    raise contradicts(checkpoint, path, f"svd_up, svd_down: {sides}")


def _rotation(checkpoint: Checkpoint, path: str, columns: int, said: Mapping[str, Any]) -> int:
    """The block that inputs were rotated in, the largest power of 2 up to the config's that divides them; 0: none."""
    if not said.get("use_hadamard"):
        return 0
    asked = said.get("hadamard_group_size", 256)
    size = min(columns, asked) if isinstance(asked, int) and asked > 0 else 0
    size = size if not size & (size - 1) else 1 << size.bit_length()
    while size and columns % size:
        size //= 2
    if size < 4:
        return 0
    if size > 256 or size.bit_length() % 2 == 0:  # no power of 4: another matrix
        raise unreadable(checkpoint, path, Phrase("rotated in blocks of {size}", size=size))
    return size


# ---------------------------------------------------------------- what the config says of a module
@dataclass(frozen=True, slots=True)
class Listed:
    """Modules as a config lists them: by their names or parts of those, by beginnings, by patterns with stars."""

    names: frozenset[str]
    beginnings: tuple[str, ...]
    patterns: tuple[re.Pattern[str], ...]

    def __contains__(self, path: str) -> bool:
        return any(self._has(name) for name in _theirs(path))

    def _has(self, name: str) -> bool:
        if not self.names.isdisjoint((name, *name.split("."))) or name.startswith(self.beginnings):
            return True
        return any(pattern.match(name) for pattern in self.patterns)


@dataclass(frozen=True, slots=True)
class Book:
    """A config: what it says of all modules and of some."""

    common: Mapping[str, Any]
    own: tuple[tuple[Listed, Mapping[str, Any]], ...]
    types: tuple[tuple[str, Listed], ...]
    no_kernels: Listed

    def of(self, path: str) -> Mapping[str, Any]:
        return {**self.common, **next((said for listed, said in self.own if path in listed), {})}

    def kept_for_kernels(self, said: Mapping[str, Any], path: str) -> bool:
        """Whether a weight that is not packed is stored as kernels of 8-bit inputs want it."""
        ours, theirs = (str(said.get(key) or "") for key in ("weights_dtype", "quantized_matmul_dtype"))
        alike = not theirs or ("int" in ours) == ("int" in theirs)
        return alike and bool(said.get("use_quantized_matmul")) and path not in self.no_kernels


def _type(book: Book, said: Mapping[str, Any], path: str) -> str:
    """The type of a module: the config's, unless it lists the module under another or under a least number of bits."""
    name = str(said.get("weights_dtype", "int8"))
    for key, listed in book.types:
        if path not in listed:
            continue
        least = re.fullmatch(r"(minimum[-_]?)?(u?)(?:int)?(\d+)[-_]?(bits?)?", key)
        if least is None or not (least[1] or least[4]):
            name = key
            break
        bits, has = int(least[3]), re.search(r"\d+", name)
        if has is not None and int(has[0]) < bits:
            name = f"{'uint' if least[2] or bits <= 4 else 'int'}{bits}"
            break
    return SHORT.get(name, name)


@lru_cache(maxsize=8)
def _book(text: str) -> Book:
    table = table_of(text)
    own, types = table.get("modules_quant_config"), table.get("modules_dtype_dict")
    return Book(
        table,
        tuple((_listed([name]), said) for name, said in _items(own) if isinstance(said, dict)),
        tuple((key.lower(), _listed(names)) for key, names in _items(types)),
        _listed(table.get("modules_to_not_use_matmul")),
    )


def _items(table: Any) -> Iterable[tuple[str, Any]]:
    return table.items() if isinstance(table, dict) else ()


def _listed(names: Any) -> Listed:
    given = [name for name in (names if isinstance(names, list) else [names]) if isinstance(name, str)]
    starred = [name for name in given if "*" in name and not name.startswith(".")]
    return Listed(
        frozenset(name for name in given if not name.startswith(".")),
        tuple(name[1:] for name in given if name.startswith(".")),
        tuple(re.compile(re.escape(name).replace(r"\*", ".*")) for name in starred),
    )


def _theirs(path: str) -> Iterable[str]:
    """Our name of a weight, and what transformers calls it in memory."""
    yield f"{path}.weight"
    if path.startswith("model."):
        yield f"model.language_model.{path.removeprefix('model.')}.weight"
    if path.startswith("visual."):
        yield f"model.{path}.weight"
