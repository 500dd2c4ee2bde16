"""Which cases there are, and all of them one after another.

Cases are built when their turn comes and let go behind it, so that a machine needs the memory of the largest and not
of all; sizes of one block share its weights.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from lanting.bench import layer, nano, vae
from lanting.bench.judge import Row, judge
from lanting.bench.limits import Limits, measure, threads
from lanting.bench.subject import Subject, clock_for
from lanting.bench.watch import Watch
from lanting.core.errors import RequestError
from lanting.kernels.library import instruction_set, known_sets, ready
from lanting.kernels.limits import RUNS
from lanting.plan import detect
from lanting.plan.geometry import Transformer, Vae
from lanting.specs import get_spec

TEXT = 128  # tokens of the prompt beside a layer's picture


@dataclass(frozen=True, slots=True)
class Scale:
    """How much is measured: picture tokens of the layers, sides of the decoded pictures, and how long each."""

    tokens: tuple[int, ...]
    sides: tuple[int, ...]
    least: int = 3  # runs of a case
    seconds: float = 2.0  # and seconds of them
    runs: int = RUNS  # of a limit
    block: Transformer = field(default_factory=Transformer)
    vae: Vae = field(default_factory=Vae)


SCALES = {
    "quick": Scale((256,), (256,), 2, 1.0),
    "usual": Scale((256, 1024), (256, 512)),
    "full": Scale((256, 1024, 4096), (256, 512), 4, 5.0),
}


@dataclass(frozen=True, slots=True)
class Case:
    """`make` builds what is measured, when its turn comes; `form` where a group has several."""

    group: str
    name: str
    make: Callable[[], Subject]
    form: str = ""


class Last:
    """What was built last, for cases that share it: a machine then needs the memory of one and not of all."""

    def __init__(self) -> None:
        self.key, self.made = "", None

    def get(self, key: str, make: Callable[[], Any]) -> Any:
        if key != self.key:
            self.made = None  # before the next one is built
            self.key, self.made = key, make()
        return self.made


def layers(scale: Scale) -> list[Case]:
    """One block in every form, and that at every size."""
    last, net = Last(), scale.block

    def subject(kind: str, native: bool, count: int) -> Subject:
        made = last.get(f"{kind} {native}", partial(layer.make, net, kind, native))
        return layer.subject(net, count, TEXT, kind, made)

    return [
        Case("layer", f"{count} + {TEXT}", partial(subject, *form, count), title(*form))
        for form in layer.forms()
        for count in scale.tokens
    ]


def decoders(scale: Scale) -> list[Case]:
    """The whole decoder without and with kernels, and that at every size."""
    last, net = Last(), scale.vae

    def subject(native: bool, side: int) -> Subject:
        return vae.subject(net, last.get(str(native), partial(vae.make, net, native)), side)

    return [
        Case("vae", f"{side}×{side}", partial(subject, native, side), title("bf16", native))
        for native in ((False, True) if ready() else (False,))
        for side in scale.sides
    ]


def title(form: str, native: bool) -> str:
    """What a form is called while it is measured."""
    return form if native or not ready() else f"{form}, torch"


def drawings(group: str, make: Callable[[], Subject], scale: Scale) -> list[Case]:
    """nano's usual picture, or a step of it."""
    width, height = get_spec("nano").defaults.size
    return [Case(group, f"nano {width}×{height}", make)]


GROUPS: dict[str, Callable[[Scale], list[Case]]] = {
    "layer": layers,
    "vae": decoders,
    "step": partial(drawings, "step", nano.step),
    "picture": partial(drawings, "picture", nano.picture),
}


@dataclass(frozen=True, slots=True)
class Doing:
    """What is being done now: nothing of `total` at first, which is to measure the limits."""

    index: int
    total: int
    case: Case | None = None


@dataclass(frozen=True)
class Report:
    """All that was measured. `one` and `all` are the limits of one thread and of as many as the cases had."""

    one: Limits
    all: Limits
    rows: tuple[Row, ...]
    load: float  # processes that wanted to run when it began; 0 where that is not known

    @property
    def busy(self) -> bool:
        """Others were at work, so times are too long."""
        return self.load > 0.5 * detect().cores

    def to_dict(self) -> dict[str, Any]:
        """For programs."""
        from lanting import __version__

        machine = detect()
        return {
            "bench": 1,
            "lanting": __version__,
            "machine": {
                "processor": machine.device("cpu").title,
                "cores": machine.cores,
                "ram": machine.ram,
                "load": self.load,
            },
            "kernels": {"set": instruction_set(), "known": list(known_sets())},
            "threads": self.all.threads,
            "clock": "processor" if self.all.threads == 1 else "wall",
            "limits": {"one": self.one.to_dict(), "all": self.all.to_dict()},
            "cases": [row.to_dict() for row in self.rows],
        }


def groups_named(words: str) -> tuple[str, ...]:
    """The groups of "layer,vae", all of them for "". Raises RequestError."""
    wanted = [word.strip() for word in words.split(",") if word.strip()]
    for word in wanted:
        if word not in GROUPS:
            raise RequestError("{word} is none we know; use {known}", word=word, known=", ".join(GROUPS))
    return tuple(name for name in GROUPS if name in wanted or not wanted)


def bench(scale: Scale, groups: Sequence[str], count: int) -> Iterator[Doing | Row | Report]:
    """What is being done and every Row as it is measured, then the Report of all. Close the iterator to stop."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    total = 1 + sum(len(GROUPS[group](scale)) for group in groups)
    yield Doing(0, total)
    one = measure(1, scale.runs)
    every = one if count == 1 else measure(count, scale.runs)
    rows: list[Row] = []
    with threads(count):
        for group in groups:
            for case in GROUPS[group](scale):
                yield Doing(1 + len(rows), total, case)
                rows.append(row_of(case, every, scale))
                yield rows[-1]
    names = list(dict.fromkeys((row.group, row.name) for row in rows))
    rows.sort(key=lambda row: names.index((row.group, row.name)))  # the forms of one size side by side
    yield Report(one, every, tuple(rows), load)


def row_of(case: Case, limits: Limits, scale: Scale) -> Row:
    """One case, timed and then watched."""
    subject, clock = case.make(), clock_for(limits.threads)
    try:
        times, watch = subject.times(clock, scale.least, scale.seconds), Watch(clock)
        subject.watched(watch)
        return judge((case.group, case.name), subject, times, watch, limits)
    finally:
        subject.close()
