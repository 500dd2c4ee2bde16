"""What a run has drawn and found so far, in the folder its results go to: one that was cancelled goes on from there.

Every picture is written as soon as it is drawn, whole or not at all, with its recipe, and stays; what was found in it
is a line of a journal until the results are there. A run goes on only with the settings, weights and versions it was
begun with, so that its results are those of one that was never interrupted. Rejected: to tell from the recipes alone
which pictures still count, since what differs would be seen after the next one was drawn.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lanting.core.errors import LantingError, OutputError
from lanting.core.files import replace_file, unwritable
from lanting.core.pictures import open_picture
from lanting.core.recipe import read_recipe
from lanting.core.save import Place, check_folder, save_picture
from lanting.evals.report import RESULTS
from lanting.train.journal import add_line, entries
from lanting.train.kept import alone, own_file, same_run

if TYPE_CHECKING:
    from PIL.Image import Image

    from lanting.core.types import Recipe
    from lanting.evals.draw import Tell

PICTURES, FOUND, BEGUN = "pictures", "found.jsonl", "unfinished.json"


@dataclass
class Kept:
    """A run's memory.

    folder  where the results go; None: everything is forgotten
    kind    what another run must have in common with this one to go on from it, by the names of flags
    begun   whether an earlier run left something to go on from
    """

    folder: Path | None = None
    kind: Mapping[str, Any] = field(default_factory=dict[str, Any])
    begun: bool = False
    found: dict[tuple[str, int], Any] = field(default_factory=dict[tuple[str, int], Any])

    @contextmanager
    def working(self) -> Iterator[None]:
        """Nobody else writes to the folder meanwhile, and nothing stays there where nothing was drawn. Raises
        OutputError, or ModelError where another run is at work there."""
        if self.folder is None:
            yield
            return
        try:
            self.folder.mkdir(exist_ok=True)
            with alone(self.folder):
                self._begin(self.folder)
                try:
                    yield
                finally:
                    with suppress(OSError):  # there are pictures
                        (self.folder / PICTURES).rmdir()
                        (self.folder / BEGUN).unlink()
        finally:
            with suppress(OSError):  # there is something else, or it isn't there at all
                self.folder.rmdir()

    def _begin(self, folder: Path) -> None:
        if self.begun:
            lines = (one for one in entries(folder / FOUND) if {"stage", "picture", "found"} <= set(one))
            self.found = {(one["stage"], one["picture"]): one["found"] for one in lines}
            return
        words = json.dumps(self.kind, ensure_ascii=False, indent=1) + "\n"
        try:
            (folder / PICTURES).mkdir(exist_ok=True)
            for old in (folder / PICTURES).iterdir():
                if re.fullmatch(r"(open-)?\d{5}\.png", old.name):
                    old.unlink()
            (folder / FOUND).unlink(missing_ok=True)
            replace_file(folder / BEGUN, lambda part: part.write_text(words, encoding="utf-8"))
        except OSError as error:
            raise unwritable(folder, error) from None

    def count(self) -> int:
        """Pictures that are there."""
        return 0 if self.folder is None else len(list(self.folder.glob(f"{PICTURES}/*.png")))

    def picture(self, name: str, prompt: str, seed: int) -> tuple[Image, Recipe] | None:
        """A picture that was kept, if it can still be read and is the one that was asked for."""
        if self.folder is None or not self.begun:
            return None
        path = self.folder / PICTURES / f"{name}.png"
        try:
            image, recipe = open_picture(path), read_recipe(path)
        except LantingError:
            return None
        return (image, recipe) if (recipe.request["prompt"], recipe.request["seed"]) == (prompt, seed) else None

    def keep(self, name: str, image: Image, recipe: Recipe) -> None:
        """Raises OutputError."""
        if self.folder is not None:
            save_picture(image, Place(self.folder / PICTURES / f"{name}.png", given=True, force=True), recipe)

    def judged(self, stage: str, count: int, tell: Tell, judge: Callable[[int], Any]) -> list[Any]:
        """What `judge(i)` finds in each of `count` pictures, as JSON's values; asked only where it is not known."""
        missing = [number for number in range(count) if (stage, number) not in self.found]
        if missing:
            with tell.stage(stage, len(missing)):
                for number in tell.each(missing):
                    self.found[stage, number] = found = judge(number)
                    self._note({"stage": stage, "picture": number, "found": found})
        return [self.found[stage, number] for number in range(count)]

    def _note(self, entry: dict[str, Any]) -> None:
        if self.folder is None:
            return
        try:
            add_line(self.folder / FOUND, entry)
        except OSError as error:
            raise unwritable(self.folder / FOUND, error) from None

    def done(self) -> None:
        """The results are written: there is nothing to go on with."""
        if self.folder is not None:
            for name in (BEGUN, FOUND):
                (self.folder / name).unlink(missing_ok=True)


def drawn_with(engine: Any) -> dict[str, Any]:
    """What of the engine decides the pictures, by the names of flags where there are any."""
    from lanting.engine.conditions import versions_of

    versions = {name: value for name, value in versions_of(engine.models).items() if name != "python"}
    named = {"--device": versions.pop("device"), "--dtype": versions.pop("dtype")}
    loras = [[lora.sha256, lora.strength] for lora in engine.loras]
    return versions | named | {"--model": [engine.spec.name, engine.models.fingerprint], "--lora": loras}


def kept_in(output: str | None, name: str, kind: Mapping[str, Any], force: bool = False) -> Kept:
    """The memory of a run whose results go to `output`, checked before any work and made when it begins.

    None: a new folder named after the run, or one where the same run was cancelled. `force` begins anew, over results
    that are there. Raises OutputError where the folder can't be written or holds results, ModelError where it belongs
    to another run.
    """
    kind = json.loads(json.dumps(kind))
    if output is None:
        check_folder(Path())
        stem = re.sub(r"[^\w.-]+", "-", name).strip("-") or "eval"
        for path in (Path(f"{stem}{number}") for number in ("", *(f"-{n}" for n in range(2, 10_000)))):
            if not path.exists():
                return Kept(path, kind)
            if not force and (path / BEGUN).is_file() and _begun(path) == kind:
                return Kept(path, kind, True)
    folder = Path(output or ".")
    check_folder(folder if folder.exists() else folder.parent)
    if force or not (folder / BEGUN).is_file():
        if not force and (taken := [one for one in (RESULTS, PICTURES) if (folder / one).exists()]):
            raise OutputError("{path} exists already: choose another name, or add --force", path=folder / taken[0])
        return Kept(folder, kind)
    same_run(folder, kind, _begun(folder))
    return Kept(folder, kind, True)


def _begun(folder: Path) -> dict[str, Any]:
    """What the run in a folder was begun with. Raises ModelError."""
    with own_file(folder):
        told: Any = json.loads((folder / BEGUN).read_text(encoding="utf-8"))
        return dict(told)
