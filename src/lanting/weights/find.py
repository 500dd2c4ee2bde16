"""Where a model is: the embedded nano, a downloaded release, a folder, or a file somebody points at.

A file holds a transformer, seldom all three components. What it lacks comes from where the person says, else from the
installed release of the same name, else from a related one: the text encoder is the same in all of them, and the VAE
in all but the layered one.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lanting.core.errors import ModelError
from lanting.core.lang import Phrase
from lanting.specs import ModelSpec, detect, get_spec, spec_names, whole_release
from lanting.specs.detect import SINGLE_STREAM
from lanting.weights.checkpoint import Checkpoint, open_component, read_json
from lanting.weights.configs import SCHEDULER, config_of, own_notes
from lanting.weights.home import COMPONENTS, REPO, downloaded, embedded_nano, file_in, path_of
from lanting.weights.kinds import guess_kind
from lanting.weights.schemes.dfloat11 import CONFIG as DFLOAT11
from lanting.weights.single import open_file, open_weights

LORAS = "lora"  # inside a model's folder: the LoRAs it brings, which may be called by name
PARTS = ("text_encoder", "vae")  # what may be given apart


@dataclass(frozen=True)
class ModelFolder:
    """A model in diffusers' folder layout, or put together from files: its configs read, its weights not yet."""

    name: str
    path: Path  # brings tokenizer, picture reader and LoRAs, and every component that `parts` has not
    spec: ModelSpec
    configs: Mapping[str, Mapping[str, Any]]  # model_index, scheduler and COMPONENTS
    notes: tuple[str, ...] = ()  # where the folder's own configs disagree with the release, in words
    parts: Mapping[str, Path] = field(default_factory=dict[str, Path])  # component (or "tokenizer") -> file or folder

    def checkpoint(self, component: str) -> Checkpoint:
        return open_weights(self.parts.get(component, self.path / component), component)

    @property
    def tokenizer(self) -> Path:
        """2.1 has no folder of that name: its processor's holds the tokenizer, too."""
        usual = self.path / "tokenizer"
        return self.parts.get("tokenizer", usual if usual.is_dir() else self.path / "processor")


def locate(model: str, parts: Mapping[str, str | None] | None = None) -> ModelFolder:
    """A release's name ("nano", "qwen-image-2512"), a pulled "owner/name", a diffusers folder, or a weights file.

    `parts` names files or folders for the text encoder and the VAE, in place of the model's own.
    Raises ModelError: unknown name, release not downloaded, or a path that holds no model.
    """
    given = {part: _existing(place) for part, place in (parts or {}).items() if place}
    path = path_of(model)
    if model not in spec_names() and path.is_file():
        return open_single(path, given)
    if model not in spec_names():
        place = path if path.is_dir() or not REPO.fullmatch(model) else downloaded(model) or path
        if (own := bare_parts(place)) and not (place / "model_index.json").is_file():
            return open_bare(place, {**own, **given})
        if is_transformer(place):
            alone = place.resolve()
            return _around(alone, alone.parent, open_weights(alone, "transformer"), {"transformer": alone, **given})
    folder = _locate_folder(model)
    return with_parts(folder, given) if given else folder


def _locate_folder(model: str) -> ModelFolder:
    if model in spec_names():
        return _locate_release(model)
    path = Path(model).expanduser()
    pulled = downloaded(model) if REPO.fullmatch(model) else None
    if path.is_dir() and (pulled is None or (path / "model_index.json").is_file()):
        found = open_folder(path, name=path.resolve().name)
        if pulled is None:
            return found
        twins = Phrase("{name} is the folder here, and not the model in {path}", name=model, path=pulled)
        return replace(found, notes=(*found.notes, twins))
    if pulled is not None:
        return open_folder(pulled, name=model)
    if REPO.fullmatch(model) or file_in(model):
        raise ModelError(
            "{model} is neither a folder here nor a model we have: run 'lanting pull {model}' to get it", model=model
        )
    if "/" in model or "\\" in model or path.suffix in (".safetensors", ".gguf"):
        known = ", ".join(name for name in spec_names() if not get_spec(name).lora)
        raise ModelError(
            "{model} does not exist: give a model folder, a file, or one of {known} ('lanting list' knows more)",
            **{"model": model, "known": known},
        )
    get_spec(model)  # an unknown name: raises, naming the closest ones
    raise ModelError("{model} is neither a known release nor a folder: 'lanting list' has the names", model=model)


