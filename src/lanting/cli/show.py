"""`lanting show NAME`: what a release, a folder or a weights file is, from headers and configs alone.

With `--machine` it is this computer that is shown."""

from __future__ import annotations

import json as json_
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lanting.cli import options as o
from lanting.cli.screen import Screen
from lanting.core.errors import RequestError
from lanting.core.lang import said, say
from lanting.specs import get_spec

if TYPE_CHECKING:
    from lanting.weights.inspect import Description, Part


def show(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="A release, a model folder, or a weights file.")
    ] = None,
    machine: Annotated[
        bool, typer.Option("--machine", help="Of this computer instead: processor, memory, kernels, GPUs.")
    ] = False,
    json: o.Json = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> int:
    """Say what a model or a weights file is: tasks, parts, sizes, defaults. Exit code 2 when it is damaged."""
    if machine == (name is not None):
        raise RequestError("say what to show: NAME, or --machine for this computer")
    if name is None:
        return computer(Screen(quiet, json))
    from lanting.weights.inspect import describe

    told, screen = describe(name), Screen(quiet, json)
    if screen.json:
        screen.raw(json_.dumps(_table(told), ensure_ascii=False))
    else:
        _head(screen, told)
        _parts(screen, told.parts)
        for note in told.notes:
            screen.line("note: {text}", text=note)
        if told.runs and not told.problems:
            screen.line("to use it: {command}", command=told.runs)
        for problem in told.problems:
            screen.line("problem: {text}", text=problem)
    return 2 if told.problems else 0


def computer(screen: Screen) -> int:
    """`--machine`."""
    from lanting.cli.machine import facts, tell

    if screen.json:
        screen.raw(json_.dumps(facts(), ensure_ascii=False))
    else:
        tell(screen)
    return 0


def _head(screen: Screen, told: Description) -> None:
    screen.line("{name}", name=told.name)
    if told.path is not None:
        screen.line("path: {path}", path=told.path)
    if told.source:
        screen.line("from: {repo} {commit}", repo=told.source["repo"], commit=told.source["commit"][:12])
    if told.licence:
        screen.line("licence: {licence}", licence=told.licence)
    if told.release is None:
        return
    spec = told.spec or get_spec(told.release)
    own, extra = spec.defaults, ", ".join(f"{key} {w}×{h}" for key, (w, h) in spec.defaults.sizes.items())
    screen.line("release: {release}; tasks: {tasks}", release=spec.name, tasks=", ".join(spec.tasks))
    screen.line(
        "defaults: {steps} steps, guidance {guidance}, {width}×{height} ({sizes})",
        steps=own.steps,
        guidance=f"{own.guidance_scale:g}" if own.guidance_scale > 1 else say("off"),
        width=own.size[0],
        height=own.size[1],
        sizes=extra,
    )


def _parts(screen: Screen, parts: tuple[Part, ...]) -> None:
    """One line a part, in columns; a last line for all of them."""
    from lanting.weights.pull import gigabytes

    cells = [
        (
            part.name,
            ", ".join(filter(None, (part.kind.name, said(part.kind.detail)))),
            say("{count} tensors", count=f"{part.tensors:,}"),
            say("{count} parameters", count=_count(part.parameters)),
            "+".join(part.dtypes) or "-",
            gigabytes(part.bytes),
        )
        for part in parts
    ]
    if len(parts) > 1:
        tensors, parameters = sum(part.tensors for part in parts), sum(part.parameters for part in parts)
        size = gigabytes(sum(part.bytes for part in parts))
        counts = say("{count} tensors", count=f"{tensors:,}"), say("{count} parameters", count=_count(parameters))
        cells.append((say("together"), "", *counts, "", size))
    screen.table(cells, gap="   ")


def _count(number: int) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6)):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return f"{number:,}"


def _table(told: Description) -> dict[str, Any]:
    """The same for programs, with the release's tasks and defaults."""
    table = asdict(told) | {"path": str(told.path) if told.path is not None else None, "tasks": [], "defaults": None}
    if told.release is not None:
        spec = told.spec or get_spec(told.release)
        table |= {"tasks": list(spec.tasks), "defaults": asdict(spec.defaults)}
    return table
