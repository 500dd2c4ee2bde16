"""LoRA files: found, read in every dialect of tensor names in use, and checked against the model before it is built.

A tensor that fits no Linear is an error and not a warning: a LoRA of which a part was left out looks like a bad LoRA.
A file may say in its notes how it wants to be drawn with (`lanting.steps`, `lanting.guidance_scale`,
`lanting.shift`); that becomes the release's default, which flags still override. How the dialects name a half:

    Lightning, ai-toolkit  [diffusion_model.]transformer_blocks.0.attn.to_q.lora_down.weight, .lora_up.weight, .alpha
    PEFT, diffusers        [base_model.model.][transformer.]transformer_blocks.0.attn.to_q.lora_A[.default].weight
    Kohya                  lora_unet_transformer_blocks_0_attn_to_q.lora_down.weight, .alpha
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from torch import Tensor, nn

from lanting.core.errors import ModelError, RequestError
from lanting.nn.lora import Factors, attach
from lanting.specs import ModelSpec
from lanting.specs.numbers import number
from lanting.weights.checkpoint import read_json
from lanting.weights.find import LORAS, ModelFolder
from lanting.weights.headers import TensorInfo, read_header, read_metadata
from lanting.weights.kinds import PICKLES

STRONGEST = 10.0
PREFIXES = ("base_model.model.", "model.diffusion_model.", "diffusion_model.", "transformer.")
FLAT = ("lora_unet_", "lora_transformer_", "lycoris_")  # behind these, dots are written as underscores
ROLE = re.compile(r"(.+)\.(?:lora_(A|B|down|up)(?:\.\w+)?\.weight|lora\.(down|up)\.weight|(alpha))")
OTHER = re.compile(r"\.(lokr_\w+|hada_\w+|dora_scale|lora_magnitude_vector\b.*|lora_\w+\.bias|diff|diff_b|oft_\w+)$")
# a file's own wishes: lowest and highest value
WISHES = {"lanting.steps": (1, 1000), "lanting.guidance_scale": (0, 100), "lanting.shift": (0.01, 100)}


@dataclass(frozen=True, slots=True)
class Halves:
    """The tensors of one Linear's LoRA, by their names in the file."""

    down: str
    up: str
    alpha: str | None
    rank: int


@dataclass(frozen=True)
class Lora:
    """A file that fits the model. `modules` maps paths of Linears to tensors; nothing but the header is read yet."""

    given: str  # as the person said it: a path, or the name of one the model brings
    path: Path
    strength: float
    modules: Mapping[str, Halves]
    notes: Mapping[str, str]  # the file's metadata

    @cached_property
    def sha256(self) -> str:
        """Of the whole file, in hexadecimal."""
        return hash_of(self.path)

    def describe(self) -> dict[str, Any]:
        """For the recipe."""
        return {"name": self.path.name, "sha256": self.sha256, "strength": self.strength, "path": self.given}


def hash_of(path: Path) -> str:
    """sha256 of a file in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def split_strength(text: str) -> tuple[str, float]:
    """ "FILE:0.8" -> ("FILE", 0.8); without a number behind the last colon the strength is 1.

    Raises RequestError unless the strength is from -10 to 10.
    """
    file, colon, tail = text.rpartition(":")
    try:
        strength = float(tail)
    except ValueError:
        return text, 1.0
    if not colon or not file or Path(text).is_file():
        return text, 1.0
    return file, number("the strength of a LoRA", strength, -STRONGEST, STRONGEST)


def find_lora(folder: Path, name: str) -> Path:
    """One of the model's own by its plain name, else a file. Raises ModelError."""
    own = {path.stem: path for path in sorted((folder / LORAS).glob("*.safetensors"))}
    if name in own:
        return own[name]
    path = Path(name).expanduser()
    if path.suffix in PICKLES:
        raise ModelError(
            "{path} is pickled, which can run code, and is never opened: get a safetensors file", path=name
        )
    if path.is_file():
        return path
    if path.is_dir():
        raise ModelError("{path} is a folder: name the LoRA file in it", path=name)
    if own:
        raise ModelError(
            "there is no LoRA {name}: give a safetensors file, or one that this model brings: {names}",
            **{"name": name, "names": ", ".join(own)},
        )
    raise ModelError("there is no LoRA {name}: give a safetensors file", name=name)