def _locate_release(name: str) -> ModelFolder:
    path = embedded_nano() if name == "nano" else downloaded(name)
    if path is not None and (path / "model_index.json").is_file():
        found = open_folder(path, name, get_spec(name))
        return replace(found, notes=(*found.notes, *namesakes(name)))
    if namesakes(name):
        raise ModelError(
            "{name} is not downloaded yet: run 'lanting pull {name}', or say ./{name} for the folder", name=name
        )
    raise ModelError("{model} is not downloaded yet: run 'lanting pull {model}', or give a folder", model=name)


def namesakes(release: str) -> tuple[Phrase, ...]:
    """What to know where a model's folder here is called like a release: the release is meant."""
    if not (Path(release) / "model_index.json").is_file():
        return ()
    return (Phrase("{name} is the release: for the folder of that name here say ./{name}", name=release),)


def open_folder(path: Path, name: str, spec: ModelSpec | None = None) -> ModelFolder:
    """Read all configs of a folder; the release is detected from them unless it is given."""
    if not (path / "model_index.json").is_file():
        if parts := bare_parts(path):
            return open_bare(path, parts)
        raise ModelError(
            "{path} is no model folder: it has no model_index.json; give a folder in diffusers' layout", path=path
        )
    configs = {"model_index": read_json(path / "model_index.json")}
    for component in COMPONENTS:
        configs[component] = read_json(path / component / "config.json")
    configs["scheduler"] = read_json(path / "scheduler" / "scheduler_config.json")
    found = detect(configs["model_index"], configs["transformer"], configs["vae"], hint=name)
    if spec is None:
        spec = get_spec(found)
    notes = [spec.licence] if spec.licence else []
    notes += disagreements(spec, configs["transformer"])
    return ModelFolder(name, path, spec, configs, tuple(notes))


def bare_parts(path: Path) -> dict[str, Path]:
    """Component -> folder, of a model's folder that has neither a model_index.json nor configs: mflux's. Empty where
    there is no transformer."""
    found = {part: path / part for part in COMPONENTS if any((path / part).glob("*.safetensors"))}
    return found if "transformer" in found else {}


def is_transformer(path: Path) -> bool:
    """Whether a folder is a transformer's alone: config.json and weights, and no model around them."""
    there = (path / "config.json").is_file() and any(path.glob("*.safetensors"))
    model = (path / "model_index.json").is_file()
    return there and not model and guess_kind(open_component(path).infos).name == "transformer"


def open_bare(path: Path, parts: Mapping[str, Path]) -> ModelFolder:
    """A model from such a folder; what it lacks comes from elsewhere, as for a single file."""
    repo = next((each for each in path.parts if each.startswith("models--")), "")  # a cache's names say no more
    named = Path(repo.removeprefix("models--").replace("--", "/", 1)) if repo else path.resolve()
    transformer = open_weights(parts["transformer"], "transformer")
    return _around(named, path, transformer, dict(parts))


def open_single(path: Path, given: Mapping[str, Path]) -> ModelFolder:
    """A model around a transformer file; see the module for where the rest comes from."""
    found = open_file(path)
    if "transformer" not in found:
        what = ", ".join(found).replace("_", " ") or "nothing this version knows"
        if flag := next((f"--{part.replace('_', '-')}" for part in (*PARTS, "controlnet") if part in found), ""):
            raise ModelError(
                "{path} holds no transformer but {what}: give it with {flag}", path=path, what=what, flag=flag
            )
        raise ModelError(
            "{path} holds no transformer but {what}: 'lanting show' tells what a file is", path=path, what=what
        )
    return _around(path, path.parent, found["transformer"], dict.fromkeys(found, path) | dict(given))


