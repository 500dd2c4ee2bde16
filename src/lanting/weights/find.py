"""Where a model is: the embedded nano, a downloaded release, or a folder somebody points at."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lanting.core.errors import ModelError
from lanting.specs import ModelSpec, detect, get_spec, spec_names
from lanting.weights.checkpoint import Checkpoint, open_component, read_json
from lanting.weights.home import REPO, downloaded, embedded_nano

COMPONENTS = ("transformer", "vae", "text_encoder")
LORAS = "lora"  # inside a model's folder: the LoRAs it brings, which may be called by name


@dataclass(frozen=True)
class ModelFolder:
    """A model in diffusers' folder layout: its configs read, its weights not yet."""

    name: str
    path: Path
    spec: ModelSpec
    configs: Mapping[str, Mapping[str, Any]]  # model_index, scheduler and COMPONENTS
    notes: tuple[str, ...] = ()  # where the folder's own configs disagree with the release, in words

    def checkpoint(self, component: str) -> Checkpoint:
        return open_component(self.path / component)

    @property
    def tokenizer(self) -> Path:
        return self.path / "tokenizer"


def locate(model: str) -> ModelFolder:
    """A release's name ("nano", "qwen-image-2512"), a pulled "owner/name", or a path to a diffusers folder.

    Raises ModelError: unknown name, release not downloaded, or a path that holds no model.
    """
    if model in spec_names():
        path = embedded_nano() if model == "nano" else downloaded(model)
        if path is None or not (path / "model_index.json").is_file():
            raise ModelError(f"{model} is not downloaded yet: run 'lanting pull {model}', or give a folder.")
        return open_folder(path, name=model, spec=get_spec(model))
    path = Path(model).expanduser()
    if path.is_dir():
        return open_folder(path, name=path.resolve().name)
    if path.exists():
        raise ModelError(f"{model} is a file; give a model folder in diffusers' layout (with model_index.json).")
    if REPO.fullmatch(model):
        if (path := downloaded(model)) is not None:
            return open_folder(path, name=model)
        raise ModelError(f"{model} is neither a folder here nor a model we have: run 'lanting pull {model}' to get it.")
    if "/" in model or "\\" in model:
        raise ModelError(f"{model} does not exist; give a model folder or one of: {', '.join(spec_names())}.")
    get_spec(model)  # an unknown name: raises, naming the closest ones
    raise ModelError(f"{model} is neither a known release nor a folder.")


def open_folder(path: Path, name: str, spec: ModelSpec | None = None) -> ModelFolder:
    """Read all configs of a folder; the release is detected from them unless it is given."""
    if not (path / "model_index.json").is_file():
        raise ModelError(f"{path} is no model folder: it has no model_index.json (diffusers' layout is expected).")
    configs = {"model_index": read_json(path / "model_index.json")}
    for component in COMPONENTS:
        configs[component] = read_json(path / component / "config.json")
    configs["scheduler"] = read_json(path / "scheduler" / "scheduler_config.json")
    found = detect(configs["model_index"], configs["transformer"], configs["vae"], hint=name)
    notes: list[str] = []
    if spec is None:
        spec = get_spec(found)
    notes += disagreements(spec, configs["transformer"])
    return ModelFolder(name, path, spec, configs, tuple(notes))


def disagreements(spec: ModelSpec, transformer: Mapping[str, Any]) -> list[str]:
    """Sentences where the folder's transformer config says otherwise than the release. The folder wins."""
    return [
        f"{spec.name} has {key} = {value}, but this folder's config says {transformer.get(key)}; the folder wins."
        for key, value in spec.shape.items()
        if transformer.get(key, False) != value
    ]
