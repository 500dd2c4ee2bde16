"""`lanting config`: a person's own defaults, shown, set and taken back, one line of one file at a time."""

from __future__ import annotations

import json as json_
import os
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lanting.cli import options as o
from lanting.cli.screen import Screen
from lanting.core.errors import RequestError
from lanting.core.lang import explain, say
from lanting.defaults.choose import CONFIG, MODEL, able, problems, sound
from lanting.defaults.file import Content, change, config_path, load, save
from lanting.defaults.keys import KEYS, Key, key_named, nearest, settled

if TYPE_CHECKING:
    from lanting.core.errors import LantingError

BUILT_IN = "built-in"


def config(
    key: Annotated[str | None, typer.Argument(metavar="KEY", help="One default, as model or serve.port.")] = None,
    value: Annotated[str | None, typer.Argument(metavar="VALUE", help="What it is to be from now on.")] = None,
    unset: Annotated[str | None, typer.Option("--unset", metavar="KEY", help="Take a default back.")] = None,
    json: o.Json = False,
    debug: o.Debug = False,
) -> int:
    """Defaults of your own: show them, set one, take one back.

    Without KEY all of them are listed, with the flags they stand for and where each comes from. A flag comes first,
    then the environment, then this file, then what is built in. Exit code 2 when the file is wrong.
    """
    screen, content = Screen(json=json), load(config_path())
    if unset is not None:
        if key is not None:
            raise RequestError("say either KEY or --unset KEY")
        return taken_back(screen, content, unset)
    if key is None:
        return listed(screen, content)
    if value is None:
        return one(screen, content, key_named(key))
    return put(screen, content, key_named(key), value)


def put(screen: Screen, content: Content, key: Key, typed: str) -> int:
    """Set."""
    value = settled(key, typed)
    save(content, change(content, key.name, value))
    now = again(content)
    if screen.json:
        screen.raw(json_.dumps(row(key, now) | {"path": str(now.path)}, ensure_ascii=False))
        return 0
    screen.line("{key} = {value}, in {path}", key=key.name, value=str(value), path=now.path)
    if key.parameter == "model":
        tell_model(screen, key, str(value))
    if (first := environment(key, content)) and first[1] != value:
        screen.note("{variable} is set to {value} and comes first", variable=first[0], value=first[1])
    return 0


def tell_model(screen: Screen, key: Key, model: str) -> None:
    """For which verbs it counts, and whether it is here."""
    from lanting.specs import spec_names
    from lanting.weights.home import REPO, downloaded, file_in, path_of

    verbs = [verb for verb in key.verbs if able(verb, model)]
    if "." not in key.name and len(verbs) < len(key.verbs):
        others = ", ".join(verb for verb in key.verbs if verb not in verbs)
        screen.line("it counts for {verbs}; {others} can't use it", verbs=", ".join(verbs), others=others)
    named = model in spec_names() or (REPO.fullmatch(model) and not os.path.exists(model))
    gone = downloaded(model) is None if named else file_in(model) is not None and not path_of(model).exists()
    if model != "nano" and gone:
        screen.line("it is not here yet: lanting pull {model}", model=model)


def taken_back(screen: Screen, content: Content, name: str) -> int:
    """Unset; keys that nobody knows may be taken back, too."""
    if name not in content.lines and name not in content.values:
        if name not in KEYS:
            names = tuple(dict.fromkeys((*content.lines, *KEYS)))
            raise RequestError("there is no key {key}; did you mean {near}?", key=name, near=nearest(name, names))
        if content.broken is not None:
            raise content.broken
        screen.line("{key} was not set", key=name)
    else:
        save(content, change(content, name, None))
        now = again(content)
        screen.line("{key} is taken back, in {path}", key=name, path=now.path)
    if screen.json:
        screen.raw(json_.dumps({"key": name, "value": None, "path": str(content.path)}, ensure_ascii=False))
    return 0


def again(content: Content) -> Content:
    """The file as it is now. Raises what keeps it from being read."""
    now = load(content.path)
    if now.broken is not None:
        raise now.broken
    return now


def one(screen: Screen, content: Content, key: Key) -> int:
    """Show one value, bare, so that scripts can use it."""
    if content.broken is not None:
        raise content.broken
    told = row(key, content)
    if screen.json:
        screen.raw(json_.dumps(told, ensure_ascii=False))
    elif told["value"] is None:
        screen.note("{key} is not set", key=key.name)
    else:
        screen.raw(str(told["value"]))
    return 0


def listed(screen: Screen, content: Content) -> int:
    """All of them, then what is wrong."""
    wrong: list[LantingError] = list(problems(content))
    rows = [row(key, content) for key in KEYS.values()]
    if screen.json:
        told = {"path": str(content.path), "exists": content.path.exists(), "keys": rows}
        screen.raw(json_.dumps(told | {"problems": [explain(each) for each in wrong]}, ensure_ascii=False))
        return 2 if wrong else 0
    if content.path.exists():
        screen.line("defaults: {path}", path=content.path)
    else:
        screen.line("defaults: {path} (not there yet)", path=content.path)
    screen.table([cells(each) for each in rows])
    screen.line("to set one: lanting config KEY VALUE; to take it back: lanting config --unset KEY")
    for problem in wrong:
        screen.line("problem: {text}", text=explain(problem))
    return 2 if wrong else 0


def row(key: Key, content: Content) -> dict[str, Any]:
    """One key for programs. `source`: LANTING_MODEL or LANTING_LANG, "lanting config", "built-in", or the key whose
    value counts ("model" for "edit.model"); "" where there is no value."""
    own, name, verb = sound(content), key.parameter, key.name.rpartition(".")[0]
    told: dict[str, Any] = {"key": key.name, "flag": key.flag, "verbs": list(key.verbs), "line": None}
    first = environment(key, content)
    if first is None and verb and (choice := own.choice(verb, name)) and choice.source == MODEL:
        first = MODEL, own.model
    if first is not None:
        return told | {"value": first[1], "source": first[0]}
    if key.name in own.values:
        return told | {"value": own.values[key.name], "source": CONFIG, "line": content.lines.get(key.name)}
    if verb and (choice := own.choice(verb, name)):
        return told | {"value": choice.value, "source": name, "line": content.lines.get(name)}
    built_in = key.built_in or KEYS.get(name, key).built_in
    return told | {"value": built_in or None, "source": BUILT_IN if built_in else ""}


def environment(key: Key, content: Content) -> tuple[str, str] | None:
    """(variable, value) of what stands above a key of the file and says something else."""
    name = {"model": MODEL, "lang": "LANTING_LANG"}.get(key.name, "")
    value = os.environ.get(name, "").strip()
    return (name, value) if value and value != content.values.get(key.name) else None


def cells(told: dict[str, Any]) -> list[str]:
    """One key for people."""
    source = str(told["source"])
    if source == CONFIG and told["line"]:
        source = say("line {line}", line=told["line"])
    elif source in KEYS:
        source = say("as {key}", key=source)
    elif source == BUILT_IN:
        source = say("built-in")
    shown = "-" if told["value"] is None else str(told["value"])
    where = say("{flag} of {verbs}", flag=told["flag"], verbs=", ".join(told["verbs"]))
    return [told["key"], shown, source, where if told["verbs"] else told["flag"]]
