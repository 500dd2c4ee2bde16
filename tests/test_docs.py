"""Documents that agree with the code: the CLI reference is made from the flags themselves.

`make docs` (or `python tests/test_docs.py`) writes docs/reference/cli.md; the test fails when it is out of date.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import fields
from enum import Enum
from pathlib import Path
from typing import Any, get_args, get_type_hints

from typer.models import ArgumentInfo

import lanting
from lanting.core.types import Progress, Recipe, Request, Result

ROOT = Path(__file__).parents[1]
REFERENCE = ROOT / "docs" / "reference" / "cli.md"
HEAD = """# The command line

Made from the flags themselves with `make docs`; a test keeps it true. What a verb is for, with examples, is in the
[guide](../guide/first-ten-minutes.md).

Exit codes: 0 done, 2 the request was wrong, 1 we failed, 130 cancelled. An error is one sentence on stderr; `--debug`
adds the traceback. Results go to stdout, progress to stderr. `LANTING_LANG=zh` (or a Chinese locale) speaks Chinese.
"""


def commands(app: Any, path: str = "lanting") -> Iterator[tuple[str, Callable[..., Any]]]:
    """(full name, function) of every verb, groups opened."""
    for command in app.registered_commands:
        yield f"{path} {command.name}", command.callback
    for group in app.registered_groups:
        yield from commands(group.typer_instance, f"{path} {group.name}")


def section(path: str, verb: Callable[..., Any]) -> str:
    hints = get_type_hints(verb, include_extras=True)
    arguments, options = [], []
    for name, parameter in inspect.signature(verb).parameters.items():
        kind, info = get_args(hints[name])
        if isinstance(info, ArgumentInfo):
            arguments.append((info.metavar or name.upper(), info.help))
            continue
        # typer keeps the first declared flag of an Annotated option where an old-style option keeps its default
        flags = ", ".join(f"`{flag}`" for flag in [info.default, *(info.param_decls or ())])
        kinds = [each for each in (kind, *get_args(kind)) if isinstance(each, type) and issubclass(each, Enum)]
        choices = f" One of {', '.join(member.value for member in kinds[0])}." if kinds else ""
        default = parameter.default
        shown = "" if default is None or default is False or default == "" else f"`{default}`"
        options.append(f"| {flags} | {info.help}{choices} | {shown} |")
    title = " ".join([path, *(shown for shown, _ in arguments)])
    lines = [f"## `{title}`", "", " ".join((verb.__doc__ or "").split()), ""]
    lines += [f"- `{shown}`: {meaning}" for shown, meaning in arguments]
    lines += [""] if arguments else []
    return "\n".join([*lines, "| flag | meaning | default |", "|---|---|---|", *options])


def render() -> str:
    from lanting.cli.main import app

    return HEAD + "\n" + "\n\n".join(section(path, verb) for path, verb in commands(app)) + "\n"


def test_the_cli_reference_is_up_to_date():
    assert REFERENCE.read_text(encoding="utf-8") == render(), "run `make docs`"


def test_the_python_reference_names_everything():
    text = (ROOT / "docs" / "reference" / "python.md").read_text(encoding="utf-8")
    words = set(re.findall(r"`([A-Za-z_.]+)", text))
    named = {word.split(".")[-1] for word in words} | words
    for name in lanting.__all__:
        assert name in named, name
    for kind in (Request, Result, Progress, Recipe):
        for field in fields(kind):
            assert field.name in named, f"{kind.__name__}.{field.name}"


def test_links_between_documents_lead_somewhere():
    for path in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#\s]+)", path.read_text(encoding="utf-8")):
            if not target.startswith("http"):
                assert (path.parent / target).exists(), f"{path.name}: {target}"


if __name__ == "__main__":
    REFERENCE.write_text(render(), encoding="utf-8")
    print(REFERENCE)
