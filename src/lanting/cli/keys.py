"""`lanting keys create | list | revoke`: who may use a server that others can reach."""

from __future__ import annotations

import json as json_
import time
from typing import Annotated

import typer

from lanting.cli import options as o
from lanting.cli.screen import Screen
from lanting.cli.serve import Data, folder_for

keys = typer.Typer(
    name="keys", no_args_is_help=True, rich_markup_mode=None, help="API keys: who may use a server others can reach."
)
NAMES = {-1: "low", 0: "normal", 1: "high"}


@keys.command("create")
def create(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Whose key it is: a person, a team, a program.")],
    share: Annotated[
        float, typer.Option("--share", help="Of the server's time, against keys with 1; 0.01 to 100.")
    ] = 1.0,
    priority: Annotated[
        str, typer.Option("--priority", help="The highest it may ask for: low, normal, high.")
    ] = "normal",
    data: Data = None,
    json: o.Json = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:
    """Make a key and show it, once: only a hash of it is kept. A running server knows it within a second."""
    from lanting.serve.keys import create as make

    screen, text = Screen(quiet, json), make(folder_for(data), name, share, priority)
    if json:
        screen.raw(json_.dumps({"name": name, "key": text, "share": share, "priority": priority}, ensure_ascii=False))
        return
    screen.raw(text)
    screen.note("keep it: it is not shown again. Clients send it as 'Authorization: Bearer KEY'")


@keys.command("list")
def list_keys(data: Data = None, json: o.Json = False, quiet: o.Quiet = False, debug: o.Debug = False) -> None:
    """Show all keys, without their secrets."""
    from lanting.serve.keys import listed

    screen, found = Screen(quiet, json), listed(folder_for(data))
    if json:
        rows = [
            {"id": key.id, "name": key.name, "share": key.share, "priority": NAMES[key.top], "created": key.created}
            | {"revoked": key.revoked}
            for key in found
        ]
        screen.raw(json_.dumps(rows, ensure_ascii=False))
        return
    if not found:
        screen.line("no keys yet: 'lanting keys create NAME' makes one")
    for key in found:
        day = time.strftime("%Y-%m-%d", time.localtime(key.created))
        if quiet:
            screen.raw(key.id)
        elif key.revoked is None:
            values = {"id": key.id, "name": key.name, "share": key.share, "priority": NAMES[key.top], "day": day}
            screen.line("{id}   {name}   share {share:g}   priority {priority}   since {day}", **values)
        else:
            screen.line("{id}   {name}   revoked", id=key.id, name=key.name)


@keys.command("revoke")
def revoke(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A key's name or id.")],
    data: Data = None,
    quiet: o.Quiet = False,
    json: o.Json = False,
    debug: o.Debug = False,
) -> None:
    """End a key: a running server refuses it within a second. Its finished jobs stay."""
    from lanting.serve.keys import revoke as end

    key = end(folder_for(data), name)
    screen = Screen(quiet, json)
    screen.raw(json_.dumps({"revoked": key.id})) if json else screen.line("{name} is revoked", name=key.name)
