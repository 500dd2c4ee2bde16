"""`lanting remove NAME`: delete a model that `lanting pull` brought, after asking."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Annotated

import typer

from lanting.cli import options as o
from lanting.cli.screen import Screen
from lanting.core.errors import ModelError
from lanting.core.lang import say


def remove(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="A release, OWNER/NAME, or OWNER/NAME/FILE, that was pulled.")
    ],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Don't ask.")] = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:
    """Delete a downloaded model, finished or not. Only what lanting pulled is ever deleted."""
    from lanting.specs import get_spec, spec_names
    from lanting.weights.home import (
        file_in,
        files_folder,
        folder_size,
        forget_file,
        lora_path,
        model_folder,
        models_folder,
    )
    from lanting.weights.pull import gigabytes

    if name == "nano":
        raise ModelError("{name} comes with this program and stays", name=name)
    if "/" not in name:
        get_spec(name)  # an unknown name: raises, naming the closest ones
    lora = lora_path(name) if name in spec_names() else None
    single = file_in(name)
    target = files_folder(single[0]) / single[1] if single else lora or model_folder(name)  # only what is its own
    if not target.exists():
        raise ModelError("{name} is not in {folder}: there is nothing to delete", name=name, folder=models_folder())
    size = gigabytes(folder_size(target) if target.is_dir() else target.stat().st_size)
    question = say("delete {path} ({size})?", path=str(target), size=size)
    if not yes and not (sys.stdin.isatty() and typer.confirm(question, err=True)):
        raise ModelError("nothing was deleted: {path} stays; say --yes to delete it unasked", path=str(target))
    _delete(target)
    if single is not None:
        forget_file(files_folder(single[0]), single[1])
    Screen(quiet).line("deleted: {path}, {size}", path=str(target), size=size)


def _delete(target: Path) -> None:
    """A link is removed itself, never what it leads to; the marker goes first, so a half-deleted model is none."""
    try:
        if target.is_symlink() or target.is_file():
            target.unlink()
            return
        for first in ("lanting.json", "model_index.json"):
            (target / first).unlink(missing_ok=True)
        shutil.rmtree(target)
    except OSError as error:
        raise ModelError(
            "{path} can't be deleted: {reason}", path=str(target), reason=error.strerror or str(error)
        ) from None
