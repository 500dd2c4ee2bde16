"""A release is a TOML file; `extends` names the release it differs from, so a new one is a handful of lines.

Keys nobody knows are refused: a misspelt default that is silently ignored costs somebody an evening. The
checkpoint's own configs win over `shape` and the model's own scheduler; `schedule` holds only what a
distilled release changes on purpose. Rejected: Python constants per release, which turn into code with
branches.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, cast, get_type_hints

from lanting.core.errors import ModelError
from lanting.core.lang import Phrase
from lanting.core.types import TASK_NAMES

FOLDER = Path(__file__).parent
WITH_PICTURES = ("edit", "edit-plus", "edit-2.1")
TEMPLATES = ("text-to-image", "text-to-image-2.1", *WITH_PICTURES)
T = TypeVar("T", "Defaults", "ModelSpec")


@dataclass(frozen=True, slots=True)
class Defaults:
    """What a release recommends; areas in square pixels, sizes as (width, height) in pixels."""

    steps: int = 50
    guidance_scale: float = 4.0
    negative_prompt: str = " "
    size: tuple[int, int] = (1024, 1024)
    sizes: Mapping[str, tuple[int, int]] = field(default_factory=dict[str, tuple[int, int]])
    strength: float = 0.6
    layers: int = 4
    resolution: int = 640  # side of the square whose area a layered picture is brought to
    vl_area: int = 1024 * 1024  # area of an input picture as the text encoder sees it
    vae_area: int = 1024 * 1024  # area of an input picture as the VAE sees it; 0: its own size, see `reference_size`
    max_pictures: int = 1
    multiple: int = 16  # sides of sizes are multiples of this many pixels
    keep: bool = False  # edits take what they leave alone from the given picture


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """One release.

    name           file stem, also what people type
    repo           where the weights are published ("" for embedded ones)
    tasks          which of core.TASK_NAMES it can do
    template       prompt template, one of TEMPLATES
    edit_template  the template where pictures are shown, one of WITH_PICTURES ("": `template` for both)
    shape          transformer config entries that tell this release from its parent
    schedule       scheduler config entries that replace the checkpoint's own
    renormalize    guided predictions keep the length of the unguided one (Qwen-Image's guidance)
    lora           file of the distillation this release adds to `repo` ("" for none)
    writes         the text encoder can also write (Qwen2.5-VL with its head), so that prompts can be rewritten
    licence        what a person should know of it before using the weights ("": Apache-2.0)
    """

    name: str
    repo: str
    tasks: tuple[str, ...]
    template: str = "text-to-image"
    edit_template: str = ""
    defaults: Defaults = Defaults()
    shape: Mapping[str, Any] = field(default_factory=dict[str, Any])
    schedule: Mapping[str, Any] = field(default_factory=dict[str, Any])
    renormalize: bool = True
    lora: str = ""
    writes: bool = False
    licence: str = ""


@cache
def spec_names() -> tuple[str, ...]:
    """Every release that has a file here, in alphabetical order."""
    return tuple(sorted(path.stem for path in FOLDER.glob("*.toml")))


@cache
def get_spec(name: str) -> ModelSpec:
    """The release of that name; a ModelError names the closest ones."""
    if name in spec_names():
        return read_spec(FOLDER / f"{name}.toml")
    near = difflib.get_close_matches(name.lower(), spec_names(), n=2) or ["nano", "qwen-image"]
    raise ModelError("there is no release called {name}; did you mean {near}?", name=name, near=" or ".join(near))


def whole_release(name: str) -> str:
    """The release that `name` was distilled from, and whose weights it uses; a release that is none is its own."""
    spec = get_spec(name)
    return (release_in(spec.repo) if spec.lora else None) or name


def release_in(repo: str) -> str | None:
    """The release that a repository holds, without a LoRA on top; None where it holds none of ours."""
    return next((one for one in spec_names() if repo and get_spec(one).repo == repo and not get_spec(one).lora), None)


def distilled_releases(name: str) -> tuple[str, ...]:
    """The releases that draw with the weights of `name` and a LoRA of their own, fewest steps first."""
    repo = get_spec(name).repo
    found = [one for one in spec_names() if repo and get_spec(one).lora and get_spec(one).repo == repo]
    return tuple(sorted(found, key=lambda one: get_spec(one).defaults.steps))


def read_spec(path: Path) -> ModelSpec:
    """One release from its file, `extends` followed."""
    table = _layer(path, seen=())
    defaults = _build(Defaults, table.pop("defaults", {}), path, "defaults.")
    spec = _build(ModelSpec, {"name": path.stem, "defaults": defaults, **table}, path, "")
    if spec.template not in TEMPLATES:
        raise _wrong(path, "template", _none_of(spec.template, TEMPLATES))
    if spec.edit_template not in ("", *WITH_PICTURES):
        raise _wrong(path, "edit_template", _none_of(spec.edit_template, WITH_PICTURES))
    if strange := [task for task in spec.tasks if task not in TASK_NAMES]:
        raise _wrong(path, "tasks", Phrase("names {task}, which is no task of ours", task=repr(strange[0])))
    return spec


def _layer(path: Path, seen: tuple[str, ...]) -> dict[str, Any]:
    """The file laid over the file it extends, one level of tables deep."""
    if path.stem in seen:
        raise _wrong(path, "extends", Phrase("leads back to itself"))
    try:
        mine: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError("{path}: there is no such release file", path=path.name) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ModelError("{path} is not valid TOML: {reason}", path=path.name, reason=error) from None
    base = mine.pop("extends", None)
    if base is None:
        return mine
    beside = path.with_name(f"{base}.toml")  # a person's file may extend another of theirs, or one of ours
    theirs = _layer(beside if beside.exists() else FOLDER / beside.name, (*seen, path.stem))
    merged: dict[str, Any] = {k: theirs.get(k, {}) | v if isinstance(v, dict) else v for k, v in mine.items()}
    return theirs | merged


def _build(kind: type[T], table: Mapping[str, Any], path: Path, prefix: str) -> T:
    hints = get_type_hints(kind)
    known = {f.name for f in fields(kind)}
    if unknown := sorted(set(table) - known):
        told = Phrase("is not a key we know; known here: {known}", known=", ".join(sorted(known)))
        raise _wrong(path, prefix + unknown[0], told)
    return kind(**{key: _value(value, hints[key], path, prefix + key) for key, value in table.items()})


def _value(value: Any, hint: Any, path: Path, key: str) -> Any:
    """TOML's lists become tuples and "none" becomes None; everything else must already have its type."""
    if key == "defaults.size":
        return _pair(value, path, key)
    if key == "defaults.sizes":
        return {str(ratio): _pair(pair, path, f"{key}.{ratio}") for ratio, pair in value.items()}
    if key == "tasks":
        return tuple(str(task) for task in value)
    if key in ("shape", "schedule"):
        return {str(k): None if v == "none" else v for k, v in value.items()}
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise _wrong(path, key, Phrase("must be {kind}, not {value}", kind=hint.__name__, value=repr(value)))
    return value


def _pair(value: Any, path: Path, key: str) -> tuple[int, int]:
    if isinstance(value, list) and len(cast("list[Any]", value)) == 2:
        width, height = cast("list[Any]", value)
        if isinstance(width, int) and isinstance(height, int) and width % 16 == height % 16 == 0:
            return width, height
    raise _wrong(path, key, Phrase("must be [width, height] in multiples of 16"))


def _none_of(value: str, known: Iterable[str]) -> Phrase:
    return Phrase("is {value}, not one of {known}", value=repr(value), known=", ".join(known))


def _wrong(path: Path, key: str, what: Phrase) -> ModelError:
    return ModelError("{path}: {key} {what}", path=path.name, key=key, what=what)
