"""`lanting bench`: this machine's limits, how near layers, steps and pictures come, and what holds each back."""

from __future__ import annotations

import json as json_
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lanting.cli import options as o
from lanting.cli.machine import BUILD, gpus, switched_off
from lanting.cli.screen import Screen
from lanting.core.errors import OutputError, RequestError
from lanting.core.files import replace_file, unwritable
from lanting.core.lang import say
from lanting.core.save import check_folder
from lanting.core.types import Progress
from lanting.specs.numbers import whole

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lanting.bench.judge import Row
    from lanting.bench.run import Doing, Report


def bench(
    quick: Annotated[bool, typer.Option("--quick", help="The smallest sizes, in some minutes at most.")] = False,
    full: Annotated[bool, typer.Option("--full", help="Also 4096 tokens a layer, and more runs of each case.")] = False,
    only: Annotated[
        str,
        typer.Option(
            "--only", metavar="GROUPS", help="Of layer, vae, step, picture, with commas between. Default: all."
        ),
    ] = "",
    threads: Annotated[
        int | None, typer.Option("--threads", help="Threads of the cases. Default: one for every core.")
    ] = None,
    json: Annotated[
        str | None, typer.Option("--json", metavar="FILE", help="Write all figures there as JSON; - is the screen.")
    ] = None,
    force: o.Force = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:
    """Measure what this machine can do, and how much of it the networks get.

    Limits are the most operations of each type of number and the most bytes of memory a second. Cases: one full-width
    layer in bf16, int8 and int4, the full VAE, a step and a picture of nano. Of the processor only: cases for GPUs come
    with a later version. It takes some 1.5 GB of memory and a few minutes; other programs disturb it.
    """
    screen = Screen(quiet, json == "-")
    if quick and full:
        raise RequestError("--quick and --full exclude each other: choose one")
    target = place(json, force) if json not in (None, "-") else None
    if threads is not None:
        whole("threads", threads, 1, 1024)
    from lanting.bench.run import SCALES, groups_named
    from lanting.bench.run import bench as measure
    from lanting.kernels.library import ready, thread_count

    groups = groups_named(only)
    if not ready():
        tell_kernels(screen)
    if gpus():
        screen.note("only the processor is measured: cases for GPUs come with a later version")
    report = follow(
        screen, measure(SCALES["quick" if quick else "full" if full else "usual"], groups, threads or thread_count())
    )
    table = json_.dumps(report.to_dict(), ensure_ascii=False, indent=None if json == "-" else 1)
    if target is not None:
        write(target, table + "\n")
    if json == "-":
        screen.raw(table)
        return
    show(screen, report)
    if target is not None:
        screen.raw(str(target)) if quiet else screen.line("written: {path}", path=target)


def tell_kernels(screen: Screen) -> None:
    """Why there are none."""
    if switched_off():
        screen.note("the kernels are switched off by LANTING_KERNELS, so torch is measured alone")
    else:
        screen.note("the kernels are not built, so torch is measured alone; to build them: {command}", command=BUILD)


def follow(screen: Screen, events: Iterator[Doing | Row | Report]) -> Report:
    """Wait for the report: a bar on a terminal, a line for each case in a pipe."""
    from lanting.bench.run import Doing, Report
    from lanting.bench.words import doing

    began, report = time.perf_counter(), None
    screen.begin(say("measuring"))
    try:
        for event in events:
            if isinstance(event, Doing):
                spent = time.perf_counter() - began
                screen.progress(Progress("denoise", event.index, event.total, spent))
                if not sys.stderr.isatty():
                    screen.note("{index}/{total} {name}", index=event.index + 1, total=event.total, name=doing(event))
            elif isinstance(event, Report):
                report = event
    finally:
        screen.end(report is not None)
    assert report is not None
    return report


def show(screen: Screen, report: Report) -> None:
    """Two tables, and how to read them."""
    from lanting.bench.words import case_rows, limit_rows

    screen.table(limit_rows(report.one, report.all), gap="   ")
    if report.rows:
        screen.line("{row}", row="")
        screen.table(case_rows(report.rows), gap="   ")
        screen.line("limit: all operations at the best rate above or all bytes at the memory's, the longer of the two")
    if report.busy:
        screen.line(
            "this machine is busy (load {load:.1f}): times are too long, least so with --threads 1", load=report.load
        )


def place(name: str, force: bool) -> Path:
    """A file that may be written, told before anything is measured."""
    path = Path(name).expanduser()
    if path.is_dir():
        raise OutputError("{path} is a folder: choose another name", path=path)
    if path.exists() and not force:
        raise OutputError("{path} exists already: choose another name, or add --force", path=path)
    check_folder(path.parent)
    return path


def write(path: Path, text: str) -> None:
    """All of it or nothing."""
    try:
        replace_file(path, lambda part: part.write_text(text, encoding="utf-8"))
    except OSError as error:
        raise unwritable(path, error) from error
