"""The GPUs that torch shows a process, told without torch: what drivers say, and what the environment leaves of it.

CUDA_VISIBLE_DEVICES has numbers, or beginnings of UUIDs, which is what schedulers write; the first word that is none
ends the list, and one that comes twice empties it. A card that is cut into slices (MIG) is never shown as a whole: CUDA
shows a process one slice and nothing else. AMD's cards pass ROCR_VISIBLE_DEVICES first, and HIP_VISIBLE_DEVICES (or
CUDA's) counts those that are left. Rejected: asking torch, whose import takes seconds and whose first question takes
memory of the card.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

GIB = 2**30
UNTOLD = ("[N/A]", "N/A", "[Not Supported]")  # what nvidia-smi says of memory that is not the card's own
HELD_BACK = 0.9  # of a slice's nominal memory, where only its name is known


@dataclass(frozen=True, slots=True)
class Device:
    """One place to compute. `memory` and `free` are bytes of its own memory; 0 where it uses the computer's. `shared`:
    they are the part of the computer's that is planned for it (NVIDIA's chips whose GPU has none: Jetson, GB10)."""

    name: str  # cpu, cuda, cuda:1, mps
    title: str
    memory: int = 0
    free: int = 0
    shared: bool = False

    @property
    def own_memory(self) -> bool:
        return self.name.startswith("cuda")


@dataclass(frozen=True, slots=True)
class Card:
    """A card, or a slice of one, as its driver numbers them. `device` is None where its memory is not told."""

    uuid: str
    device: Device | None
    slices: tuple[Card, ...] = ()


def numbered(devices: Sequence[Device | None]) -> tuple[Device, ...]:
    """By the names torch has for them."""
    named = ((f"cuda:{place}" if place else "cuda", device) for place, device in enumerate(devices))
    return tuple(replace(device, name=name) for name, device in named if device is not None)


def chosen(told: str | None, uuids: Sequence[str], mixed: bool = False) -> list[int]:
    """Which of these a variable names, in its order, as torch reads it. `mixed`: numbers and UUIDs in one list."""
    if told is None:
        return [*range(len(uuids))]
    prefix = next((prefix for prefix in ("GPU-", "MIG-") if told.startswith(prefix)), "")
    words: list[int | str] = []
    for word in told.split(","):
        number = re.match(r"\s*\+?(\d+)", word)  # 1gpu is 1
        named = word.startswith(prefix) if prefix else mixed and number is None
        if not named and (prefix or number is None):
            break
        words.append(word if number is None or prefix else int(number[1]))
    found: list[int] = []
    for word in words if len(set(words)) == len(words) else []:
        fits = [index for index, uuid in enumerate(uuids) if isinstance(word, str) and word and uuid.startswith(word)]
        index = word if isinstance(word, int) else fits[0] if len(fits) == 1 else -1
        if index in found:
            return []
        if not 0 <= index < len(uuids):
            break
        found.append(index)
    return found


def shown_by_cuda(cards: Sequence[Card], environ: Mapping[str, str]) -> list[tuple[int, Card]]:
    """(number of the card, the card or its slice) of each that a process is shown."""
    told = environ.get("CUDA_VISIBLE_DEVICES")
    slices = [(index, part) for index, card in enumerate(cards) for part in card.slices]
    if told is not None and told.startswith("MIG-"):
        return [slices[place] for place in chosen(told, [part.uuid for _, part in slices])[:1]]
    shown = chosen(told, [card.uuid for card in cards])
    cut = [(index, cards[index].slices[0]) for index in shown if cards[index].slices]
    return cut[:1] or [(index, cards[index]) for index in shown]


def shown_by_hip(cards: Sequence[Card], environ: Mapping[str, str]) -> list[Card]:
    """The same of AMD's."""
    first, told = environ.get("ROCR_VISIBLE_DEVICES"), environ.get("HIP_VISIBLE_DEVICES")
    left = [cards[index] for index in chosen(first, [card.uuid for card in cards], mixed=True)]
    told = environ.get("CUDA_VISIBLE_DEVICES") if told is None else told
    return [left[index] for index in chosen(told, [card.uuid for card in left], mixed=True)]


