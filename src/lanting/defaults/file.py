"""The file itself: where it is, what stands in it, and how one line of it is changed.

The standard library reads TOML and can't write it. What is written here is one line of text among others that stay as
they are, and what comes out is read again before it is kept. Rejected: a library that writes TOML, for sixteen keys;
and writing the file anew, which would lose a person's comments.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lanting.core.errors import LantingError, OutputError, RequestError

LARGEST = 1 << 20  # bytes: more is no file of defaults
FIRST_LINE = "# Defaults of lanting: 'lanting config' lists what may stand here.\n"
PART = r"(?:[A-Za-z0-9_-]+|\"[^\"\n]*\"|'[^'\n]*')"
NAME = rf"{PART}(?:\s*\.\s*{PART})*"
HEADER = re.compile(rf"\s*\[\s*({NAME})\s*\]\s*(?:#.*)?$")
ASSIGNED = re.compile(rf"(\s*({NAME})\s*=\s*)(.*)$")
VALUE = re.compile(r"(?:\"(?:[^\"\\]|\\.)*\"|'[^']*'|[^#]*?)(\s*#.*|\s*)$")


@dataclass(frozen=True, slots=True)
class Content:
    """What a file says: text and numbers by dotted names, the lines (from 1) where they stand as far as that was found,
    and what keeps it from being read."""

    path: Path
    text: str = ""
    values: Mapping[str, object] = field(default_factory=dict[str, object])
    lines: Mapping[str, int] = field(default_factory=dict[str, int])
    broken: LantingError | None = None


def config_path(environ: Mapping[str, str] | None = None) -> Path:
    """LANTING_CONFIG, else lanting/config.toml where the system keeps such files. It need not exist."""
    env = os.environ if environ is None else environ
    if given := env.get("LANTING_CONFIG", ""):
        return Path(os.path.expanduser(given))
    if sys.platform == "win32":
        folder = env.get("APPDATA", "") or os.path.expanduser("~/AppData/Roaming")
    else:
        folder = env.get("XDG_CONFIG_HOME", "") or os.path.expanduser("~/.config")
    return Path(folder) / "lanting" / "config.toml"


def load(path: Path) -> Content:
    """Never raises: what is wrong stands in `broken`. A file that is not there says nothing."""
    try:
        with path.open("rb") as file:
            data = file.read(LARGEST + 1)
    except FileNotFoundError:
        return Content(path)
    except OSError as error:
        reason = error.strerror or str(error)
        return Content(path, broken=RequestError("{path} can't be read: {reason}", path=path, reason=reason))
    if len(data) > LARGEST:
        return Content(path, broken=at(path, 1, "more than a megabyte"))
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        return Content(path, broken=at(path, data.count(b"\n", 0, error.start) + 1, "not UTF-8"))
    return understood(path, text)


def understood(path: Path, text: str) -> Content:
    """A file's text, read."""
    import tomllib

    lines = {name: number + 1 for number, name in names(text)}
    try:
        return Content(path, text, dict(flat(tomllib.loads(text))), lines)
    except tomllib.TOMLDecodeError as error:
        reason, _, where = str(error).partition(" (at ")
        told = re.match(r"line (\d+)", where)
        line = int(told[1]) if told else max(len(text.splitlines()), 1)
        return Content(path, text, {}, lines, at(path, line, reason))


def at(path: Path, line: int, reason: str) -> RequestError:
    return RequestError(
        "{path}, line {line} can't be read ({reason}): correct it, or type 'lanting config KEY VALUE' for its key",
        **{"path": path, "line": line, "reason": reason},
    )


def flat(table: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, object]]:
    """Tables in tables as dotted names."""
    for name, value in table.items():
        if isinstance(value, dict):
            yield from flat(value, f"{before}{name}.")
        else:
            yield f"{before}{name}", value


def names(text: str) -> Iterator[tuple[int, str]]:
    """(index of a line, the dotted name that gets a value there)."""
    table = ""
    for number, line in enumerate(text.split("\n")):
        if header := HEADER.match(line):
            table = plain(header[1]) + "."
        elif assigned := ASSIGNED.match(line):
            yield number, table + plain(assigned[2])


def plain(name: str) -> str:
    """A dotted name without quotation marks."""
    return ".".join(part.strip("\"'") for part in re.findall(PART, name))


def change(content: Content, name: str, value: str | int | None) -> str:
    """The text with another value for a name, or with none. Raises RequestError where one line is not enough, or where
    the file can't be read and the line with that name is not among what is wrong."""
    if content.broken is not None and (name not in content.lines or not content.text):
        raise content.broken
    lines = content.text.split("\n")
    if name in content.lines:
        replace(lines, content.lines[name] - 1, value)
    elif value is not None:
        insert(lines, name, value)
    text = "\n".join(lines)
    if content.broken is None:
        wanted = {key: kept for key, kept in content.values.items() if key != name}
        wanted |= {} if value is None else {name: value}
        new = understood(content.path, text)
        if new.broken is not None or new.values != wanted:
            raise RequestError("{key} can't be changed in {path}: change it there by hand", key=name, path=content.path)
    return text


def replace(lines: list[str], index: int, value: str | int | None) -> None:
    """Another value on a line, its comment kept; no line without one."""
    if value is None:
        del lines[index]
        return
    line, ending = (lines[index].removesuffix("\r"), "\r") if lines[index].endswith("\r") else (lines[index], "")
    assigned = ASSIGNED.match(line)
    assert assigned is not None
    rest = VALUE.match(assigned[3])
    lines[index] = assigned[1] + written(value) + (rest[1].rstrip() if rest else "") + ending


def insert(lines: list[str], name: str, value: str | int) -> None:
    """A line of its own: below its table's head where there is one, else with those that are in no table."""
    if lines == [""]:
        lines[:] = [*FIRST_LINE.split("\n")]
    ending = "\r" if lines[0].endswith("\r") else ""
    heads = {plain(head[1]): index for index, line in enumerate(lines) if (head := HEADER.match(line))}
    table, _, last = name.rpartition(".")
    if table in heads:
        lines.insert(heads[table] + 1, f"{last} = {written(value)}{ending}")
        return
    first = min(heads.values(), default=len(lines))
    above = [index for index, _ in names("\n".join(lines[:first]))]
    place = above[-1] + 1 if above else first
    while not above and heads and place > 0 and lines[place - 1].startswith("#"):
        place -= 1
    while not above and place > 0 and not lines[place - 1].strip():
        place -= 1
    lines.insert(place, f"{name} = {written(value)}{ending}")
    if place == len(lines) - 1:
        lines.append("")


def written(value: str | int) -> str:
    """As TOML has it: JSON's text is a basic string of TOML."""
    return json.dumps(value, ensure_ascii=False)


def save(content: Content, text: str) -> None:
    """Whole or not at all; a link stays one, and who may read the file stays as it was. Raises OutputError."""
    from lanting.core.files import replace_file, unwritable

    path = content.path.resolve()
    if path.exists() and not path.is_file():
        raise OutputError("{path} is not a file", path=path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        mode = path.stat().st_mode & 0o777 if path.exists() else None

        def write(part: Path) -> None:
            part.write_bytes(text.encode("utf-8"))
            if mode is not None:
                part.chmod(mode)

        replace_file(path, write)
    except OSError as error:
        raise unwritable(path, error) from None