def _around(named: Path, home: Path, transformer: Checkpoint, parts: dict[str, Path]) -> ModelFolder:
    """A model of `parts` in the folder `home`, whose release may have to be told by a name."""
    spec, notes = release_of(named, transformer, config_beside(parts["transformer"]))
    own = [part for part in parts if parts[part] == named or parts[part] == home / part]
    whole = all(parts.get(part) == home / part for part in COMPONENTS)
    base = None if whole else base_of(spec, parts)
    if base is None and (lacking := [part for part in PARTS if part not in parts]):
        options = ", ".join(f"--{part.replace('_', '-')}" for part in lacking)
        pull = whole_release(spec.name) + "".join(f" --without {part}" for part in COMPONENTS if part in parts)
        raise ModelError(
            "{file} holds {parts} of {release} and nothing else: run 'lanting pull {pull}' for the rest, or give files "
            "with {flags}",
            **{"file": named.name, "parts": ", ".join(own).replace("_", " "), "release": spec.name},
            **{"pull": pull, "flags": options},
        )
    if base is None:
        parts["tokenizer"] = _tokenizer_beside(home / named.name, parts["text_encoder"], spec)
    configs: dict[str, Mapping[str, Any]] = {
        "model_index": {},
        "scheduler": base.configs["scheduler"] if base is not None else SCHEDULER,
        **{part: base.configs[part] for part in PARTS if base is not None},
    }
    folder = ModelFolder(named.name, base.path if base is not None else home, spec, configs, notes, parts)
    folder = _with_configs(folder, [part for part in COMPONENTS if part in parts])
    # spec.shape once more: a file may have lost its marker, and then its name says what it is
    return replace(folder, configs={**folder.configs, "transformer": {**folder.configs["transformer"], **spec.shape}})


def with_parts(folder: ModelFolder, given: Mapping[str, Path]) -> ModelFolder:
    """The same model with another text encoder or VAE."""
    return _with_configs(replace(folder, parts={**folder.parts, **given}), list(given))


def _with_configs(folder: ModelFolder, parts: list[str]) -> ModelFolder:
    """The configs of parts that were given apart, from their folders or off their tensors."""
    configs, places = dict(folder.configs), dict(folder.parts)
    for part in parts:
        place = places[part]
        if (place / "model_index.json").is_file():  # a whole model: its part is meant
            place = places[part] = place / part
        if told := config_beside(place):
            configs[part] = told
        else:
            configs[part] = _inherit(configs.get(part, {}), config_of(part, open_weights(place, part)))
    return replace(folder, configs=configs, parts=places)


def config_beside(place: Path) -> dict[str, Any]:
    """What a component's folder says of its network; empty for files, and where it says nothing of that."""
    told = read_json(place / "config.json") if place.is_dir() and (place / "config.json").is_file() else {}
    return told if told.keys() - {DFLOAT11} else {}


def _inherit(before: Mapping[str, Any], told: Mapping[str, Any]) -> Mapping[str, Any]:
    """A config that was read off tensors, with what those can't tell from the config of the part it replaces."""
    text, known = told.get("text_config"), before.get("text_config") or before
    if text is None or not before:
        return {**before, **told}
    sides = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    return before if all(known.get(side) == text.get(side) for side in sides) else told


