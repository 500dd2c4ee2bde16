"""LoRAs as clients name them: by the names the server was started with, never by a path."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence

from lanting.core.errors import RequestError

TAG = re.compile(r"<lora:([^:<>]{1,200})(?::([-+]?[0-9.]{1,10}))?(?::[^<>]*)?>")


def lora_in(value: Mapping[str, float] | str | None) -> dict[str, float] | None:
    """{"name": strength} from an object, its JSON, or "name:0.8, other". None: nothing was said."""
    if value is None or value == "":
        return None
    if isinstance(value, str) and not value.lstrip().startswith("{"):
        return {name: strength for name, strength in map(_pair, value.split(",")) if name}
    try:
        table = {**value} if not isinstance(value, str) else _floats(json.loads(value))
        "".join(table).encode()  # half a letter is no name
    except (ValueError, TypeError, AttributeError, RecursionError):
        raise RequestError('lora is no JSON object of names and strengths: write {"name": 0.8}') from None
    return table


def _floats(table: Mapping[str, float]) -> dict[str, float]:
    return {str(name): float(strength) for name, strength in table.items()}


def _pair(text: str) -> tuple[str, float]:
    name, colon, strength = text.strip().rpartition(":")
    try:
        return (name, float(strength)) if colon else (strength, 1.0)
    except ValueError:
        raise RequestError("the strength in {text} is no number: write name:0.8", text=repr(text.strip())) from None


def check_names(wished: Mapping[str, float] | None, known: Sequence[str]) -> None:
    """Raises RequestError for a LoRA that is not there."""
    if strange := sorted(set(wished or ()) - set(known)):
        raise RequestError(
            "no LoRA is called {name} here; there are: {known}", name=strange[0], known=", ".join(known) or "-"
        )


def tags_in(prompt: str) -> tuple[str, dict[str, float] | None]:
    """A prompt without its <lora:name:0.8> tags, and what they say."""
    found: dict[str, float] = {}
    for name, strength in TAG.findall(prompt):
        try:
            found[name] = float(strength or 1.0)
        except ValueError:
            raise RequestError("the strength in {text} is no number: write name:0.8", text=repr(name)) from None
    return TAG.sub("", prompt).strip() if found else prompt, found or None
