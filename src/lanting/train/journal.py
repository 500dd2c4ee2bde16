"""What a run tells: an entry of figures every few seconds, kept in `log.jsonl` and said in words."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lanting.core.lang import Phrase, say

if TYPE_CHECKING:
    from lanting.train.loop import Trainer

NAME = "log.jsonl"
MEANS = {  # of all kinds of batches, what is said
    "loss": Phrase("loss {mean:.3f}"),
    "read": Phrase("read {mean:.0%}"),
    "placed": Phrase("placed {mean:.0%}"),
}


class Meter:
    """Means and rates since the last entry of the log."""

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        self.recent: list[dict[str, Tensor]] = []
        self.seen, self.seconds = trainer.clock.seen, trainer.clock.seconds

    def entry(self) -> dict[str, Any]:
        """One line of the log, for people and plots alike; forgets what it was made of."""
        clock, budget = self.trainer.clock, self.trainer.budget
        gathered: dict[str, list[Tensor]] = {}
        for figures in self.recent:
            for key, value in figures.items():
                gathered.setdefault(key, []).append(value)
        means = {k: torch.stack(v).nanmean().item() for k, v in sorted(gathered.items())}
        mean = {k: round(value, 3) for k, value in means.items() if not math.isnan(value)}
        rate = (clock.seen - self.seen) / max(clock.seconds - self.seconds, 1e-9)
        self.recent, self.seen, self.seconds = [], clock.seen, clock.seconds
        return {
            "step": clock.step,
            "seen": clock.seen,
            "seconds": round(clock.seconds),
            "left": max(0, round(60 * budget.minutes - clock.seconds)),
            "per_second": round(rate, 1),
            "lr": round(budget.rate(clock.step - self.trainer.warm_from, clock.seconds), 6),
            **mean,
        }


class Journal:
    """Keeps every entry as one line of JSON and says it in words, those in the person's language. The figures of
    `more()` join those of the loop."""

    def __init__(self, folder: Path, say: Callable[[str], None], more: Callable[[], dict[str, float]] = dict):
        self.path, self.say, self.more = folder / NAME, say, more

    def __call__(self, entry: dict[str, Any]) -> None:
        if "left" in entry:
            entry = entry | self.more()
        self.keep(entry)
        self.say(in_words(entry))

    def keep(self, entry: dict[str, Any]) -> None:
        add_line(self.path, entry)

    def note(self, *words: str, **figures: Any) -> None:
        """A remark of one or more parts, with figures that plots may want."""
        self.keep({"note": "  ".join(words), **figures})
        self.say("  ".join(map(said, words)))


def in_words(entry: dict[str, Any]) -> str:
    """An entry for people: how far, how fast, how well, how long still."""
    if "note" in entry:
        return said(entry["note"])
    parts = [
        Phrase("{now} of {end}", now=clock(entry["seconds"]), end=clock(entry["seconds"] + entry["left"])),
        Phrase("step {step:,}", step=entry["step"]),
        Phrase("{seen:,} designs, {rate:,.0f}/s", seen=entry["seen"], rate=entry["per_second"]),
    ]
    for name, form in MEANS.items():
        found = [value for key, value in entry.items() if key.endswith(" " + name)]
        if found:
            parts.append(Phrase(form, mean=sum(found) / len(found)))
    if "queue" in entry:
        figures = {key: entry[key] for key in ("queue", "feeding", "reuse")}
        parts.append(Phrase("queue {queue:.0%}, feeding {feeding:.0%}, each met {reuse:.0f}x", **figures))
    return "  ".join(map(said, parts))


def said(words: str) -> str:
    """A note in the person's language."""
    return say(words.template, **words.values) if isinstance(words, Phrase) else say(words)


def clock(seconds: float) -> str:
    """Minutes and seconds: 5:07; with hours: 1:05:07."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def add_line(path: Path, entry: dict[str, Any]) -> None:
    """Append an entry as one line of JSON."""
    with path.open("a+b") as file:  # reads anywhere, writes at the end
        file.seek(max(0, file.tell() - 1))
        torn = file.read(1) not in (b"", b"\n")  # half a line that a killed run left: this entry must not join it
        file.write(b"\n" * torn + json.dumps(entry, ensure_ascii=False).encode() + b"\n")


def entries(path: Path) -> list[dict[str, Any]]:
    """The entries of a log that are whole; a killed run may leave half a line, an older one lines of words."""
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else ():
        try:
            value = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(value, dict):
            found.append(value)
    return found
