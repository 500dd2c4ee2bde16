"""What a model folder or a weights file is, told from headers and configs alone: no torch, no tensor is read.

The names of tensors are the most honest description of a file there is, so the kind of each part is judged by
them, and where a config says otherwise than its tensors, both are quoted. Used by `lanting show`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lanting.core.errors import ModelError
from lanting.core.lang import Phrase
from lanting.core.processes import as_typed
from lanting.specs import ModelSpec, detect, get_spec, spec_names
from lanting.weights.checkpoint import Checkpoint, open_component, read_json
from lanting.weights.find import (
    LORAS,
    PARTS,
    bare_parts,
    base_of,
    disagreements,
    namesakes,
    open_bare,
    release_of,
)
from lanting.weights.forms import read_forms, shapes, side_tensors
from lanting.weights.gguf import is_gguf, read_gguf
from lanting.weights.gguf_names import is_projector
from lanting.weights.gguf_view import open_gguf
from lanting.weights.headers import TensorInfo, read_header
from lanting.weights.home import (
    COMPONENTS,
    REPO,
    downloaded,
    embedded_nano,
    lora_path,
    model_folder,
    path_of,
    read_marker,
    unfinished,
)
from lanting.weights.kinds import PICKLES, Kind, config_notes, guess_kind, pickled
from lanting.weights.pull import gigabytes
from lanting.weights.schemes.foreign import our_codes
from lanting.weights.schemes.mlx import translated
from lanting.weights.single import open_file, open_weights


@dataclass(frozen=True, slots=True)
class Part:
    """One component, or one file. `dtypes` counts elements per dtype."""

    name: str
    kind: Kind
    tensors: int
    parameters: int
    dtypes: Mapping[str, int]
    bytes: int
    files: int


@dataclass(frozen=True, slots=True)
class Description:
    """A model in words and numbers. `problems` make it unusable, `notes` are worth knowing."""

    name: str
    path: Path | None  # None: not on this machine
    release: str | None
    parts: tuple[Part, ...] = ()
    licence: str | None = None
    source: Mapping[str, str] = field(default_factory=dict[str, str])  # repo, commit, endpoint it was pulled from
    notes: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()
    runs: str = ""  # a command line that uses it
    spec: ModelSpec | None = None  # how a file is used, which may be another way than its release's


def describe(model: str) -> Description:
    """A release by name (also when it is not here), "owner/name" that was pulled, a folder, or a file."""
    path = path_of(model)
    if model in spec_names():
        return _describe_release(model)
    pulled = downloaded(model) if REPO.fullmatch(model) else None
    if path.is_dir() and (pulled is None or (path / "model_index.json").is_file()):
        return _describe_folder(path, path.resolve().name, None)
    if path.is_file():
        return _describe_file(path)
    if pulled is not None:
        return _describe_folder(pulled, model, None)
    if "/" in model or "\\" in model or path.suffix in (".safetensors", ".gguf", *PICKLES):
        raise ModelError("{path} does not exist", path=model)
    return _describe_release(get_spec(model).name)  # raises, naming the closest ones


def _describe_release(name: str) -> Description:
    folder = embedded_nano() if name == "nano" else downloaded(name)
    if folder is not None and (folder / "model_index.json").is_file():
        described = _describe_folder(folder, name, name)
        described = replace(described, notes=(*described.notes, *namesakes(name)))
        lora = lora_path(name)
        return described if lora is None else replace(described, parts=(*described.parts, _file_part(lora)))
    notes = [Phrase("not on this machine: run 'lanting pull {name}'", name=name)] if name != "nano" else []
    told = get_spec(name).licence
    if name != "nano" and (begun := unfinished(model_folder(name))) is not None:
        notes = [
            Phrase(
                "here only in part, {have} of {total}: run 'lanting pull {name}' to go on",
                **{"have": gigabytes(begun.have), "total": gigabytes(begun.total), "name": name},
            )
        ]
    return Description(name, None, name, notes=(*notes, *([told] if told else []), *namesakes(name)))


def _describe_folder(folder: Path, name: str, release: str | None) -> Description:
    """A pipeline's folder, a component's folder, or a folder of single files."""
    files = sorted([*folder.glob("*.safetensors"), *folder.glob("*.gguf")])
    if (folder / "model_index.json").is_file():
        return _describe_pipeline(folder, name, release)
    if bare_parts(folder):
        return _describe_bare(folder, name)
    if (folder / "config.json").is_file() and any(file.suffix != ".gguf" for file in files):
        part, notes, problems = _component(folder)
        found = (part,) if part is not None else ()
        return Description(name, folder, None, found, _licence(folder), _source(folder), notes, problems)
    if not files:
        if any(path.suffix in PICKLES for path in folder.iterdir()):
            raise ModelError(
                "{folder} holds only pickled weights, which can run code: get the safetensors ones", folder=str(folder)
            )
        raise ModelError("{folder} holds no model: no model_index.json, no .safetensors, no .gguf", folder=str(folder))
    parts, problems = _files(files)
    return Description(name, folder, None, tuple(parts), _licence(folder), _source(folder), problems=tuple(problems))


def _describe_pipeline(folder: Path, name: str, release: str | None) -> Description:
    parts: list[Part] = []
    notes: list[str] = []
    problems: list[str] = []
    others = sorted(path.parent.name for path in folder.glob("*/*.safetensors") if path.parent.name != LORAS)
    for component in dict.fromkeys((*COMPONENTS, *others)):
        part, told, wrong = _component(folder / component)
        parts += [part] if part is not None else []
        notes += told
        problems += wrong
    more, broken = _files(sorted((folder / LORAS).glob("*.safetensors")))
    parts += [replace(part, name=f"{LORAS}/{part.name}") for part in more]
    problems += broken
    marker = read_marker(folder)
    try:
        found = _detect(folder, marker.repo if marker is not None else name)
        release = release or found
        if get_spec(found).tasks != get_spec(release).tasks:
            sides = {"found": found, "release": release}
            notes.append(Phrase("the configs are those of {found}, not of {release}; the folder wins.", **sides))
        notes[:0] = disagreements(get_spec(release), read_json(folder / "transformer" / "config.json"))
        notes += filter(None, [get_spec(release).licence])
    except ModelError as error:
        problems.append(told_by(error))
    return Description(
        name, folder, release, tuple(parts), _licence(folder), _source(folder), tuple(notes), tuple(problems)
    )


def _describe_bare(folder: Path, name: str) -> Description:
    """A model's folder without configs."""
    parts: list[Part] = []
    problems: list[str] = []
    places = bare_parts(folder)
    for component, place in places.items():
        try:
            checkpoint = open_weights(place, component)
            part = _part(component, guess_kind(checkpoint.infos), checkpoint.infos, len(set(checkpoint.where.values())))
            parts.append(count_values(part, {component: checkpoint}))
        except ModelError as error:
            problems.append(told_by(error))
    try:
        model = open_bare(folder, places)
    except ModelError as error:
        problems += [] if problems else [told_by(error)]
        return Description(
            name, folder, None, tuple(parts), _licence(folder), _source(folder), problems=tuple(problems)
        )
    about = {"licence": _licence(folder), "source": _source(folder), "notes": model.notes, "problems": tuple(problems)}
    runs = how_to_run(folder, "transformer", tuple(places), model.spec.name)
    return Description(name, folder, model.spec.name, tuple(parts), **about, runs=runs)


