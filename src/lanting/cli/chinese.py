"""`--help` and complaints about a command line, in Chinese; the words are in `core/zh_help.toml`.

typer writes three things: our own words, exchanged in the tree of verbs just before a page is written; a frame around
them ("Usage", "[required]"), exchanged as it is written; and complaints, known by their form. It counts characters
where Chinese takes two columns each, so pages are laid out here too. Words that have no entry stay English. Rejected:
gettext, which typer asks for some of its words only, and `say` around each help text, which would be decided when
a file is imported, at a hundred places.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any
from unicodedata import east_asian_width

from lanting.core.lang import chinese_help

# Unbroken: the last three letters, a bracket, what has no space and no Chinese in it, or one Chinese letter; with the
# marks that no line begins or ends with.
_MARKS = "[”）》，。；：！？、]"
_PIECE = re.compile(
    rf"(\s*)([“（《]*(?:[\u4e00-\u9fff]{{3}}(?={_MARKS}+$)|\[[^\[\]]*\]|[^\s“”\u2e80-\uffef]+|\S){_MARKS}*)"
)
_LETTER = re.compile(rf".{_MARKS}*", re.DOTALL)
_EXTRA = re.compile(r"(.*?)[\s\\]*\[([^\[\]]*)\]", re.DOTALL)


def in_chinese(command: Any) -> None:
    """Lets a command (click's, from typer) and those below it write their pages in Chinese. Reads no words yet."""
    command.context_class = _context(command.context_class)
    for inner in getattr(command, "commands", {}).values():
        in_chinese(inner)


def told(text: str) -> str:
    """Our own words, paragraph by paragraph; line breaks within one don't matter."""
    words = chinese_help()["words"]
    paragraphs = inspect.cleandoc(text).split("\n\n")
    return "\n\n".join(words.get(" ".join(each.split()), each) for each in paragraphs)


def complaint(message: str) -> str | None:
    """typer's complaint about a command line, without a full stop at its end; None if its form is not known."""
    for english, translated in chinese_help()["complaints"].items():
        form = re.sub(r"\\{(\w+)\\}", r"(?P<\1>.+?)", re.escape(english))
        if found := re.fullmatch(form, message, re.DOTALL):
            values = found.groupdict()
            if "reason" in values:
                values["reason"] = complaint(values["reason"]) or values["reason"]
            return translated.format(**values)
    return None


def columns(text: str) -> int:
    """How wide a terminal shows it; marks that some show wide count as wide."""
    return sum(2 if east_asian_width(letter) in "WFA" else 1 for letter in text)


def wrap(text: str, width: int) -> list[str]:
    """Lines of at most `width` columns: Chinese breaks anywhere, but for its marks."""
    lines = [""]
    for gap, piece in _PIECE.findall(text):
        parts = [piece] if columns(piece) <= width else _LETTER.findall(piece)
        for part in parts:
            longer = f"{lines[-1]}{gap}{part}" if lines[-1] else part
            if lines[-1] and columns(longer) > width:
                lines.append(part)
            else:
                lines[-1] = longer
            gap = ""
    return lines


@cache
def _context(base: Any) -> Any:
    """click's class of contexts, whose pages are Chinese."""

    def make_formatter(self: Any) -> Any:
        _exchange(self.command)
        return base.make_formatter(self)

    formatter = type("Page", (Page, base.formatter_class), {})
    return type("Context", (base,), {"formatter_class": formatter, "make_formatter": make_formatter})


def _exchange(command: Any) -> None:
    """Our own words of one page: the command, its parameters, a line for each command below."""
    command.help = told(command.help or "")
    for parameter in command.params:
        if getattr(parameter, "help", None):
            parameter.help = told(parameter.help)
    for inner in getattr(command, "commands", {}).values():
        if inner.help:
            inner.short_help = re.split("(?<=。)", told(inner.help))[0]


def _framed(text: str) -> str:
    """The frame of one row: the help flag's words, and "[default: 1; required]" after any."""
    frame = chinese_help()["frame"]
    if not (found := _EXTRA.fullmatch(text)):
        return frame.get(text, text)
    words, extra = found.groups()
    kept = []
    for part in extra.split("; "):
        name, colon, value = part.partition(": ")
        kept.append(f"{frame.get(name, name)}{'：' if colon else ''}{value}")
    return f"{words} [{'；'.join(kept)}]".lstrip()


class Page:
    """click's HelpFormatter in Chinese, whose four ways of writing it replaces."""

    width: int
    current_indent: int
    write: Callable[[str], None]

    def write_usage(self, prog: str, args: str = "", prefix: str | None = None) -> None:
        start = f"{prefix or chinese_help()['frame']['Usage'] + '：'}{prog} "
        self._lines(start, wrap(args, self.width - columns(start)))

    def write_heading(self, heading: str) -> None:
        self._lines("", [f"{chinese_help()['frame'].get(heading, heading)}："])

    def write_text(self, text: str) -> None:
        for number, paragraph in enumerate(text.split("\n\n")):
            self.write("\n" if number else "")
            self._lines("", wrap(paragraph, self.width - self.current_indent))

    def write_dl(self, rows: Sequence[tuple[str, str]], col_max: int = 30, col_spacing: int = 2) -> None:
        first = min(max(columns(name) for name, _ in rows), col_max) + col_spacing
        width = max(self.width - first - self.current_indent, 10)
        for name, words in rows:
            if columns(name) > first - col_spacing:
                self._lines("", [name])
                name = ""
            self._lines(name + " " * (first - columns(name)), wrap(_framed(words), width))

    def _lines(self, start: str, lines: Sequence[str]) -> None:
        """Writes lines beside `start`, the first on its line."""
        for number, line in enumerate(lines):
            beside = " " * columns(start) if number else start
            self.write(f"{' ' * self.current_indent}{beside}{line}".rstrip() + "\n")