def release_of(
    path: Path, transformer: Checkpoint, config: Mapping[str, Any] | None = None
) -> tuple[ModelSpec, tuple[str, ...]]:
    """The release a transformer file is of, and what a person should know of the guess; `config` where it brings one.

    Our own notes and the markers in the tensors decide; releases that differ in nothing but their weights are told by
    the file's name, and the first of them is assumed where it does not help.
    """
    noted = own_notes(transformer).get("release")
    if isinstance(noted, str) and noted in spec_names():
        return get_spec(noted), ()
    config = config or config_of("transformer", transformer)
    if config.get("use_layer3d_rope"):
        return get_spec("qwen-image-layered"), ()
    words = set(re.split(r"[^a-z0-9]+", path.name.lower()))
    if config.get("_class_name") == SINGLE_STREAM:
        spec = get_spec("qwen-image-2.1-turbo" if "turbo" in words else "qwen-image-2.1")
        return spec, (spec.licence,)
    if config.get("zero_cond_t"):
        return _distilled(get_spec("qwen-image-edit-2511"), words), ()
    for word in ("2511", "2509", "2512"):
        if word in words:
            spec = get_spec(f"qwen-image-{word}" if word == "2512" else f"qwen-image-edit-{word}")
            lost = Phrase("{file} has no marker of {release}; its name is believed.", file=path.name, release=spec.name)
            return _distilled(spec, words), (lost,) if word == "2511" else ()
    spec = _distilled(get_spec("qwen-image-edit" if "edit" in words else "qwen-image"), words)
    return spec, (Phrase("{file} is taken for {release}, by its name alone.", file=path.name, release=spec.name),)


def _distilled(spec: ModelSpec, words: set[str]) -> ModelSpec:
    """The release as a file with a Lightning LoRA merged in is to be used: few steps, its schedule, no guidance."""
    if not any(word.startswith("lightning") for word in words):  # or "lightningv2", and then "0"
        return spec
    few = get_spec("qwen-image-lightning-8" if words & {"8steps", "8step"} else "qwen-image-lightning-4")
    own = replace(spec.defaults, steps=few.defaults.steps, guidance_scale=few.defaults.guidance_scale)
    return replace(spec, defaults=own, schedule=few.schedule)


def base_of(spec: ModelSpec, parts: Collection[str]) -> ModelFolder | None:
    """An installed release that can bring what `parts` lack; the release itself first."""
    layered, build = "layered" in spec.tasks, spec.shape.get("_class_name")
    alike = [name for name in spec_names() if name != "nano" and get_spec(name).shape.get("_class_name") == build]
    kin = [name for name in alike if ("layered" in get_spec(name).tasks) == layered]
    if "vae" in parts:  # then every release of the same build will do
        kin += [name for name in alike if name not in kin]
    if spec.name == "nano":
        kin = []
    for name in (spec.name, *kin):
        path = embedded_nano() if name == "nano" else downloaded(name)
        if path is not None and (path / "model_index.json").is_file():
            return open_folder(path, name, get_spec(name))
    return None


def _tokenizer_beside(path: Path, text_encoder: Path, spec: ModelSpec) -> Path:
    """A tokenizer's folder near the text encoder or the model file."""
    for near in (text_encoder, text_encoder.parent, path.parent):
        for folder in (near, near / "tokenizer", near / "processor"):
            if (folder / "tokenizer.json").is_file() or (folder / "vocab.json").is_file():
                return folder
    raise ModelError(
        "there is no tokenizer near {path}: put the release's tokenizer folder beside it, or run 'lanting "
        "pull {release}'",
        **{"path": text_encoder, "release": spec.name},
    )


def _existing(place: str) -> Path:
    path = path_of(place)
    if not path.exists():
        raise ModelError("{path} does not exist", path=place)
    return path


def disagreements(spec: ModelSpec, transformer: Mapping[str, Any]) -> list[str]:
    """Sentences where the folder's transformer config says otherwise than the release. The folder wins."""
    return [
        Phrase(
            "{release} has {key} = {value}, but this folder's config says {said}; the folder wins.",
            **{"release": spec.name, "key": key, "value": value, "said": transformer.get(key)},
        )
        for key, value in spec.shape.items()
        if transformer.get(key, False) != value
    ]
