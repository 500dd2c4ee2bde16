"""From a request to files: what every drawing verb does, in one place.

The engine's events are drawn as a bar on a terminal and one plain line in a pipe. Everything that can be refused
(the request, the place to write to) is refused before the engine starts to work.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from lanting.cli import rewritten
from lanting.cli.drafts import drafting
from lanting.cli.fit import Limits, fit
from lanting.cli.lora import tell_wishes
from lanting.cli.options import Defaulted
from lanting.cli.read_back import places_of, tell
from lanting.cli.screen import Screen
from lanting.core.files import replace_file
from lanting.core.lang import say
from lanting.core.processes import as_typed
from lanting.core.quality import REUSED, computed
from lanting.core.recipe import control_entries, describe_request, request_of_picture
from lanting.core.save import places_for, save_all
from lanting.core.types import Progress, Recipe, Request, Result, prompts_of
from lanting.specs import ModelSpec, parse_size, settle

if TYPE_CHECKING:
    from lanting.engine import Engine

STARTED = time.perf_counter()
NO_LIMITS = Limits()


@dataclass(frozen=True, slots=True)
class Weights:
    """Where weights come from beside the model, and what they are packed as."""

    quant: str = "auto"
    text_encoder: str | None = None
    vae: str | None = None

    def options(self) -> dict[str, Any]:
        """For `Engine.open`, where they say anything."""
        parts = {"text_encoder": self.text_encoder, "vae": self.vae}
        chosen: dict[str, Any] = {"parts": parts} if any(parts.values()) else {}
        return chosen if self.quant == "auto" else chosen | {"quant": self.quant}


@dataclass(frozen=True, slots=True)
class Wish:
    """What the flags shared by all drawing verbs say."""

    model: str = "nano"
    size: str | None = None
    device: str | None = None
    dtype: str | None = None
    output: str | None = None
    force: bool = False
    preview: bool = False
    title: str = ""  # names the file where the prompt is empty
    controlnets: tuple[str, ...] = ()
    loras: tuple[str, ...] = ()  # FILE[:STRENGTH]
    weights: Weights = Weights()
    limits: Limits = NO_LIMITS
    draft: bool = False  # in few steps, to be finished later


@dataclass(frozen=True, slots=True)
class Drawn:
    """Pictures on disk, and what the engine told about them."""

    paths: tuple[Path, ...]
    result: Result
    request: Request

    @property
    def each(self) -> int:
        """Pictures in each file: more than one where a file takes all layers."""
        return len(self.result.images) // len(self.paths)

    @property
    def quoted(self) -> str:
        """The first file, as a shell would take it."""
        return as_typed(self.paths[0])

    @property
    def recipes(self) -> tuple[Recipe, ...]:
        """One for each file."""
        return self.result.recipes[:: self.each]


def open_engine(
    model: str,
    device: str | None,
    dtype: str | None,
    controlnets: tuple[str, ...] | None = None,
    loras: tuple[str, ...] = (),
    **weights: Any,
) -> Engine:
    """The engine; tests put a fake one here. `weights` are `Weights.options`, and the plan."""
    from lanting.engine import Engine

    return Engine.open(model, device=device, dtype=dtype, controlnet=controlnets, loras=loras, **weights)


def draw(request: Request, wish: Wish, screen: Screen, more: Callable[[Drawn], dict[str, Any]] | None = None) -> Drawn:
    """Draws, saves, and says where; `more` is what JSON says beside that. Raises LantingError before anything is
    written, or leaves nothing half-done."""
    with opened(request, wish, screen) as (engine, wish):
        settled = settle(replace(request, size=size_in(wish.size, engine.spec, request.size)), engine.spec)
        tell_wishes(engine.loras, settled, screen, engine.spec.lora)
        layers = settled.options["layers"] if settled.task == "layered" else 1
        places = places_for(wish.output, place_names(settled), layers, wish.title, wish.force)
        result = drawn_by(engine, settled, wish, places[0].path, screen)
        if result.readings:
            places = places_of(result, wish.output, wish.title, wish.force)
        paths = save_all(result.images, places, result.recipes)
    drawn = Drawn(paths, result, settled)
    report(drawn, wish, screen, more=more(drawn) if more and screen.json else {})
    return drawn


@contextmanager
def opened(request: Request, wish: Wish, screen: Screen) -> Iterator[tuple[Engine, Wish]]:
    """The engine for a request, closed at the end, and the wish with the model that is meant."""
    wish = _as_draft(_tell_default(wish, screen))
    options = wish.weights.options() | fit(request, wish, screen)
    engine = open_engine(wish.model, wish.device, wish.dtype, wish.controlnets, wish.loras, **options)
    try:
        for note in engine.notes:
            screen.note("note: {note}", note=note)
        yield engine, wish
    finally:
        engine.close()


def size_in(text: str | None, spec: ModelSpec, otherwise: tuple[int, int] | None) -> tuple[int, int] | None:
    return parse_size(text, spec) if text else otherwise


def _as_draft(wish: Wish) -> Wish:
    """The wish with the model and the LoRAs that draft, where a draft is wanted."""
    if not wish.draft:
        return wish
    model, loras = drafting(wish.model, wish.loras)
    return replace(wish, model=model, loras=loras)


def _tell_default(wish: Wish, screen: Screen) -> Wish:
    """Says which model, where no flag did but a person's own default; the rest then sees its plain name."""
    if isinstance(wish.model, Defaulted):
        screen.aside(say("model: {model} ({source})", model=str(wish.model), source=wish.model.source))
        return replace(wish, model=str(wish.model))
    return wish


