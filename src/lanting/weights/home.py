"""Where models live on this machine, and how a finished download is told from a half-done one.

`lanting.json` is written last, when every file has been checked, so its absence means "not finished".
Rejected: the hub's own cache of symbolic links, because people want a folder they can look into, move to
another disk and give to diffusers; models that are already in that cache are found and used where they are.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from importlib import resources
from pathlib import Path, PurePosixPath
from typing import Any

from lanting.core.errors import ModelError
from lanting.core.files import replace_file
from lanting.specs import get_spec, release_in, spec_names

COMPONENTS = ("transformer", "vae", "text_encoder")  # of a model, each in a folder of its own
MARKER = "lanting.json"
STAGING = ".lanting-pull"  # inside a model's folder: what a pull has fetched so far
REPO = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
WEIGHTS = (".safetensors", ".gguf")  # files of weights; other kinds are never read
SEGMENT = re.compile(r"[A-Za-z0-9_\-][A-Za-z0-9._+@=,() \-]{0,200}")


@dataclass(frozen=True, slots=True)
class Marker:
    """What `lanting.json` records of a finished download."""

    repo: str  # "owner/name"
    revision: str  # what was asked: a branch, a tag or a commit
    commit: str  # what that was at the time
    source: str  # the endpoint it came from
    files: Mapping[str, Mapping[str, Any]] = field(default_factory=dict[str, Mapping[str, Any]])
    # path -> {"size": bytes, "digest": sha256 of a large file, git's sha1 of a small one}


def home(environ: Mapping[str, str] | None = None) -> Path:
    """Our folder for downloads: LANTING_HOME, else `lanting` in the user's cache folder."""
    env = os.environ if environ is None else environ
    if given := env.get("LANTING_HOME", ""):
        return Path(given).expanduser()
    cache = env.get("XDG_CACHE_HOME", "")
    return (Path(cache) if cache else Path.home() / ".cache") / "lanting"


def models_folder() -> Path:
    """All downloaded models, one folder each."""
    return home() / "models"


def check_repo(name: str) -> str:
    """The same "owner/name", or a ModelError: it becomes part of a path and of an address."""
    if not REPO.fullmatch(name) or ".." in name or "--" in name:
        raise ModelError("{name} is no repository name: it should look like owner/name", name=repr(name))
    return name


def model_folder(name: str) -> Path:
    """Where the weights of a release, or of a raw "owner/name", are kept once downloaded.

    Releases that share a repository (a distilled one and its base) share a folder, also when asked for by
    repository.
    """
    if name in spec_names():
        return models_folder() / _keeper(get_spec(name).repo, name)
    return models_folder() / _keeper(check_repo(name), name.replace("/", "--"))


def lora_path(name: str) -> Path | None:
    """Where a distilled release keeps the LoRA that makes it so; None for a release without one."""
    spec = get_spec(name)
    if not spec.lora:
        return None
    owner, repo, *path = spec.lora.split("/")
    folder = home() / "loras" / check_repo(f"{owner}/{repo}").replace("/", "--")
    return inside(folder, "/".join(path))


def file_in(name: str) -> tuple[str, str] | None:
    """("owner/name", path) of a single file of a repository, "owner/name/path/file.gguf"; None for other words."""
    parts = name.split("/")
    repo, path = "/".join(parts[:2]), parts[2:]
    plain = path and name.endswith(WEIGHTS) and all(SEGMENT.fullmatch(part) for part in path)
    known = plain and REPO.fullmatch(repo) and not any(word in repo for word in ("..", "--"))
    return (repo, "/".join(path)) if known else None


def single_files() -> Path:
    """All files that were pulled by themselves, a folder for each repository."""
    return home() / "files"


def files_folder(repo: str) -> Path:
    """Where single files of a repository are kept."""
    return single_files() / check_repo(repo).replace("/", "--")


def path_of(given: str) -> Path:
    """A path as it was given; where nothing is there, that of a pulled file of this name, "owner/name/file.gguf",
    which came alone or with its repository. Raises ModelError for no name at all, which would be the folder here."""
    if not given.strip():
        raise ModelError("the name is empty: give a release, a folder or a file")
    path = Path(given).expanduser()
    found = None if path.exists() else file_in(given)
    folders = [] if found is None else [files_folder(found[0]), model_folder(found[0])]
    return next((kept for folder in folders if found and (kept := folder / found[1]).is_file()), path)


def embedded_nano() -> Path:
    """The checkpoint inside this package."""
    return Path(str(resources.files("lanting"))) / "nano"


def hub_cache(environ: Mapping[str, str] | None = None) -> Path:
    """The Hugging Face cache, found as its own library finds it."""
    env = os.environ if environ is None else environ
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if given := env.get(name, ""):
            return Path(os.path.expandvars(given)).expanduser()
    if given := env.get("HF_HOME", ""):
        return Path(os.path.expandvars(given)).expanduser() / "hub"
    cache = env.get("XDG_CACHE_HOME", "")
    return (Path(cache) if cache else Path.home() / ".cache") / "huggingface" / "hub"


def cached_snapshots() -> Iterator[tuple[str, Path]]:
    """("owner/name", folder) of every model in the Hugging Face cache that is in diffusers' layout.

    Where a model has several snapshots, the one its main branch names comes first, then the newest.
    """
    for folder in sorted(hub_cache().glob("models--*--*")):
        repo = folder.name.removeprefix("models--").replace("--", "/", 1)
        try:  # of a shared cache not all may be read
            current = (folder / "refs" / "main").read_text(encoding="utf-8").strip()
        except (OSError, ValueError):
            current = ""
        snapshots = [path.parent for path in folder.glob("snapshots/*/model_index.json")]
        snapshots.sort(key=lambda path: (path.name != current, -path.stat().st_mtime))
        for snapshot in snapshots:
            yield repo, snapshot


