"""English and Chinese for what people read. The English sentence is the key, as in gettext.

The table is `zh.toml` beside this file. A test compares it with every sentence of core, specs and cli, so none
loses its translation silently; sentences of other rooms without an entry are shown in English. --help and complaints
about a command line have a table of their own, `zh_help.toml`, which is read when they are asked for. Rejected:
message ids, because code that says `say("size.multiple")` hides the very words its reader wants to judge.
"""

from __future__ import annotations

import os
import sys
import tomllib
from collections.abc import Mapping
from functools import cache
from importlib import resources
from typing import Any

from lanting.core.errors import LantingError

CHINESE = 4  # Windows' number of the language, whatever the country


def language(environ: Mapping[str, str] | None = None) -> str:
    """'zh' or 'en': LANTING_LANG if set, else the locale variables in their usual order, else what Windows speaks."""
    env = os.environ if environ is None else environ
    for name in ("LANTING_LANG", "LC_ALL", "LC_MESSAGES", "LANG"):
        if value := env.get(name, ""):
            return "zh" if value.lower().startswith("zh") else "en"
    return "zh" if environ is None and of_windows() == CHINESE else "en"


@cache
def of_windows() -> int:
    """The language that Windows speaks to this person, of which its primary number; 0 elsewhere."""
    if sys.platform != "win32":
        return 0
    import ctypes

    return ctypes.windll.kernel32.GetUserDefaultUILanguage() & 0x3FF


@cache
def chinese() -> dict[str, str]:
    """English template -> Chinese template."""
    return {str(english): str(translated) for english, translated in _table("zh.toml").items()}


@cache
def chinese_help() -> dict[str, dict[str, str]]:
    """The same for --help: "words" are ours, "frame" and "complaints" those of typer."""
    return {
        part: {str(english): str(translated) for english, translated in table.items()}
        for part, table in _table("zh_help.toml").items()
    }


def _table(name: str) -> dict[str, Any]:
    return tomllib.loads(resources.files("lanting.core").joinpath(name).read_text(encoding="utf-8"))


class Phrase(str):
    """A part of a sentence that has {fields} of its own: English wherever it is used as text, and put into a person's
    language by the `say` whose value it is."""

    template: str
    values: Mapping[str, object]

    def __new__(cls, template: str, **values: object) -> Phrase:
        found = super().__new__(cls, template.format(**values) if values else template)
        found.template, found.values = template, values
        return found


def say(sentence: str, **values: object) -> str:
    """The sentence in the person's language, its {fields} filled (words among them translated too)."""
    template = sentence
    if language() == "zh":
        table = chinese()
        template = table.get(sentence, sentence)
        values = {name: _said(value, table) for name, value in values.items()}
    return template.format(**values) if values else template


def said(words: str) -> str:
    """A part of a sentence by itself, in the person's language."""
    return say(words.template, **words.values) if isinstance(words, Phrase) else say(words)


def _said(value: object, table: Mapping[str, str]) -> object:
    if isinstance(value, Phrase):
        return say(value.template, **value.values)
    return table.get(value, value) if isinstance(value, str) else value


def explain(error: LantingError) -> str:
    """An error's sentence in the person's language; English where it has no translation."""
    return say(error.sentence, **error.values) if error.sentence else str(error)
