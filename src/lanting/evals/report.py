"""Results on disk: results.json and sheet.png in a folder of their own, each under a temporary name first."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lanting.core.files import replace_file, unwritable
from lanting.evals.sheet import Tile, sheet

RESULTS, SHEET = "results.json", "sheet.png"


def save(folder: Path, results: Mapping[str, Any], tiles: list[Tile]) -> list[Path]:
    """Writes both files and returns their paths. Raises OutputError."""
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise unwritable(folder, error) from None
    text = json.dumps(results, ensure_ascii=False, indent=1) + "\n"
    written = [_write(folder / RESULTS, lambda part: part.write_text(text, encoding="utf-8"))]
    if tiles:
        page = sheet(tiles)
        written.append(_write(folder / SHEET, lambda part: page.save(part, format="PNG")))
    return written


def _write(path: Path, how: Callable[[Path], object]) -> Path:
    try:
        replace_file(path, how)
        return path
    except OSError as error:
        raise unwritable(path, error) from None