def _component(folder: Path) -> tuple[Part | None, tuple[str, ...], tuple[str, ...]]:
    """(the part, where config and tensors disagree, what makes it unusable)."""
    try:
        checkpoint = open_component(folder)
        config = read_json(folder / "config.json")
    except ModelError as error:
        return None, (), (told_by(error),)
    kind = guess_kind(checkpoint.infos)
    part = _part(folder.name, kind, checkpoint.infos, len(set(checkpoint.where.values())))
    if folder.name in COMPONENTS and kind.name != folder.name:
        mixed = Phrase(
            "{name} holds tensors of another kind ({kind}): is it mixed up?", name=folder.name, kind=kind.name
        )
        return part, (), (mixed,)
    try:
        part = count_values(part, {folder.name: checkpoint})
        return part, tuple(config_notes(folder.name, kind, config, shapes(checkpoint))), ()
    except ModelError as error:
        return part, (), (told_by(error),)


def _describe_file(path: Path) -> Description:
    if path.suffix in PICKLES:
        raise pickled(path)
    if is_gguf(path) and is_projector(read_gguf(path)):
        note = Phrase(
            "this is the half of a text encoder that sees: leave it beside its language model's file and name that."
        )
        return Description(path.name, path, None, (_file_part(path),), notes=(note,))
    part, found, problems = _file_part(path), {}, []
    try:
        found = open_file(path)
        part = count_values(part, found)
    except ModelError as error:
        problems.append(told_by(error))
    release, spec, notes = part.kind.release, None, ()
    if "transformer" in found:
        try:
            spec, notes = release_of(path, found["transformer"])
            release = spec.name
        except ModelError:  # too little of a transformer to tell more
            pass
    runs = how_to_run(path, part.kind.name, tuple(found), release)
    release = None if part.kind.name == "controlnet" else release  # what it belongs to, and is not
    return Description(path.name, path, release, (part,), notes=notes, problems=tuple(problems), runs=runs, spec=spec)


def told_by(error: ModelError) -> Phrase:
    """What is wrong, to be put into a person's language later."""
    return Phrase(error.sentence, **error.values)


