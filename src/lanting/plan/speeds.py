"""How fast devices are, as far as their makers say (devices.toml), and what part of it a picture gets.

Times follow from operations and bytes, with one efficiency for all: good for choosing between plans, within about a
factor of 1.5 for the clock on the wall. A device that is not in the table has no times at all.
"""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from lanting.plan.cards import GIB
from lanting.plan.machine import APPLE_SHARE, Device, Machine

EFFICIENCY = 0.45  # of the dense rate; public runs: 0.38 (plain torch) to 0.59 (compiled) on an H100, 0.46 on a 4090
APPLE_EFFICIENCY = 0.6  # of the float32 rate that Apple states
DISK_RATE = 2e9  # bytes a second, assumed: an ordinary NVMe disk
VARIANTS = {"ti", "super", "pro", "max", "ultra", "laptop", "xt", "d"}  # words that name another device
SPARE = 0.6 * 10**9  # bytes of a card that a desktop keeps for itself


@dataclass(frozen=True, slots=True)
class Card:
    """One row of devices.toml; rates per second, None where not known."""

    name: str
    memory: float
    source: str
    bandwidth: float
    tflops: float | None = None
    link: float | None = None
    ram: float | None = None

    @property
    def apple(self) -> bool:
        return self.name.startswith("Apple")

    @property
    def operations(self) -> float | None:
        """That a picture gets, a second."""
        share = APPLE_EFFICIENCY if self.apple else EFFICIENCY
        return None if self.tflops is None else self.tflops * 1e12 * share


@cache
def cards() -> tuple[Card, ...]:
    """Every device of the table, in its order."""
    text = Path(__file__).with_name("devices.toml").read_text(encoding="utf-8")
    return tuple(Card(**row) for row in tomllib.loads(text)["device"])


@cache
def find_card(title: str) -> Card | None:
    """The row for a device's own title ("NVIDIA GeForce RTX 4090") or what a person types ("4090", "m4 max").

    All words of the row must occur, and no word that makes it another device; else all words asked for must occur in
    the row, and the shortest such row is meant.
    """
    asked = _words(title)
    exact = [card for card in cards() if _name(card) <= asked and not (asked - _words(card.name)) & VARIANTS]
    if exact:
        return max(exact, key=lambda card: len(_name(card)))
    near = (card for card in cards() if asked and asked <= _words(card.name))
    return min((card for card in near if not (_words(card.name) - asked) & VARIANTS), key=_length, default=None)


def machine_of(card: Card, ram: int | None = None) -> Machine:
    """A computer with that card, nothing else running; `ram` in bytes, else what such computers often have."""
    if card.apple:
        total = int(card.memory * GIB)
        usable = int(total * APPLE_SHARE)
        return Machine(total, total - 3 * GIB, 8, (Device("mps", card.name, usable, usable), Device("cpu", card.name)))
    total = int(ram or (card.ram or 32) * GIB)
    memory = int(card.memory * GIB)
    free = total if ram else total - 3 * GIB  # an asked amount is a budget, not a computer
    device = Device("cuda", card.name, memory, int(memory - SPARE))
    return Machine(total, free, 8, (device, Device("cpu", "CPU")))


def _length(card: Card) -> int:
    return len(_words(card.name))


def _words(text: str) -> frozenset[str]:
    return frozenset(re.findall(r"[a-z]+|\d+", text.lower())) - {"nvidia", "amd", "pcie", "sxm", "hbm", "gpu"}


def _name(card: Card) -> frozenset[str]:
    """The words that tell it, without the family's and without memory sizes."""
    return _words(re.sub(r",? \d+ GB$", "", card.name)) - {"geforce", "radeon"}