def downloaded(name: str) -> Path | None:
    """A finished model of that name on this machine: our own download first, then the Hugging Face cache."""
    folder = model_folder(name)
    lora = lora_path(name) if name in spec_names() else None
    if lora is not None and not lora.is_file():
        return None
    if read_marker(folder) is not None and not missing_files(folder):
        return folder
    if not (folder / MARKER).exists() and not (folder / STAGING).exists() and not missing_weights(folder):
        return folder  # put there by hand
    repo = get_spec(name).repo if name in spec_names() else name
    for cached, snapshot in cached_snapshots():
        if cached == repo and not missing_weights(snapshot):
            return snapshot
    return None


def read_marker(folder: Path) -> Marker | None:
    """What a finished download recorded; None where there is none or it can't be read."""
    try:
        table = json.loads((folder / MARKER).read_text(encoding="utf-8"))
        marker = Marker(**table)
    except (OSError, ValueError, TypeError):
        return None
    sound = isinstance(marker.files, dict) and all(isinstance(entry, dict) for entry in marker.files.values())
    return marker if sound else None


def write_marker(folder: Path, marker: Marker) -> None:
    """Write `lanting.json` whole or not at all."""
    text = json.dumps(asdict(marker), indent=1, ensure_ascii=False) + "\n"
    replace_file(folder / MARKER, lambda part: part.write_text(text, encoding="utf-8"))


@dataclass(frozen=True, slots=True)
class Unfinished:
    """A download that was begun: bytes here of bytes in all, and the files that are not here."""

    have: int
    total: int
    missing: tuple[str, ...]


def note_begun(folder: Path, files: Mapping[str, tuple[int, str]], total: int) -> None:
    """Leave word in the staging folder of what is being fetched: path -> (size, staged name), and all bytes."""
    table = {"total": total, "files": {path: [size, key] for path, (size, key) in files.items()}}
    (folder / STAGING / "begun.json").write_text(json.dumps(table), encoding="utf-8")


def unfinished(folder: Path) -> Unfinished | None:
    """How far a download came that did not end; None where none was begun."""
    staging = folder / STAGING
    try:
        table = json.loads((staging / "begun.json").read_text(encoding="utf-8"))
        files, total = dict(table["files"]), int(table["total"])
        have = total - sum(int(size) for size, _ in files.values())
        missing: list[str] = []
        for path, (size, key) in files.items():
            part = staging / f"{key}.part"
            if (staging / key).is_file():
                have += int(size)
                continue
            have += part.stat().st_size if part.is_file() else 0
            missing.append(path)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return Unfinished(have, total, tuple(missing))


def missing_files(folder: Path) -> list[str]:
    """Files that the marker promises and that are gone or have another size; everything, without a marker."""
    marker = read_marker(folder)
    if marker is None:
        return [MARKER]
    return [name for name, entry in marker.files.items() if not _has(folder, name, entry.get("size"))]


def missing_weights(folder: Path) -> list[str]:
    """Shards that an index in a diffusers folder names and that are not there; components' configs too."""
    missing = [f"{part}/config.json" for part in COMPONENTS if not (folder / part / "config.json").is_file()]
    for part in COMPONENTS:
        indexes = sorted((folder / part).glob("*.safetensors.index.json"))
        if not indexes and not any((folder / part).glob("*.safetensors")):
            missing.append(f"{part}/*.safetensors")
        for index in indexes:
            try:
                shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            except (OSError, ValueError, KeyError, TypeError, AttributeError):
                missing.append(f"{part}/{index.name}")
                continue
            missing += [f"{part}/{shard}" for shard in sorted(shards) if not (index.parent / str(shard)).is_file()]
    return missing


def inside(folder: Path, name: str) -> Path:
    """The path of a file that a hub names, or a ModelError where it would lie outside the folder.

    The name is checked letter by letter, and the resolved path again: a link inside the folder may lead out.
    """
    parts = PurePosixPath(name).parts
    plain = bool(parts) and "/".join(parts) == name and all(SEGMENT.fullmatch(part) for part in parts)
    path = folder.joinpath(*parts)
    if not plain or not path.resolve().is_relative_to(folder.resolve()):
        raise ModelError(
            "the hub lists a file called {name}, which could land outside its folder: don't trust this model",
            name=repr(name),
        )
    return path


def forget_file(folder: Path, name: str) -> None:
    """Strike a deleted file from the marker of its folder; a folder of which nothing is left goes, too."""
    marker = read_marker(folder)
    left = {} if marker is None else {path: entry for path, entry in marker.files.items() if path != name}
    if marker is not None and left:
        write_marker(folder, replace(marker, files=left))
    else:
        shutil.rmtree(folder, ignore_errors=True)


def folder_size(folder: Path) -> int:
    """Bytes of all files in a folder; a link counts as what it points to."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _keeper(repo: str, otherwise: str) -> str:
    """The release that gives a repository's folder its name."""
    return release_in(repo) or otherwise


def _has(folder: Path, name: str, size: Any) -> bool:
    try:
        return inside(folder, name).stat().st_size == size
    except (OSError, ModelError):
        return False
