"""`lanting plan MODEL`: what fits this machine (or another), at what cost, before a weight is read."""

from __future__ import annotations

import json as json_
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lanting.cli import options as o
from lanting.cli.fit import Limits, model_named
from lanting.cli.screen import Screen
from lanting.core.errors import RequestError
from lanting.core.lang import say
from lanting.specs import parse_size
from lanting.specs.numbers import whole
from lanting.specs.rewriting import check_writes

if TYPE_CHECKING:
    from lanting.plan import Budget, Machine, Plan


def plan(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A release (also one that is not here), a model folder, or a file.")
    ] = "nano",
    size: o.Size = None,
    references: Annotated[int, typer.Option("--references", help="Pictures an edit looks at, 0 to 10.")] = 0,
    task: Annotated[
        str | None, typer.Option("--task", help="text_to_image, edit, layered, ...; default: usual.")
    ] = None,
    vram: o.Vram = None,
    ram: o.Ram = None,
    device: Annotated[
        str | None, typer.Option("--device", help="cpu, cuda, cuda:1, mps, or a card such as 'RTX 4090' or 'M4 Max'.")
    ] = None,
    rewrite: Annotated[
        bool, typer.Option("--rewrite", help="With the text encoder's head, which rewrites prompts.")
    ] = False,
    controlnet: Annotated[
        list[str] | None,
        typer.Option("--controlnet", metavar="FILE|FOLDER", help="With a ControlNet beside the model; repeatable."),
    ] = None,
    quant: Annotated[str | None, typer.Option("--quant", help="Consider this kind of weights only.")] = None,
    json: o.Json = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:
    """Say which ways of running a model fit, what each costs in memory, time and quality, and which is chosen.

    Exit code 2 where nothing fits, with an amount of memory that would do.
    """
    from lanting.plan import plan as choose
    from lanting.plan import survey, usual_job
    from lanting.weights.sized import beside

    whole("references", references, 0, 10)
    found, budget = model_named(model), Limits(vram, ram).budget()
    if task is not None and task not in found.spec.tasks:
        able = ", ".join(found.spec.tasks)
        raise RequestError("{model} can't do {task}; it does {able}", model=found.name, task=task, able=able)
    found = replace(found, extra=beside((), controlnet or ()))
    job = usual_job(found, parse_size(size, found.spec) if size else None, references, task)
    if rewrite:
        check_writes(found.spec)
        job = replace(job, writes=True)
    machine, name, budget = place(device, budget)
    chosen = choose(found, job, machine, budget, name, quant)
    rows = survey(found, job, machine, budget, name)
    screen = Screen(quiet, json)
    if json or quiet:
        screen.raw(json_.dumps(table(chosen, rows), ensure_ascii=False) if json else chosen.sentence())
        return
    where = machine.device(name)
    memory = say("{size} VRAM", size=_size(where.free)) + ", " if where.own_memory else ""
    memory += say("{size} RAM", size=_size(machine.ram_free))
    shape = f"{job.size[0]}×{job.size[1]}"
    screen.line(
        "{model} · {shape} · {device}, {memory} free", model=found.name, shape=shape, device=where.title, memory=memory
    )
    show(screen, chosen, rows, job.steps)


def place(device: str | None, budget: Budget) -> tuple[Machine, str | None, Budget]:
    """The machine to plan for, the device there, and what is left to limit: this one, or one with the card named."""
    from lanting.plan import Device, detect, find_card, machine_of

    own = device is None or device.replace(",", ":").split(":")[0] in ("cpu", "cuda", "mps")
    machine = detect()
    if own and budget.vram and not any(each.own_memory for each in machine.devices) and device in (None, "cuda"):
        title = say("a GPU with {size}", size=_size(budget.vram))
        card = Device("cuda", title, budget.vram, budget.vram)
        return replace(machine, devices=(card, *machine.devices)), "cuda", budget
    if own:
        return machine, device, budget
    card = find_card(str(device))
    if card is None:
        raise RequestError(
            "the device {name} is none we know: use cpu, cuda, mps, or a card listed in docs/devices.md",
            name=repr(device),
        )
    return machine_of(card, budget.ram), None, budget


def show(screen: Screen, chosen: Plan, rows: list[tuple[Plan, bool]], steps: int) -> None:
    """The table, the chosen row marked, and the reasons."""
    from lanting.plan.words import encoder, residence, seconds

    same = [(chosen if plan.transformer == chosen.transformer else plan, fits) for plan, fits in rows]
    head = ["", say("weights"), "transformer", say("text encoder"), say("VRAM"), say("RAM"), say("load"), say("image")]
    cells = [[*head, say("error")]]
    for plan, fits in same:
        reader = f"{plan.text_encoder}, {encoder(plan)}"
        memory = [_size(plan.peak_vram) if plan.peak_vram else "-", _size(plan.peak_ram)]
        times = [seconds(plan.load_seconds), seconds(plan.image_seconds)] if fits else [say("doesn't fit"), ""]
        mark = "▸" if plan is chosen else ""
        cells.append([mark, plan.transformer, residence(plan), reader, *memory, *times, f"{100 * plan.error:.1f} %"])
    screen.table(cells)
    screen.line("chosen: {reasons}", reasons="; ".join(chosen.reasons))
    screen.line("one picture has {steps} steps; error: of one layer's output, by rounding its weights", steps=steps)


def table(chosen: Plan, rows: list[tuple[Plan, bool]]) -> dict[str, Any]:
    """The same for programs."""
    return {"chosen": chosen.to_dict(), "plans": [{**plan.to_dict(), "fits": fits} for plan, fits in rows]}


def _size(count: int) -> str:
    from lanting.plan.words import size

    return size(count)