def drawn_by(engine: Engine, request: Request, wish: Wish, path: Path, screen: Screen, which: str = "") -> Result:
    """The engine's work under a bar. `which` of several it is."""
    screen.begin(f"{which}{engine.spec.name} · {_cross(request.size)} · {_steps(request)}")
    preview = _previewer(path, screen) if wish.preview else None
    done = False
    try:
        found = _follow(engine, request, screen, preview)
        done = True
    finally:
        screen.end(done)
        if preview:
            with suppress(OSError):  # Windows keeps it as long as somebody looks at it
                _preview_path(path).unlink(missing_ok=True)
    return found


def _follow(engine: Engine, request: Request, screen: Screen, preview: Callable[[Progress], None] | None) -> Result:
    """Runs the engine; leaving early (Ctrl-C) closes the stream, which stops it."""
    with closing(engine.stream(request, previews=preview is not None)) as events:  # type: ignore[type-var]
        for event in events:
            if isinstance(event, Result):
                return event
            screen.progress(event)
            for notice in event.notices:
                screen.note(notice.sentence, **notice.values)
            if preview:
                preview(event)
    raise RuntimeError("the engine ended without a result")


def place_names(request: Request) -> list[tuple[str, int]]:
    """What the pictures of a settled request are named from: words and seed."""
    batch = (request_of_picture(request, index) for index in range(len(prompts_of(request)) * request.count))
    return [(str(one.prompt), one.seed or 0) for one in batch]


def _preview_path(path: Path) -> Path:
    return path.with_name(f"{path.stem}.preview.png")


def _previewer(path: Path, screen: Screen) -> Callable[[Progress], None]:
    """Keeps NAME.preview.png at the latest preview; an image viewer that watches the file shows it grow."""
    target = _preview_path(path)
    screen.note("the picture grows in {path}", path=target)

    def show(event: Progress) -> None:
        if event.preview is not None:
            preview = event.preview
            with suppress(PermissionError):  # the next one, then
                replace_file(target, lambda part: preview.save(part, format="PNG"))

    return show


def report(
    drawn: Drawn, wish: Wish, screen: Screen, brief: bool = False, more: Mapping[str, Any] = MappingProxyType({})
) -> None:
    """Where the pictures are; `brief`: one of many, `more` for JSON."""
    seconds, total = drawn.result.seconds, time.perf_counter() - STARTED
    if screen.json:
        screen.raw(json.dumps(_as_json(drawn, total) | dict(more), ensure_ascii=False))
        return
    if screen.quiet:
        for path in drawn.paths:
            screen.raw(str(path))
        return
    for path, recipe in zip(drawn.paths, drawn.recipes, strict=True):
        words = " ".join(str(recipe.request["prompt"]).split())
        shown = f'   "{words[:57]}..."' if len(words) > 60 else f'   "{words}"' if words else ""
        screen.line("{path}{prompt}   seed {seed}", path=path, prompt=shown, seed=recipe.request["seed"])
    rewritten.tell(drawn.recipes, screen)
    _tell_choices(drawn, screen)
    tell(drawn.result.readings, drawn.paths, screen)
    if brief:
        return
    phases = ", ".join(f"{name} {spent:.1f} s" for name, spent in seconds.items())
    screen.line("read, drawn and saved in {seconds:.1f} s ({phases})", seconds=total, phases=phases)
    screen.line("again: lanting replay {path}", path=drawn.quoted)
    if wish.draft:
        screen.line("the whole model: lanting finish {path}", path=drawn.quoted)


def _tell_choices(drawn: Drawn, screen: Screen) -> None:
    """What was left out, where something may be."""
    asked = drawn.result.recipes[0].request
    words = str((asked.get("choices") or {}).get("steps", "")).split()
    if not words:
        return
    whole, guided = computed(words), sum(len(word) == 2 and word[1] != REUSED for word in words)
    facts = {"quality": asked.get("quality"), "whole": whole, "steps": len(words), "guided": guided}
    beside = sum(word[0].islower() for word in words)
    if beside:
        screen.line(
            "quality {quality}: {whole} of {steps} steps in full, {guided} guided, {beside} beside kept references",
            **facts | {"beside": beside},
        )
    else:
        screen.line("quality {quality}: {whole} of {steps} steps in full, {guided} guided", **facts)


def _as_json(drawn: Drawn, total: float) -> dict[str, Any]:
    first = drawn.result.recipes[0]
    several = {"layers": drawn.each} if drawn.each > 1 else {}
    files = [
        {"path": str(path), "seed": recipe.request["seed"], "size": list(image.size), "weights": recipe.weights}
        | several
        for path, image, recipe in zip(drawn.paths, drawn.result.images[:: drawn.each], drawn.recipes, strict=True)
    ]
    for file, reading in zip(files, drawn.result.readings, strict=bool(drawn.result.readings)):
        file["text"] = reading.as_json()
    seconds = {name: round(spent, 3) for name, spent in drawn.result.seconds.items()} | {"total": round(total, 3)}
    return {
        "files": files,
        **rewritten.as_json(first),
        "model": first.model,
        "task": first.task,
        "request": describe_request(drawn.request),
        "versions": dict(first.versions),
        "loras": [dict(lora) for lora in first.loras],
        **control_entries(first),
        "seconds": seconds,
    }


def _cross(size: tuple[int, int] | None) -> str:
    return "{}×{}".format(*size) if size else ""


def _steps(request: Request) -> str:
    return f"{request.steps} steps" if request.steps != 1 else "1 step"
