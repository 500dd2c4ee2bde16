"""Results on disk: results.json and sheet.png in a folder of their own, each under a temporary name first."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lanting.core.errors import OutputError
from lanting.core.files import replace_file, unwritable
from lanting.core.save import check_folder
from lanting.evals.sheet import Tile, sheet

RESULTS, SHEET = "results.json", "sheet.png"


def folder_for(output: str | None, name: str, force: bool = False) -> Path:
    """The folder the results go to, checked before any work: the given one, or a new one named after the run.

    Raises OutputError where it can't be written, or holds results already and `force` is not given.
    """
    if output is None:
        stem = re.sub(r"[^\w.-]+", "-", name).strip("-") or "eval"
        check_folder(Path())
        return next(path for path in (Path(f"{stem}{n}") for n in _numbers()) if not path.exists())
    folder = Path(output)
    check_folder(folder if folder.exists() else folder.parent)
    if (folder / RESULTS).exists() and not force:
        raise OutputError("{path} exists already: choose another name, or add --force", path=folder / RESULTS)
    return folder


def _numbers() -> list[str]:
    return ["", *(f"-{number}" for number in range(2, 10_000))]


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
