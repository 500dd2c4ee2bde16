"""`lanting quantize MODEL --to KIND -o FILE`: one component as one file of fewer bits."""

from __future__ import annotations

import json as json_
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from lanting.cli import options as o
from lanting.cli.screen import Screen
from lanting.core.errors import OutputError, RequestError
from lanting.core.lang import say

OWN = ("bf16", "fp8", "int8", "int4")
EVERY = 0.2  # seconds between two states of the bar; in a pipe a line every QUIETLY
QUIETLY = 15.0


def quantize(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A release, a model folder, or a weights file.")],
    to: Annotated[
        str,
        typer.Option("--to", help="bf16, fp8, int8 or int4 for safetensors; q8_0, q6_k, q4_k_m, ... for GGUF."),
    ],
    output: Annotated[str, typer.Option("--output", "-o", help="The file to write.")],
    component: Annotated[str, typer.Option("--component", help="transformer or text_encoder.")] = "transformer",
    group: Annotated[int, typer.Option("--group", help="int4: inputs that share a scale, 32, 64 or 128.")] = 64,
    rotate: Annotated[
        bool, typer.Option("--rotate", help="int8 and int4: rotate weights and inputs, which spreads outliers.")
    ] = False,
    lora: Annotated[
        list[str] | None,
        typer.Option("--lora", metavar="FILE[:STRENGTH]", help="A LoRA that becomes part of the weights. Repeatable."),
    ] = None,
    force: o.Force = False,
    json: o.Json = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:
    """Write a model's transformer or text encoder in fewer bits. What is sensitive stays in 16."""
    from lanting.engine.quantize import Target, quantize_model

    out, target = Path(output).expanduser(), Target(to.lower(), component, group, rotate, tuple(lora or ()))
    if out.is_dir():
        raise OutputError("{path} is a folder: choose another name", path=output)
    if out.exists() and not force:
        raise OutputError("{path} exists: choose another name, or overwrite it with --force", path=output)
    if not out.parent.is_dir():
        raise OutputError("the folder {path} does not exist: make it first", path=str(out.parent))
    if group not in (32, 64, 128):
        raise RequestError("the group must be 32, 64 or 128, not {value}", value=group)
    screen, began = Screen(quiet, json), time.perf_counter()
    meter = Meter(screen, out.name)
    try:
        told = quantize_model(model, out, target, meter.tick)
    finally:
        meter.close()
    if screen.json:
        screen.raw(json_.dumps({"path": output, **told}, ensure_ascii=False))
    elif screen.quiet:
        screen.raw(output)
    else:
        from lanting.weights.pull import gigabytes

        screen.line(
            "{path}: {size} of {before}, written in {seconds:.0f} s",
            **{"path": output, "size": gigabytes(told["bytes"]), "before": gigabytes(told["bytes_before"])},
            seconds=time.perf_counter() - began,
        )


class Meter:
    """Bytes written, as a bar on a terminal and as a line now and then in a pipe."""

    def __init__(self, screen: Screen, title: str):
        self.screen, self.last = screen, time.monotonic()
        self.bar = None
        if screen.quiet or screen.json or not sys.stderr.isatty():
            return
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("  {task.description}"), BarColumn(bar_width=24), TextColumn("{task.fields[state]}"))
        self.bar = Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True))
        self.task = self.bar.add_task(title, total=None, state="")
        self.bar.start()

    def tick(self, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self.last < (EVERY if self.bar is not None else QUIETLY) and done < total:
            return
        from lanting.weights.pull import gigabytes

        state = say("{done} of {total}", done=gigabytes(done), total=gigabytes(total))
        if self.bar is not None:
            self.bar.update(self.task, completed=done, total=total, state=state)
        elif now - self.last >= QUIETLY:
            self.screen.note("{state}", state=state)
        self.last = now

    def close(self) -> None:
        if self.bar is not None:
            self.bar.stop()
