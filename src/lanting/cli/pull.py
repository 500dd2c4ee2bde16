"""`lanting pull NAME`: bring a model here, saying first how large it is and whether it fits."""

from __future__ import annotations

import json as json_
import sys
import time
from collections.abc import Iterable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lanting.cli import options as o
from lanting.cli.screen import Screen
from lanting.core.lang import say

if TYPE_CHECKING:
    from lanting.weights.pull import PullPlan
    from lanting.weights.transfer import PullProgress


class Source(StrEnum):
    """Where models are published."""

    huggingface = "huggingface"
    modelscope = "modelscope"


def pull(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME", help="A release (see 'lanting list'), OWNER/NAME, or OWNER/NAME/FILE for one of its files."
        ),
    ],
    to: Annotated[Path | None, typer.Option("--to", help="A folder for it. Default: one in LANTING_HOME.")] = None,
    revision: Annotated[str | None, typer.Option("--revision", help="A branch, tag or commit.")] = None,
    source: Annotated[Source, typer.Option("--from", help="The hub.")] = Source.huggingface,
    endpoint: Annotated[
        str | None, typer.Option("--endpoint", help="A mirror's address. Default: HF_ENDPOINT.")
    ] = None,
    offline: Annotated[bool, typer.Option("--offline", help="Ask nobody: say whether all of it is here.")] = False,
    without: Annotated[
        list[str] | None,
        typer.Option("--without", metavar="PART", help="Leave out the weights of transformer, text_encoder or vae."),
    ] = None,
    check: Annotated[bool, typer.Option("--check", help="Read every file again and replace damaged ones.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say the size and the free space, fetch nothing.")] = False,
    json: o.Json = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:
    """Download a model. What has arrived is kept when it stops; pull again to go on."""
    from lanting.weights.hub import offline as is_offline
    from lanting.weights.pull import have_offline, plan_pull
    from lanting.weights.transfer import download

    screen = Screen(quiet, json)
    if is_offline(offline):
        _done(screen, name, have_offline(name, to), "")
        return
    plan = plan_pull(name, to, revision, endpoint, source.value, recheck=check, without=without or ())
    _announce(screen, plan)
    _offer(screen, plan, every=dry_run)
    if dry_run:
        screen.raw(json_.dumps(_summary(plan))) if json else None
        return
    if not plan.done:
        try:
            _follow(screen, plan.name, download(plan))
        except KeyboardInterrupt:
            screen.note("what has arrived is kept: pull again to go on")
            raise
    _done(screen, name, plan.path, plan.jobs[0].listing.commit)


def _summary(plan: PullPlan) -> dict[str, object]:
    listing = plan.jobs[0].listing
    return {
        "name": plan.name,
        "repo": listing.repo,
        "commit": listing.commit,
        "path": str(plan.path),
        "files": {file.path: file.size for file in listing.files},
        "bytes": plan.total,
        "to_download": plan.left,
        "free": plan.free,
    }


def _announce(screen: Screen, plan: PullPlan) -> None:
    from lanting.specs import get_spec, spec_names
    from lanting.weights.pull import gigabytes

    if plan.name in spec_names() and (licence := get_spec(plan.name).licence):
        screen.note(licence)
    for job in plan.jobs:
        listing = job.listing
        screen.note(
            "{repo} {commit}: {total} in {count} files",
            repo=listing.repo,
            commit=listing.commit[:8] or listing.revision,
            total=gigabytes(job.total),
            count=len(listing.files),
        )
    if plan.left:
        screen.note(
            "{left} to download, {free} free in {folder}",
            left=gigabytes(plan.left),
            free=gigabytes(plan.free),
            folder=str(plan.folder),
        )


def _offer(screen: Screen, plan: PullPlan, every: bool) -> None:
    """A repository of several files of weights, each a model by itself or in another kind: one may be enough."""
    from lanting.weights.home import WEIGHTS
    from lanting.weights.pull import gigabytes

    listing = plan.jobs[0].listing
    weights = sorted((file for file in listing.files if file.path.endswith(WEIGHTS)), key=lambda file: file.size)
    if (
        plan.file
        or len(weights) < 2
        or any(file.path.endswith(("index.json", "config.json")) for file in listing.files)
    ):
        return
    for file in weights if every else ():
        screen.note("{size}  {file}", size=gigabytes(file.size), file=file.path)
    screen.note("one of them alone: lanting pull {repo}/{file}", repo=listing.repo, file=weights[0].path)


def _done(screen: Screen, name: str, folder: Path, commit: str) -> None:
    if screen.json:
        screen.raw(json_.dumps({"name": name, "path": str(folder), "commit": commit}, ensure_ascii=False))
    elif screen.quiet:
        screen.raw(str(folder))
    else:
        screen.line("{name} is complete: {path}", name=name, path=str(folder))


def _follow(screen: Screen, title: str, events: Iterable[PullProgress]) -> None:
    """A bar on a terminal, a line every 15 seconds in a pipe."""
    if screen.quiet or screen.json or not sys.stderr.isatty():
        last = time.monotonic()
        for event in events:
            if time.monotonic() - last > 15:
                last = time.monotonic()
                screen.note("{state}", state=_state(event))
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    columns = (TextColumn("  {task.description}"), BarColumn(bar_width=24), TextColumn("{task.fields[state]}"))
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=None, state="")
        for event in events:
            bar.update(task, completed=event.done, total=event.total, state=_state(event))


def _state(event: PullProgress) -> str:
    """ "12.3 GB of 57.7 GB, 85 MB a second, 9 min left"."""
    from lanting.weights.pull import gigabytes

    here = say("{done} of {total}", done=gigabytes(event.done), total=gigabytes(event.total))
    if event.done >= event.total:
        return here
    words = [here, say("{amount} a second", amount=gigabytes(int(event.rate)))]
    if event.seconds_left is not None and event.seconds_left >= 90:
        words.append(say("{minutes} min left", minutes=round(event.seconds_left / 60)))
    elif event.seconds_left is not None:
        words.append(say("{seconds:.0f} s left", seconds=event.seconds_left))
    return ", ".join(words)