def _files(files: Iterable[Path]) -> tuple[list[Part], list[str]]:
    """(what the readable ones are, what is wrong with the others)."""
    parts: list[Part] = []
    problems: list[str] = []
    for file in files:
        try:
            parts.append(_file_part(file))
        except ModelError as error:
            problems.append(told_by(error))
    return parts, problems


def _file_part(path: Path) -> Part:
    infos = open_gguf(path).infos if is_gguf(path) else read_header(path)
    infos = {ours: infos[theirs] for ours, theirs in our_codes(infos).items()}
    infos = translated(Checkpoint(path.name, dict.fromkeys(infos, path), infos)).infos
    return _part(path.name, guess_kind(infos), infos, 1)


def _part(name: str, kind: Kind, infos: Mapping[str, TensorInfo], files: int) -> Part:
    dtypes: dict[str, int] = {}
    for info in infos.values():
        dtypes[info.dtype] = dtypes.get(info.dtype, 0) + info.count
    by_count = dict(sorted(dtypes.items(), key=lambda item: -item[1]))
    size = sum(info.size for info in infos.values())
    return Part(name, kind, len(infos), sum(dtypes.values()), by_count, size, files)


def count_values(part: Part, components: Mapping[str, Checkpoint]) -> Part:
    """The same with the network's values counted instead of stored numbers, where some are packed, by how they are
    stored. Raises ModelError for a scheme this version can't read."""
    forms = {component: read_forms(checkpoint) for component, checkpoint in components.items()}
    if not any(forms.values()):
        return part
    counts: dict[str, int] = {}
    for component, checkpoint in components.items():
        aside = side_tensors(checkpoint.infos)
        for name, info in checkpoint.infos.items():
            path = name.removesuffix(".weight")
            form = forms[component].get(path) if path != name else None
            word, count = (form.words(), math.prod(form.shape)) if form is not None else (info.dtype, info.count)
            if name not in aside:
                counts[word] = counts.get(word, 0) + count
    by_count = dict(sorted(counts.items(), key=lambda item: -item[1]))
    return replace(part, dtypes=by_count, parameters=sum(counts.values()))


def how_to_run(path: Path, kind: str, components: tuple[str, ...], release: str | None) -> str:
    """A command line that draws with a file, "" where there is none; what the file lacks is named in it."""
    quoted = as_typed(path)
    if "transformer" in components:
        spec = get_spec(release or "qwen-image")
        verb = "layers PICTURE" if "layered" in spec.tasks else "generate 'WORDS'"
        verb = "edit PICTURE 'WORDS'" if "text_to_image" not in spec.tasks and "edit" in spec.tasks else verb
        lacking = [part for part in PARTS if part not in components] if base_of(spec, components) is None else []
        return f"lanting {verb} --model {quoted}" + "".join(f" --{name.replace('_', '-')} FILE" for name in lacking)
    if kind in ("vae", "text_encoder"):
        return f"lanting generate 'WORDS' --model MODEL --{kind.replace('_', '-')} {quoted}"
    if kind == "controlnet":
        model = release or "qwen-image"
        return f"lanting generate 'WORDS' --model {model} --controlnet {quoted} --control PICTURE"
    return f"lanting generate 'WORDS' --model MODEL --lora {quoted}" if kind == "lora" else ""


def _detect(folder: Path, hint: str) -> str:
    configs: list[Mapping[str, Any]] = [
        read_json(folder / name) for name in ("model_index.json", "transformer/config.json", "vae/config.json")
    ]
    return detect(*configs, hint=hint)


def _licence(folder: Path) -> str | None:
    """The licence a model card declares, or the first line of a LICENSE file."""
    card = folder / "README.md"
    if card.is_file():
        head = card.read_text(encoding="utf-8", errors="replace")[:20_000]
        front = re.match(r"---\s*\n(.*?)\n---", head, re.DOTALL)
        found = dict(
            re.findall(r"^(license(?:_name)?)\s*:\s*[\"']?([^\s\"'#]+)", front[1], re.MULTILINE) if front else []
        )
        if found:
            return found.get("license_name") or found["license"]
    for path in sorted(folder.glob("LICENSE*")):
        lines = path.read_text(encoding="utf-8", errors="replace")[:2000].split("\n")
        return next((line.strip()[:80] for line in lines if line.strip()), None)
    return None


def _source(folder: Path) -> dict[str, str]:
    marker = read_marker(folder)
    if marker is not None:
        return {"repo": marker.repo, "commit": marker.commit, "endpoint": marker.source}
    if folder.parent.name == "snapshots" and (cache := folder.parent.parent.name).startswith("models--"):
        return {"repo": cache.removeprefix("models--").replace("--", "/", 1), "commit": folder.name, "endpoint": ""}
    return {}
