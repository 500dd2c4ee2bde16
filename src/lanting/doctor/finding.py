"""One thing that was found: in what state, in a sentence, and what to do about it."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lanting.core.errors import LantingError
from lanting.core.lang import explain, say

OK, NOTE, PROBLEM = "ok", "note", "problem"
DROP = re.compile(r"unset ([A-Z][A-Z0-9_]*(?: [A-Z][A-Z0-9_]*)*)")
SET = re.compile(r"export ((?:[A-Z][A-Z0-9_]*=[^\s（；]+ ?)+)")
ELSEWHERE = {  # what other systems have in place of our words
    "win32": {"sudo timedatectl set-ntp true": "w32tm /resync", "/path/to/folder": "D:\\folder"},
    "darwin": {"sudo timedatectl set-ntp true": "sudo sntp -sS time.apple.com"},
}


@dataclass(frozen=True, slots=True)
class Advice:
    """What to do, with the command to type."""

    sentence: str
    values: Mapping[str, object] = field(default_factory=dict[str, object])

    def told(self) -> str:
        return typed(say(self.sentence, **self.values), sys.platform, os.environ)


@dataclass(frozen=True, slots=True)
class Finding:
    """`name`: of the check; `state`: OK, NOTE or PROBLEM, the last two with advice; sentences as templates, as errors
    have them."""

    name: str
    state: str
    sentence: str
    values: Mapping[str, object] = field(default_factory=dict[str, object])
    advice: Advice | None = None

    def told(self) -> str:
        return say(self.sentence, **self.values)

    def to_dict(self) -> dict[str, Any]:
        """For JSON, in the person's language; values apart, so that programs need not read sentences."""
        values = {key: value if isinstance(value, int | float) else str(value) for key, value in self.values.items()}
        advice = None if self.advice is None else self.advice.told()
        return {"name": self.name, "state": self.state, "found": self.told(), "advice": advice, "values": values}


def typed(text: str, system: str, env: Mapping[str, str]) -> str:
    """Commands as they are typed on a system (sys.platform). Of Windows' two shells cmd is the one that sets PROMPT."""
    for ours, theirs in ELSEWHERE.get(system, {}).items():
        text = text.replace(ours, theirs)
    if system != "win32":
        return text
    if "PROMPT" in env:
        text = DROP.sub(lambda names: "&& ".join(f"set {name}=" for name in names[1].split()), text)
        return SET.sub(lambda pairs: "&& ".join(f"set {pair}" for pair in pairs[1].split()), text)
    text = DROP.sub(lambda names: "Remove-Item " + ", ".join(f"Env:{name}" for name in names[1].split()), text)
    return SET.sub(lambda pairs: "; ".join(map(powershell, pairs[1].split())), text)


def powershell(pair: str) -> str:
    name, _, value = pair.partition("=")
    return f"$env:{name} = '{value}'"


def fine(sentence: str, name: str, /, **values: object) -> Finding:
    return Finding(name, OK, sentence, values)


def remark(sentence: str, name: str, advice: Advice, /, **values: object) -> Finding:
    """Worth knowing, and all right as it is."""
    return Finding(name, NOTE, sentence, values, advice)


def problem(sentence: str, name: str, advice: Advice, /, **values: object) -> Finding:
    """Something does not work as it should."""
    return Finding(name, PROBLEM, sentence, values, advice)


def advice(sentence: str, /, **values: object) -> Advice:
    return Advice(sentence, values)


def guarded(name: str, check: Callable[[], Iterable[Finding]]) -> list[Finding]:
    """What a check finds; that it failed, where it did."""
    try:
        return list(check())
    except Exception as error:
        reason = explain(error) if isinstance(error, LantingError) else f"{type(error).__name__}: {error}"
        tell = advice("tell us, with what this prints: {command}", command="lanting doctor --json")
        return [problem("{check} could not be looked at ({reason})", name, tell, check=name, reason=reason[:300])]