def find_again(folder: Path, names: Sequence[str], record: Mapping[str, Any]) -> tuple[str, bool]:
    """Under which of the names a recipe's LoRA is found now, and whether it is the same file; the same one is
    preferred. Raises ModelError when none of them is there."""
    here: list[str] = []
    for name in names:
        try:
            path = find_lora(folder, name)
        except ModelError:
            continue
        if hash_of(path) == record["sha256"]:
            return name, True
        here.append(name)
    if not here:
        raise ModelError("the LoRA {name} is not here any more: give it with --lora", name=names[0])
    return here[0], False


def find_loras(folder: ModelFolder, asked: Sequence[str]) -> tuple[Lora, ...]:
    """Every "FILE[:strength]" found and matched with the model's transformer. Raises ModelError or RequestError."""
    if not asked:
        return ()
    linears = linears_of(folder.checkpoint("transformer").infos)
    split = [split_strength(text) for text in asked]
    return tuple(open_lora(find_lora(folder.path, name), linears, name, strength) for name, strength in split)


def linears_of(infos: Mapping[str, TensorInfo]) -> dict[str, tuple[int, int]]:
    """Path -> (out, in) of every Linear of a transformer, told from its header."""
    return {
        name.removesuffix(".weight"): (info.shape[0], info.shape[1])
        for name, info in infos.items()
        if name.endswith(".weight") and len(info.shape) == 2 and not name.endswith("_embedding.weight")
    }


def open_lora(path: Path, linears: Mapping[str, tuple[int, int]], given: str = "", strength: float = 1.0) -> Lora:
    """Read the header and match every tensor. Raises ModelError naming the first tensor that does not fit."""
    infos = read_header(path)
    notes = read_metadata(path)
    found: dict[str, dict[str, str]] = {}
    flat = {name.replace(".", "_"): name for name in linears}
    for key in sorted(infos):
        module, role = _read_name(path, key, linears, flat)
        if role in found.setdefault(module, {}):
            raise ModelError(
                "{file} has both {first} and {second}, which are the same thing: use another file",
                **{"file": path.name, "first": found[module][role], "second": key},
            )
        found[module][role] = key
    if not found:
        raise ModelError("{file} is empty: download it again", file=path.name)
    modules = {name: _halves(path, name, halves, infos, linears[name]) for name, halves in found.items()}
    for key in WISHES:
        _wish(path, notes, key)
    return Lora(given or str(path), path, strength, modules, notes)


def _read_name(path: Path, key: str, linears: Mapping[str, Any], flat: Mapping[str, str]) -> tuple[str, str]:
    """(path of the Linear, "down", "up" or "alpha") of a tensor's name in any dialect."""
    if OTHER.search(key):
        raise ModelError(
            "{file} is no plain LoRA ({key}): LoKr, LoHa, DoRA and biases can't be read, use another file",
            **{"file": path.name, "key": key},
        )
    match = ROLE.fullmatch(key)
    name = match[1] if match else ""
    while stripped := next((name.removeprefix(p) for p in PREFIXES if name.startswith(p)), ""):
        name = stripped
    prefix = next((p for p in FLAT if name.startswith(p)), "")
    module = flat.get(name.removeprefix(prefix)) if prefix else name if name in linears else None
    if match is None or module is None:
        raise ModelError(
            "{file} holds {key}, which fits no layer of this model: use a LoRA that was made for it",
            **{"file": path.name, "key": key},
        )
    role = match[2] or match[3] or match[4]
    return module, {"A": "down", "B": "up"}.get(role, role)


def _halves(
    path: Path, module: str, keys: Mapping[str, str], infos: Mapping[str, TensorInfo], sides: tuple[int, int]
) -> Halves:
    """The checked tensors of one Linear of (out, in) features."""
    for role in ("down", "up"):
        if role not in keys:
            raise ModelError(
                "{file} lacks the {role} half for {module}: download it again",
                **{"file": path.name, "role": role, "module": module},
            )
    shape = infos[keys["down"]].shape
    rank = shape[0] if shape else 0
    wanted: dict[str, tuple[int, ...]] = {"down": (max(rank, 1), sides[1]), "up": (sides[0], rank)}
    for role, key in keys.items():
        info = infos[key]
        if info.shape != wanted.get(role, info.shape) or (role == "alpha" and info.count != 1):
            shapes = {"shape": list(info.shape), "wanted": list(wanted.get(role, ()))}
            raise ModelError(
                "{file} has {key} of shape {shape} where this model needs {wanted}: use a LoRA that was made for it",
                **{"file": path.name, "key": key, **shapes},
            )
        if not info.dtype.startswith(("F", "BF")):
            raise ModelError(
                "{file} holds {key} as {dtype}, which is no weight type we know: use another file",
                **{"file": path.name, "key": key, "dtype": info.dtype},
            )
    return Halves(keys["down"], keys["up"], keys.get("alpha"), rank)


