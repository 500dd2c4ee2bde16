"""`lanting list`: which releases there are, and which of them this machine has."""

from __future__ import annotations

import json as json_
from pathlib import Path

from lanting.cli import options as o
from lanting.cli.screen import Screen
from lanting.specs import get_spec, spec_names


def list_models(json: o.Json = False, quiet: o.Quiet = False, debug: o.Debug = False) -> None:
    """List the releases and where each one is."""
    from lanting.weights.home import downloaded, embedded_nano, folder_size

    screen = Screen(quiet, json)
    rows: list[dict[str, object]] = []
    for name in sorted(spec_names(), key=lambda name: (name != "nano", name)):
        folder: Path | None = embedded_nano() if name == "nano" else downloaded(name)
        here = folder is not None and (folder / "model_index.json").is_file()
        size = folder_size(folder) if folder is not None and here else None
        tasks = list(get_spec(name).tasks)
        rows.append({"name": name, "tasks": tasks, "path": str(folder) if here else None, "bytes": size})
    if screen.json:
        screen.raw(json_.dumps(rows, ensure_ascii=False))
        return
    width = max(len(str(row["name"])) for row in rows)
    for row in rows:
        name = str(row["name"]).ljust(width)
        if screen.quiet and row["path"]:
            screen.raw(str(row["name"]))
        elif row["name"] == "nano" and row["path"]:
            screen.line("{name}   ships with lanting   {size}", name=name, size=_gigabytes(row["bytes"]))
        elif row["path"]:
            size = _gigabytes(row["bytes"])
            screen.line("{name}   {path}   {size}", name=name, path=row["path"], size=size)
        else:
            screen.line("{name}   not here: lanting pull {release}", name=name, release=row["name"])


def _gigabytes(size: object) -> str:
    number = size if isinstance(size, int) else 0
    return f"{number / 1e9:.1f} GB" if number >= 1e9 else f"{number / 1e6:.0f} MB"
