"""The language of one page. `say` of core speaks to whoever started the server; a page speaks to whoever looks at it.

The table is the same, `core/zh.toml`, and so is the test that compares it with the sentences here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lanting.core.errors import LantingError
from lanting.core.lang import chinese

LANGUAGES = ("en", "zh")
Say = Callable[..., str]


def speaker(language: str) -> Say:
    """A `say` in this language."""
    table = chinese() if language == "zh" else {}

    def say(sentence: str, **values: object) -> str:
        template = table.get(sentence, sentence)
        told = {name: table.get(one, one) if isinstance(one, str) else one for name, one in values.items()}
        return template.format(**told) if told else template

    return say


def explained(say: Say, error: LantingError) -> str:
    """An error's sentence in the page's language."""
    words = say(error.sentence, **error.values) if error.sentence else str(error)
    return words[:1].upper() + words[1:]


def retold(say: Say, error: Mapping[str, Any]) -> str:
    """A job's error in the page's language; as it was told where the job is of an older server."""
    sentence, values = error.get("words") or (str(error.get("message", "")), {})
    return explained(say, LantingError(sentence, **values))


def preferred(accepts: str, chosen: str | None = None) -> str:
    """What a browser wants: the language that was chosen with the switch, else the first it names that is here."""
    if chosen in LANGUAGES:
        return chosen
    ranked: list[tuple[float, int, str]] = []
    for place, part in enumerate(accepts[:400].split(",")):
        name, _, weight = part.strip().partition(";q=")
        language = name.strip().lower()[:2]
        if language in LANGUAGES:
            ranked.append((-_weight(weight), place, language))
    return min(ranked)[2] if ranked else "en"


def _weight(text: str) -> float:
    try:
        return float(text or 1.0)
    except ValueError:
        return 0.0
