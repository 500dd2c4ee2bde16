"""What all evaluations do beside asking and judging: what they go on from, what they tell, where their results go."""

from __future__ import annotations

import json as jsons
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lanting.cli.screen import Screen

if TYPE_CHECKING:
    from lanting.engine import Engine
    from lanting.evals.draw import Drawn
    from lanting.evals.kept import Kept

# what results call otherwise than flags do
FLAGS = {"language": "lang", "readers": "ocr", "open_prompts": "open", "edits": "kinds"}


@dataclass(frozen=True)
class Setup:
    """The flags all evaluations share."""

    model: str
    number: int
    seed: int
    steps: int | None
    guidance: float | None
    size: str | None
    lora: tuple[str, ...]
    device: str | None
    dtype: str | None
    output: str | None
    force: bool


def kept_for(setup: Setup, engine: Engine, kind: str, asked: Mapping[str, Any], more: str = "") -> Kept:
    """What there is of a run that asks this, in a folder that is checked; `more` of its name where none is given."""
    from lanting.evals.kept import drawn_with, kept_in

    flags = {"number": setup.number, "seed": setup.seed, "steps": setup.steps, "guidance": setup.guidance}
    flags |= {"size": setup.size, **asked}
    own = {f"--{FLAGS.get(flag, flag)}": value for flag, value in flags.items()}
    name = f"eval-{kind}-{engine.spec.name}{more}"
    return kept_in(setup.output, name, {"eval": kind, **own, **drawn_with(engine)}, setup.force)


@contextmanager
def working(screen: Screen, kept: Kept, pictures: int, judges: int) -> Iterator[None]:
    """Says what there is to do, and does it where nobody else does."""
    with kept.working():
        if kept.begun:
            values = {"folder": kept.folder, "count": kept.count(), "pictures": pictures}
            screen.note("going on in {folder}: {count} of {pictures} pictures are there", **values)
        else:
            values = {"pictures": pictures, "count": judges}
            screen.note(
                "{pictures} pictures to draw, judged by {count}; after Ctrl-C the same command goes on", **values
            )
        yield


def about(kind: str, setup: Setup, drawn: Sequence[Drawn]) -> dict[str, Any]:
    """What was measured on what: enough to measure it again."""
    from lanting import __version__

    recipe = drawn[0].recipe
    return {
        "eval": kind,
        "model": recipe.model,
        "weights": recipe.weights,
        "loras": [dict(lora) for lora in recipe.loras],
        "number": setup.number,
        "seed": setup.seed,
        "steps": recipe.request.get("steps"),
        "guidance_scale": recipe.request.get("guidance_scale"),
        "size": setup.size,
        "versions": {**recipe.versions, "lanting": __version__},
    }


def finish(screen: Screen, kept: Kept, results: dict[str, Any], tiles: list[tuple[Any, bool, str, str]]) -> None:
    """Writes the results, and says where; the pictures' own lines are in the file alone."""
    from lanting.evals.report import save
    from lanting.evals.sheet import Tile

    assert kept.folder is not None
    paths = save(kept.folder, results, [Tile(image, hit, tuple(words)) for image, hit, *words in tiles])
    kept.done()
    if screen.json:
        short = {name: value for name, value in results.items() if name != "pictures"}
        screen.raw(jsons.dumps(short | {"files": [str(path) for path in paths]}, ensure_ascii=False))
    elif screen.quiet:
        for path in paths:
            screen.raw(str(path))
    else:
        screen.line("{results}   {sheet} (misses first)", results=paths[0], sheet=paths[-1])
