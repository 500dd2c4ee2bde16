"""`lanting lora show FILE`: what a LoRA file is, what it fits, and why it might not work."""

from __future__ import annotations

import json as json_
from dataclasses import asdict
from pathlib import PurePath
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lanting.cli import options as o
from lanting.cli.screen import Screen
from lanting.core.lang import explain, say
from lanting.specs import get_spec, spec_names

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lanting.core.types import Request
    from lanting.weights.lora_doctor import Examined
    from lanting.weights.lora_file import Lora
    from lanting.weights.lora_wishes import Wishes

MOST = 8  # unmatched names that are printed
lora = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="LoRA files: what they are and what they fit.")


@lora.callback()
def _verbs() -> None:
    """LoRA files: what they are and what they fit."""


@lora.command("show")
def show_lora(
    file: Annotated[str, typer.Argument(metavar="FILE", help="A LoRA in a .safetensors file.")],
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="Compare with this release, folder or file. Default: all releases."),
    ] = None,
    json: o.Json = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> int:
    """Say who wrote a LoRA and how, which layers it changes, and which models it fits. Only the header is read.

    Exit code 2 when it fits nothing, or not the model that was named; every tensor without a place is told.
    """
    from lanting.weights.lora_doctor import examine

    found, screen = examine(file, model), Screen(quiet, json)
    if screen.json:
        screen.raw(json_.dumps(_table(found), ensure_ascii=False))
    elif screen.quiet:
        screen.raw(" ".join(found.fits))
    else:
        _print(screen, found)
    return 2 if found.problems else 0


def _print(screen: Screen, found: Examined) -> None:
    from lanting.weights.pull import gigabytes

    screen.line("{name}", name=found.name)
    screen.line("path: {path}", path=found.path)
    forms = ", ".join(f"{form} {count}" for form, count in found.forms.items()) or "-"
    count = sum(found.targets.values())
    screen.line("dialect: {dialect}; changes {count} Linears: {forms}", dialect=found.dialect, count=count, forms=forms)
    ranks = ", ".join(f"{rank}" if len(found.ranks) == 1 else f"{rank} ({n}×)" for rank, n in found.ranks.items())
    scales = ", ".join(f"{scale:.3g}" for scale in found.scales[:MOST])
    screen.line("rank: {ranks}; scale (alpha / rank): {scales}", ranks=ranks or "-", scales=scales or "-")
    screen.line("layers: {layers}", layers=", ".join(f"{kind} {n}" for kind, n in found.targets.items()) or "-")
    screen.line(
        "{size} in {tensors:,} tensors ({dtypes}): {matched:,} matched, {unmatched:,} not",
        size=gigabytes(found.bytes),
        tensors=found.tensors,
        dtypes=", ".join(found.dtypes),
        matched=found.matched,
        unmatched=len(found.unmatched),
    )
    if found.fits:
        screen.line("fits: {models}", models=", ".join(found.fits))
    else:
        screen.line("fits: none of the models it was compared with")
    _wishes(screen, found)
    for note in notes_of(found):
        screen.line("note: {text}", text=note)
    for key in found.unmatched[:MOST]:
        screen.line("no place for: {key}", key=key)
    if len(found.unmatched) > MOST:
        screen.line("... and {count:,} more", count=len(found.unmatched) - MOST)
    told: set[str] = set()
    for problem in found.problems:  # one of each sort: the tensors are named above
        if problem.sentence not in told:
            screen.line("problem: {text}", text=explain(problem))
        told.add(problem.sentence)


def tell_wishes(loras: Sequence[Lora], request: Request, screen: Screen, own: str = "") -> None:
    """One line for each LoRA that wants to be drawn with in its own way: what that is, or that it is not so. Of the
    release's `own` everybody knows it."""
    for lora in loras:
        guidance = request.guidance_scale or 0
        if lora.strength == 0 or not lora.wishes:
            continue
        if lora.wishes.few and guidance > 1:
            screen.note(
                "{file} is made for {steps} steps without guidance; with guidance {guidance:g} pictures come out "
                "harsh: say --guidance 1",
                file=lora.path.name,
                steps=lora.wishes.steps or say("few"),
                guidance=guidance,
            )
        elif lora.path.name != PurePath(own).name:
            screen.note("{file} wants {wishes}; flags override it", file=lora.path.name, wishes=words_of(lora.wishes))


def words_of(wishes: Wishes) -> str:
    """Steps, guidance and shift, as far as they are wished for."""
    told = [
        say("{steps} steps", steps=wishes.steps) if wishes.steps else "",
        say("guidance {guidance:g}", guidance=wishes.guidance_scale) if wishes.guidance_scale is not None else "",
        say("shift {shift:g}", shift=wishes.shift) if wishes.shift else "",
    ]
    return say(", ").join(filter(None, told))


def _wishes(screen: Screen, found: Examined) -> None:
    if words := words_of(found.wishes):
        screen.line("wants: {wishes}", wishes=words)
    if found.trained_on:
        screen.line("trained on, as the file says: {model}", model=found.trained_on)
    if found.trigger:
        screen.line("its word, as the file says: {word}", word=found.trigger)


def notes_of(found: Examined) -> list[str]:
    """What is worth knowing, as sentences."""
    notes: list[str] = []
    if found.wishes.few:
        notes.append(say("with guidance above 1 its pictures come out harsh: it was made to be drawn without"))
    if len(found.ranks) > 1:
        notes.append(say("the ranks differ from layer to layer; that is fine"))
    if found.stranger:
        notes.append(say("its layers have the names of {family}, another family of models", family=found.stranger))
    drawing = [name for name in found.fits if name in spec_names() and "edit" not in get_spec(name).tasks]
    if found.made_for_edits and drawing:
        notes.append(
            say(
                "it was made for editing; on {models} it loads, but what it does there is not known",
                models=", ".join(drawing),
            )
        )
    return notes


def _table(found: Examined) -> dict[str, Any]:
    """The same for programs."""
    return asdict(found) | {
        "path": str(found.path),
        "matched": found.matched,
        "problems": [explain(problem) for problem in found.problems],
        "notes": notes_of(found),
    }
