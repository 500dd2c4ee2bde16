"""Which workers a server has on this machine: how many of each model, on which device, with how many threads.

Several engines that each plan for the whole machine would not fit into it together, so each is told its part: GPUs go
round all workers, a card that has several is divided among them, and so are main memory and the processor's threads.
What the user says himself (`--device`, `--vram`, `--ram`, OMP_NUM_THREADS) holds for every worker as it stands. A
server with one worker of each model is told nothing: its engines choose as drawing verbs do.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from lanting.serve.settings import Served, Settings

if TYPE_CHECKING:
    from lanting.plan import Device, Machine

THREADS = "OMP_NUM_THREADS"  # PyTorch's and the kernels'


@dataclass(frozen=True, slots=True)
class Post:
    """One worker's place: `served` with its own options, and what its process has besides the server's environment."""

    served: Served
    number: int = 1  # among the workers of its model
    environ: Mapping[str, str] = field(default_factory=dict[str, str])


def posts(
    settings: Settings, machine: Machine | None = None, environ: Mapping[str, str] | None = None
) -> tuple[Post, ...]:
    """All workers of a server, model by model. Blocks for a moment where the machine is to be looked at."""
    if settings.workers != 1 and machine is None:
        from lanting.plan import detect

        machine = detect()
    cards = [device for device in machine.devices if device.name.startswith("cuda")] if machine else []
    count = max(len(cards), 1) if settings.workers is None else settings.workers
    if machine is None or count == 1:
        return tuple(Post(served) for served in settings.models)
    total = count * len(settings.models)
    own = {} if THREADS in (os.environ if environ is None else environ) else {THREADS: str(threads(total))}
    places = [(served, number) for served in settings.models for number in range(1, count + 1)]
    dealt = [Post(dealt_to(served, turn, cards), number, own) for turn, (served, number) in enumerate(places)]
    return tuple(replace(post, served=budgeted(post.served, dealt, machine, cards)) for post in dealt)


def threads(workers: int) -> int:
    """Of each of so many workers."""
    from lanting.kernels.library import thread_count

    return max(thread_count() // workers, 1)


def dealt_to(served: Served, turn: int, cards: Sequence[Device]) -> Served:
    """With a GPU, where there are some and nobody said what to draw on."""
    if not cards or served.options.get("device"):
        return served
    return replace(served, options={**served.options, "device": f"cuda:{turn % len(cards)}"})


def budgeted(served: Served, everyone: Sequence[Post], machine: Machine, cards: Sequence[Device]) -> Served:
    """With its part of the memory that is free now, unless budgets were given. nano fits everywhere."""
    options = served.options
    if served.model == "nano" or {"vram", "ram"} & set(options):
        return served
    budgets: dict[str, Any] = {"ram": machine.ram_free // len(everyone)} if machine.ram_free else {}
    on = Counter(name for post in everyone for name in cards_of(post.served.options))
    own = [(cards[index], on[index]) for index in cards_of(options) if index < len(cards)]
    if own and any(sharing > 1 for _, sharing in own):
        budgets["vram"] = min(card.free // sharing for card, sharing in own)
    return replace(served, options={**options, **budgets})


def cards_of(options: Mapping[str, Any]) -> list[int]:
    """The numbers in "cuda:1" or "cuda:0,cuda:1"; "cuda" is the first."""
    names = [name.strip() for name in str(options.get("device") or "").split(",")]
    return [int(name.partition(":")[2] or 0) for name in names if name == "cuda" or name[5:].isdigit()]