def _wish(path: Path, notes: Mapping[str, str], key: str) -> float | None:
    """A number that the file declares, checked; None where it declares nothing."""
    if key not in notes:
        return None
    low, high = WISHES[key]
    try:
        value = number(key, float(notes[key]), low, high)
        if key != "lanting.steps" or value.is_integer():
            return value
    except (ValueError, RequestError):
        pass
    raise ModelError(
        "{file} declares {key} = {value}, which should be a number from {low} to {high}: use another file",
        **{"file": path.name, "key": key, "value": notes[key][:40], "low": low, "high": high},
    )


def static_shift(shift: float) -> dict[str, Any]:
    """Scheduler config entries for noise levels s t / (1 + (s - 1) t), whatever the picture's size."""
    return {"use_dynamic_shifting": False, "shift": shift, "shift_terminal": None}


def with_wishes(spec: ModelSpec, loras: Sequence[Lora]) -> ModelSpec:
    """The release with the defaults that its LoRAs declare; the last one counts, one of strength 0 does not."""
    for lora in loras:
        if lora.strength == 0:
            continue
        steps, guidance, shift = (_wish(lora.path, lora.notes, key) for key in WISHES)
        own = spec.defaults if steps is None else replace(spec.defaults, steps=int(steps))
        own = own if guidance is None else replace(own, guidance_scale=guidance)
        schedule = spec.schedule if shift is None else {**spec.schedule, **static_shift(shift)}
        spec = replace(spec, defaults=own, schedule=schedule)
    return spec


def load_factors(lora: Lora, dtype: torch.dtype, device: torch.device) -> dict[str, Factors]:
    """The file's matrices by path of Linear, scaled with strength * alpha / rank; without alpha it is the rank."""
    peft = peft_settings(lora)
    with safe_open(str(lora.path), framework="pt") as file:

        def tensor(key: str) -> Tensor:
            return file.get_tensor(key).to(device=device, dtype=dtype)

        loaded: dict[str, Factors] = {}
        for module, halves in lora.modules.items():
            alpha = declared_alpha(peft, module) if halves.alpha is None else float(file.get_tensor(halves.alpha))
            size = halves.rank**0.5 if peft.get("use_rslora") else halves.rank
            scale = lora.strength * (1.0 if alpha is None else alpha / size)
            loaded[module] = Factors(tensor(halves.down), tensor(halves.up), scale)
    return loaded


def peft_settings(lora: Lora) -> dict[str, Any]:
    """How PEFT scaled what it wrote: from diffusers' notes in the file, or from the adapter_config.json beside it."""
    if "lora_adapter_metadata" in lora.notes:
        try:
            told = json.loads(lora.notes["lora_adapter_metadata"])
        except ValueError:
            told = None
        if isinstance(told, dict):
            return {key.removeprefix("transformer."): value for key, value in cast("dict[str, Any]", told).items()}
    beside = lora.path.with_name("adapter_config.json")
    if lora.path.name == "adapter_model.safetensors" and beside.is_file():
        return read_json(beside)
    return {}


def declared_alpha(peft: Mapping[str, Any], module: str) -> float | None:
    """PEFT's alpha for a Linear: that of the name which ends its path, else the one for all. PEFT allows regular
    expressions there; a stranger's are not run."""
    patterns = peft.get("alpha_pattern")
    own = patterns.items() if isinstance(patterns, dict) else ()
    named = [alpha for name, alpha in own if f".{module}".endswith(f".{str(name).removeprefix('^')}")]
    alpha = named[0] if named else peft.get("lora_alpha")
    return float(alpha) if isinstance(alpha, int | float) else None


def attach_loras(transformer: nn.Module, loras: Sequence[Lora], dtype: torch.dtype, device: torch.device) -> int:
    """Hang all LoRAs of a strength other than 0 on the model. Returns how many Linears got something."""
    parts: dict[str, list[Factors]] = {}
    for lora in loras:
        if lora.strength == 0:
            continue
        for module, factors in load_factors(lora, dtype, device).items():
            parts.setdefault(module, []).append(factors)
    return attach(transformer, parts)