def nvidia_cards(told: str, share: tuple[int, int] = (0, 0), listing: str = "", details: str = "") -> list[Card]:
    """From nvidia-smi's table (index, name, MiB of memory, MiB free, UUID), and where cards are cut into slices its
    list (-L), which names those, and its XML, which knows their memory. `share`: memory, and free memory, of cards that
    use the computer's."""
    rows = [[word.strip() for word in line.split(", ")] for line in told.splitlines()]
    rows = [row for row in rows if len(row) in (4, 5)]
    cut = slices(listing, details, [row[1] for row in rows])
    found = zip(rows, cut, strict=True)
    return [Card(row[4] if len(row) == 5 else "", device_in(row, share), parts) for row, parts in found]


def device_in(row: Sequence[str], share: tuple[int, int]) -> Device | None:
    """A row of "0, NVIDIA GeForce RTX 3060, 12288, 11872" (MiB), or of "0, NVIDIA GB10, [N/A], [N/A]"."""
    title, memory, free = row[1:4]
    if memory in UNTOLD and free in UNTOLD:
        return Device("cuda", title, *share, shared=True)
    if not (memory.isdigit() and free.isdigit()):
        return None
    return Device("cuda", title, int(memory) * 2**20, int(free) * 2**20)


def slices(listing: str, details: str, titles: Sequence[str]) -> list[tuple[Card, ...]]:
    """The slices of each of these cards, in CUDA's order."""
    names: dict[int, list[tuple[str, str]]] = {}
    card = -1
    for line in listing.splitlines():
        if head := re.match(r"GPU (\d+):", line):
            card = int(head[1])
        elif part := re.match(r"\s+MIG (\S+)\s+Device\s+\d+: \(UUID: (MIG-[^)]+)\)", line):
            names.setdefault(card, []).append((part[1], part[2]))
    told = [
        [(int(total) * 2**20, int(free) * 2**20) for total, free in re.findall(MEMORY, gpu, re.DOTALL)]
        for gpu in details.split("<gpu ")[1:]
    ]
    found: list[tuple[Card, ...]] = []
    for index, title in enumerate(titles):
        parts, sizes = names.get(index, []), told[index] if index < len(told) else []
        sizes = sizes if len(sizes) == len(parts) else [(nominal(name), nominal(name)) for name, _ in parts]
        each = zip(parts, sizes, strict=True)
        found.append(tuple(Card(uuid, Device("cuda", f"{title} MIG {name}", *size)) for (name, uuid), size in each))
    return found


MEMORY = r"<mig_device>.*?<fb_memory_usage>.*?<total>(\d+) MiB</total>.*?<free>(\d+) MiB</free>"


def nominal(profile: str) -> int:
    """Bytes that a slice of this name has at least: "1g.10gb", "1c.3g.20gb", "1g.10gb+me"."""
    size = re.search(r"(\d+)gb", profile)
    return int(int(size[1]) * 10**9 * HELD_BACK) if size else 0


def cut_into_slices(told: str, environ: Mapping[str, str], capabilities: Path) -> bool:
    """Whether it is worth asking for slices, which takes a while: some exist, or are named, or hide a card's memory."""
    named = environ.get("CUDA_VISIBLE_DEVICES", "").startswith("MIG-")
    return bool(told) and (named or "Insufficient Permissions" in told or any(capabilities.glob("gpu*/mig/gi*")))


def amd_cards(root: Path = Path("/sys/class/drm")) -> list[Card]:
    """All of AMD's that have memory, by the kernel's own files; torch calls them cuda too."""
    folders = [
        (int(name[1]), folder) for folder in root.glob("card*") if (name := re.fullmatch(r"card(\d+)", folder.name))
    ]
    found: list[Card] = []
    for _, folder in sorted(folders):
        place = folder / "device"
        total, used = number_in(place / "mem_info_vram_total"), number_in(place / "mem_info_vram_used") or 0
        if total:
            device = Device("cuda", read(place / "product_name").strip() or "AMD GPU", total, max(total - used, 0))
            own = read(place / "unique_id").strip()
            found.append(Card(f"GPU-{own}" if own else "", device))
    return found


def large(cards: Sequence[Card]) -> list[Device | None]:
    """Their devices; None where a processor's own graphics have a little memory set aside."""
    return [card.device if card.device is not None and card.device.memory > 2 * GIB else None for card in cards]


def read(path: Path) -> str:
    """A small file's text; empty where it can't be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def number_in(path: Path) -> int | None:
    """A file's number."""
    text = read(path).strip()
    return int(text) if text.isdigit() else None
