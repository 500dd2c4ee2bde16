"""`lanting list`: which releases there are, what this machine has of them, and what else it has."""

from __future__ import annotations

import json as json_
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from lanting.cli import options as o
from lanting.cli.screen import Screen
from lanting.specs import get_spec, spec_names


@dataclass(frozen=True, slots=True)
class Row:
    """One model. `where`: embedded, here, cache (Hugging Face's), partial, or absent."""

    name: str
    release: str | None
    tasks: tuple[str, ...]
    where: str
    path: str | None = None
    bytes: int | None = None


def list_models(json: o.Json = False, quiet: o.Quiet = False, debug: o.Debug = False) -> None:
    """List the releases, and every model that is on this machine."""
    screen = Screen(quiet, json)
    rows = [*_releases()]
    rows += _others({row.path for row in rows})
    rows += _files()
    if screen.json:
        screen.raw(json_.dumps([asdict(row) for row in rows], ensure_ascii=False))
        return
    width = max(len(row.name) for row in rows)
    for row in rows:
        if not screen.quiet:
            _show(screen, row, width)
        elif row.where in ("embedded", "here", "cache"):
            screen.raw(row.name)


def _releases() -> Iterator[Row]:
    """Every release we know, nano first."""
    from lanting.weights.home import downloaded, embedded_nano, folder_size, hub_cache, model_folder, unfinished

    for name in sorted(spec_names(), key=lambda name: (name != "nano", name)):
        tasks = get_spec(name).tasks
        folder = embedded_nano() if name == "nano" else downloaded(name)
        if folder is not None and (folder / "model_index.json").is_file():
            where = "embedded" if name == "nano" else "cache" if folder.is_relative_to(hub_cache()) else "here"
            yield Row(name, name, tasks, where, str(folder), folder_size(folder))
        elif name != "nano" and (begun := unfinished(model_folder(name))) is not None:
            yield Row(name, name, tasks, "partial", str(model_folder(name)), begun.have)
        else:
            yield Row(name, name, tasks, "absent")


def _others(known: set[str | None]) -> Iterator[Row]:
    """Models that were pulled by repository, and those in the Hugging Face cache that are of this family."""
    from lanting.core.errors import ModelError
    from lanting.weights.find import open_folder
    from lanting.weights.home import cached_snapshots, folder_size, missing_weights, models_folder, read_marker

    pulled = [(path, read_marker(path)) for path in sorted(models_folder().glob("*/")) if str(path) not in known]
    found = [(marker.repo, path, "here") for path, marker in pulled if marker is not None]
    for repo, path in cached_snapshots():
        if str(path) not in known and not missing_weights(path):
            found.append((repo, path, "cache"))
    for repo, path, where in found:
        try:
            spec = open_folder(Path(path), repo).spec
        except ModelError:  # another family, or a folder that is no pipeline
            if where == "here":
                yield Row(repo, None, (), where, str(path), folder_size(path))
            continue
        yield Row(repo, spec.name, spec.tasks, where, str(path), folder_size(path))


def _files() -> Iterator[Row]:
    """Single files that were pulled."""
    from lanting.weights.home import read_marker, single_files

    for folder in sorted(single_files().glob("*/")):
        marker = read_marker(folder)
        for name in sorted(marker.files if marker is not None else ()):
            path = folder / name
            if marker is not None and path.is_file():
                yield Row(f"{marker.repo}/{name}", None, (), "here", str(path), path.stat().st_size)


def _show(screen: Screen, row: Row, width: int) -> None:
    from lanting.weights.pull import gigabytes

    name, size, tasks = row.name.ljust(width), gigabytes(row.bytes or 0), ", ".join(row.tasks)
    if row.where == "embedded":
        screen.line("{name}   ships with lanting   {size}   {tasks}", name=name, size=size, tasks=tasks)
    elif row.where in ("here", "cache"):
        screen.line("{name}   {path}   {size}   {tasks}", name=name, path=row.path, size=size, tasks=tasks)
    elif row.where == "partial":
        screen.line("{name}   here in part, {size}: lanting pull {release}", name=name, size=size, release=row.release)
    else:
        screen.line("{name}   not here: lanting pull {release}", name=name, release=row.name)
