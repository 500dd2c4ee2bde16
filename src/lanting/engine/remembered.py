"""Which parts of a model have to run in a safer way on this machine: for the process, and in a file for the next one.

The file is a few lines of JSON in our folder of the cache. It is written as a whole or not at all, and one that can't
be read is taken as empty: all it costs is finding out again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from lanting.core.files import replace_file
from lanting.weights.home import home

FORMAT = 1
MOST = 64  # models kept, the last ones
LARGEST = 1 << 20  # bytes


class Remembered:
    """Part -> way of one model. `key` says everything that decides whether its numbers fit."""

    def __init__(self, key: str, path: Path | None = None):
        self.key, self.path = key, path or home() / "safe.json"
        self.ways: dict[str, str] = dict(read(self.path).get(key, {}))

    def add(self, ways: Mapping[str, str]) -> None:
        """Keep these, too. A folder that can't be written to is nothing to complain about."""
        if all(self.ways.get(path) == way for path, way in ways.items()):
            return
        self.ways |= ways
        table = read(self.path)
        table.pop(self.key, None)
        table[self.key] = self.ways
        with suppress(OSError):
            write(self.path, dict(list(table.items())[-MOST:]))


def read(path: Path) -> dict[str, dict[str, str]]:
    """The file's table by key; empty where there is none, or none of ours."""
    try:
        if path.stat().st_size > LARGEST:
            return {}
        table: Any = json.loads(path.read_text(encoding="utf-8"))
        models = table["models"] if table["lanting"] == FORMAT else {}
        return {str(key): {str(part): str(way) for part, way in ways.items()} for key, ways in models.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


def write(path: Path, models: Mapping[str, Mapping[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"lanting": FORMAT, "models": models}, indent=1)
    replace_file(path, lambda part: part.write_text(text, encoding="utf-8"))
