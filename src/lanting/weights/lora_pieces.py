"""What a LoRA file changes, Linear by Linear, from its header alone: every tensor named, paired and measured. No torch.

A tensor that fits no Linear is an error and not a warning: a LoRA of which a part was left out looks like a bad LoRA.
All errors are collected, since whoever examines a file wants to see more than the first.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import isfinite, sqrt
from pathlib import Path
from typing import Any

from lanting.core.errors import ModelError
from lanting.weights.headers import TensorInfo
from lanting.weights.lora_names import STRANGE, TEXT, Layers, Sides, Target, parse

FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
SCALARS = {"F64": "<d", "F32": "<f", "F16": "<e", "I64": "<q", "I32": "<i"}  # what struct calls them
LARGEST_ALPHA = 1e6
FORMS = {"down": "lora", "up": "lora", "lokr": "lokr", "hada": "loha", "diff": "diff"}


@dataclass(frozen=True, slots=True)
class Piece:
    """The tensors that change one Linear, by role, as names in the file."""

    form: str  # lora, lokr, loha, diff, or bias for a change of the bias alone
    keys: Mapping[str, str]
    rank: int = 0  # 0: nothing of low rank in it
    scale: float = 1.0  # alpha / rank; the strength is not in it
    alpha: float | None = None
    rows: tuple[int, int] | None = None  # of tensors that several Linears share


@dataclass
class Reading:
    """What was understood of a file."""

    file: str
    path: Path
    infos: Mapping[str, TensorInfo]
    peft: Mapping[str, Any] = field(default_factory=dict[str, Any])  # how PEFT scaled what it wrote
    pieces: dict[str, Piece] = field(default_factory=dict[str, Piece])
    strays: dict[str, ModelError] = field(default_factory=dict[str, ModelError])  # tensor -> why it is no part
    problems: list[ModelError] = field(default_factory=list[ModelError])  # everything, strays first


def read_pieces(path: Path, infos: Mapping[str, TensorInfo], linears: Sides, peft: Mapping[str, Any]) -> Reading:
    """Match every tensor with the Linears of a model. Nothing is raised: see `problems`."""
    reading = Reading(path.name, path, infos, peft)
    groups: dict[str, tuple[Target, dict[str, str]]] = {}
    layers = Layers(linears)
    for key in sorted(infos):
        try:
            _place(reading, key, layers, groups)
        except ModelError as error:
            reading.strays[key] = error
    reading.problems.extend(reading.strays.values())
    if not groups and not reading.problems:
        reading.problems.append(ModelError("{file} is empty: download it again", file=path.name))
    for module, (target, keys) in groups.items():
        try:
            reading.pieces[module] = _piece(reading, target, keys, linears[module])
        except ModelError as error:
            reading.problems.append(error)
    return reading


def _place(reading: Reading, key: str, layers: Layers, groups: dict[str, tuple[Target, dict[str, str]]]) -> None:
    """Add one tensor to the group of every Linear it belongs to."""
    if TEXT.match(key):
        raise ModelError(
            "{file} changes the text encoder too ({key}), which is not supported: use a LoRA of the transformer alone",
            **{"file": reading.file, "key": key},
        )
    if STRANGE.search(key):
        raise ModelError(
            "{file} holds {key}, a kind of change that can't be applied to a Linear: use another file",
            **{"file": reading.file, "key": key},
        )
    name = parse(key)
    targets = layers.find(name) if name is not None else ()
    if name is None or not targets:
        raise ModelError(
            "{file} holds {key}, which fits no layer of this model: use a LoRA that was made for it",
            **{"file": reading.file, "key": key},
        )
    for target in targets:
        known, keys = groups.setdefault(target.path, (target, {}))
        if name.role in keys or known.rows != target.rows:
            raise ModelError(
                "{file} has both {first} and {second}, which are the same thing: use another file",
                **{"file": reading.file, "first": keys.get(name.role) or next(iter(keys.values())), "second": key},
            )
        keys[name.role] = key


def _piece(reading: Reading, target: Target, keys: Mapping[str, str], sides: tuple[int, int]) -> Piece:
    """The checked tensors of one Linear of (out, in) features."""
    for role, key in keys.items():
        info = reading.infos[key]
        if info.dtype not in FLOATS and not (role == "alpha" and info.dtype in SCALARS):
            raise ModelError(
                "{file} holds {key} as {dtype}, which is no weight type we know: use another file",
                **{"file": reading.file, "key": key, "dtype": info.dtype},
            )
    form = _form(reading, target, keys)
    if target.rows is not None and (form not in ("lora", "diff", "bias")):
        raise ModelError(
            "{file} has {key} for several layers at once, which only a plain LoRA can have: use another file",
            **{"file": reading.file, "key": next(iter(keys.values()))},
        )
    out = target.height or sides[0]
    rank = CHECKS[form](reading, target, keys, (out, sides[1]))
    _check_extras(reading, keys, (out, sides[1]))
    alpha = _alpha(reading, keys["alpha"]) if "alpha" in keys else None
    scale, alpha = _scale(reading, target.path, form, rank, alpha)
    return Piece(form, keys, rank, scale, alpha, target.rows)


def _form(reading: Reading, target: Target, keys: Mapping[str, str]) -> str:
    forms = {
        FORMS[start]: key for role, key in keys.items() if (start := role.split("_")[0]) in FORMS and role != "up_bias"
    }
    if len(forms) > 1:
        first, second = sorted(forms.values())[:2]
        raise ModelError(
            "{file} mixes two kinds of change for {module} ({first} and {second}): use another file",
            **{"file": reading.file, "module": target.path, "first": first, "second": second},
        )
    if forms:
        return next(iter(forms))
    if "bias" in keys and not keys.keys() & {"magnitude", "up_bias"}:
        return "bias"
    return "lora"  # of which both halves are then found missing


def _lora(reading: Reading, target: Target, keys: Mapping[str, str], sides: tuple[int, int]) -> int:
    _need(reading, target, keys, ("down", "up"))
    rank = _side(reading, keys["down"])
    _shape(reading, keys["down"], (max(rank, 1), sides[1]))
    _shape(reading, keys["up"], (sides[0], rank))
    return rank


def _lokr(reading: Reading, target: Target, keys: Mapping[str, str], sides: tuple[int, int]) -> int:
    """w1 (a, b) and w2 (c, d) for a weight (a c, b d), each whole or as two thin matrices."""
    rank, shapes = 0, []
    for part in ("lokr_w1", "lokr_w2"):
        if part in keys:
            if f"{part}_a" in keys or f"{part}_b" in keys:
                raise ModelError(
                    "{file} has both {first} and {second}, which are the same thing: use another file",
                    **{"file": reading.file, "first": keys[part], "second": keys.get(f"{part}_a") or keys[f"{part}_b"]},
                )
            shape = reading.infos[keys[part]].shape
            if len(shape) != 2 or 0 in shape:
                _shape(reading, keys[part], (max(1, _side(reading, keys[part])), sides[1]))
            shapes.append(shape)
            continue
        _need(reading, target, keys, (f"{part}_a", f"{part}_b"))
        left, right = keys[f"{part}_a"], keys[f"{part}_b"]
        rank = _side(reading, right)
        high, wide = _side(reading, left), _side(reading, right, 1)
        _shape(reading, left, (max(high, 1), max(rank, 1)))
        _shape(reading, right, (max(rank, 1), max(wide, 1)))
        shapes.append((high, wide))
    (a, b), (c, d) = shapes
    if (a * c, b * d) != sides:
        key = keys.get("lokr_w2") or keys["lokr_w2_b"]
        wanted = [sides[0] // a, sides[1] // b]
        raise _misfit(reading, key, wanted)
    return rank


def _loha(reading: Reading, target: Target, keys: Mapping[str, str], sides: tuple[int, int]) -> int:
    roles = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    _need(reading, target, keys, roles)
    for left, right in (roles[:2], roles[2:]):
        rank = max(1, _side(reading, keys[right]))
        _shape(reading, keys[right], (rank, sides[1]))
        _shape(reading, keys[left], (sides[0], rank))
    return _side(reading, keys["hada_w1_b"])


def _diff(reading: Reading, target: Target, keys: Mapping[str, str], sides: tuple[int, int]) -> int:
    _shape(reading, keys["diff"], sides)
    return 0


def _bias(reading: Reading, target: Target, keys: Mapping[str, str], sides: tuple[int, int]) -> int:
    return 0


CHECKS: Mapping[str, Callable[[Reading, Target, Mapping[str, str], tuple[int, int]], int]] = {
    "lora": _lora,
    "lokr": _lokr,
    "loha": _loha,
    "diff": _diff,
    "bias": _bias,
}


def _check_extras(reading: Reading, keys: Mapping[str, str], sides: tuple[int, int]) -> None:
    """What may come with any form: a bias, lengths of rows (out,) or (out, 1) or of columns (1, in), alpha."""
    out, inner = sides
    for role in ("bias", "up_bias"):
        if role in keys:
            _shape(reading, keys[role], (out,))
    if "magnitude" in keys and reading.infos[keys["magnitude"]].shape not in ((out,), (out, 1), (1, inner)):
        _shape(reading, keys["magnitude"], (out,))
    if "alpha" in keys and reading.infos[keys["alpha"]].count != 1:
        _shape(reading, keys["alpha"], ())


def _need(reading: Reading, target: Target, keys: Mapping[str, str], roles: tuple[str, ...]) -> None:
    for role in roles:
        if role not in keys:
            raise ModelError(
                "{file} lacks the {role} half for {module}: download it again",
                **{"file": reading.file, "role": role, "module": target.path},
            )


def _side(reading: Reading, key: str, axis: int = 0) -> int:
    shape = reading.infos[key].shape
    return shape[axis] if len(shape) > axis else 0


def _shape(reading: Reading, key: str, wanted: tuple[int, ...]) -> None:
    if reading.infos[key].shape != wanted:
        raise _misfit(reading, key, list(wanted))


def _misfit(reading: Reading, key: str, wanted: list[int]) -> ModelError:
    shapes = {"shape": list(reading.infos[key].shape), "wanted": wanted}
    return ModelError(
        "{file} has {key} of shape {shape} where this model needs {wanted}: use a LoRA that was made for it",
        **{"file": reading.file, "key": key, **shapes},
    )


def _alpha(reading: Reading, key: str) -> float:
    """The number in a tensor of one element, read from its bytes."""
    info = reading.infos[key]
    with reading.path.open("rb") as file:
        file.seek(info.start)
        raw = file.read(info.size)
    if info.dtype == "BF16":  # the upper half of a float32
        value = float(struct.unpack("<f", b"\0\0" + raw)[0])
    elif info.dtype in SCALARS:
        value = float(struct.unpack(SCALARS[info.dtype], raw)[0])
    else:
        raise ModelError(
            "{file} holds {key} as {dtype}, which is no weight type we know: use another file",
            **{"file": reading.file, "key": key, "dtype": info.dtype},
        )
    return value


def _scale(reading: Reading, module: str, form: str, rank: int, alpha: float | None) -> tuple[float, float | None]:
    """(the factor that the weights' product is taken times, alpha). Without alpha the factor is 1; two whole
    factors of a Kronecker product have none either, but to PEFT."""
    peft = reading.peft
    if alpha is None:
        alpha = declared(peft, "alpha" if form in ("lokr", "loha") else "lora_alpha", "alpha_pattern", module)
        if form == "lokr" and alpha is not None:
            rank = int(declared(peft, "r", "rank_pattern", module) or rank)
    if alpha is None or not rank:
        return 1.0, alpha
    if not isfinite(alpha) or abs(alpha) > LARGEST_ALPHA:
        raise ModelError(
            "{file} declares {key} = {value}, which should be a number from {low} to {high}: use another file",
            **{"file": reading.file, "key": f"alpha of {module}", "value": alpha},
            **{"low": -LARGEST_ALPHA, "high": LARGEST_ALPHA},
        )
    return alpha / (sqrt(rank) if peft.get("use_rslora") else rank), alpha


def declared(peft: Mapping[str, Any], key: str, pattern: str, module: str) -> float | None:
    """A number of PEFT's for a Linear: that of the name which ends its path, else the one for all. PEFT allows
    regular expressions there; a stranger's are not run."""
    patterns = peft.get(pattern)
    own = patterns.items() if isinstance(patterns, dict) else ()
    named = [value for name, value in own if f".{module}".endswith(f".{str(name).removeprefix('^')}")]
    value = named[0] if named else peft.get(key)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
