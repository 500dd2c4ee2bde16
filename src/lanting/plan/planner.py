"""Choose: every way to run a model on a machine is priced, those within the budgets are ranked, the first is taken.

The rule, in words: a plan that never waits beats one that does; among those the better precision; then whatever moves
fewer bytes and takes fewer turns. "Waits" means that streaming makes a step more than 1.3 times as long, that blocks
come from a disk whose speed is not known, or that a CPU reads the prompt for a GPU. All of it is arithmetic over a few hundred candidates, so more memory can only add candidates and never make the
choice worse. Where nothing fits, the refusal names an amount of memory that would do.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

from lanting.core.errors import RequestError
from lanting.core.lang import say
from lanting.plan.activations import TILE, Job
from lanting.plan.costs import LIVE, Bill, Way, price
from lanting.plan.kinds import KINDS, OURS, Kind, plain
from lanting.plan.machine import Device, Machine
from lanting.plan.model import Model
from lanting.plan.plan import Plan
from lanting.plan.words import size as in_words

PATIENCE = 1.3  # how much longer streaming may make a step before it counts as waiting
ENCODERS = {"keep": 0, "unload": 1, "cpu": 2}


class RefusalError(RequestError):
    """Nothing fits. `vram` and `ram` are budgets, in bytes, under which a plan exists."""

    def __init__(self, sentence: str, vram: int | None, ram: int | None, **values: object) -> None:
        super().__init__(sentence, **values)
        self.vram, self.ram = vram, ram


@dataclass(frozen=True, slots=True)
class Budget:
    """Hard limits in bytes; None: what the machine has free."""

    vram: int | None = None
    ram: int | None = None

    def of(self, machine: Machine, device: Device) -> tuple[int, int]:
        """(VRAM, RAM) that a plan may take. A device without memory of its own shares the computer's."""
        ram = machine.ram_free if self.ram is None else self.ram
        if device.own_memory:
            return device.free if self.vram is None else self.vram, ram
        shared = [ram, *([self.vram] if self.vram is not None else []), *([device.free] if device.free else [])]
        return 0, min(shared)


def plan(
    model: Model, job: Job, machine: Machine, budget: Budget | None = None, device: str | None = None, quant: str | None = None
) -> Plan:
    """The best plan within the budgets; a RefusalError where there is none. `quant`: only this kind."""
    budget, place = budget or Budget(), machine.device(device)
    vram, ram = budget.of(machine, place)
    every = priced(Bill(model, job, machine, place), (vram, ram), quant)
    fitting = [each for each in every if each.peak_vram <= vram and each.peak_ram <= ram]
    if not fitting:
        raise refusal(model, job, every, place, (vram, ram))
    best = min(fitting, key=rank)
    return replace(best, reasons=reasons(best, fitting, every, (vram, ram), model))


def survey(model: Model, job: Job, machine: Machine, budget: Budget | None = None, device: str | None = None) -> list[Plan]:
    """For every kind the best plan that fits, else the one that needs least; the best first, those that don't fit
    last."""
    budget, place = budget or Budget(), machine.device(device)
    vram, ram = budget.of(machine, place)
    every = priced(Bill(model, job, machine, place), (vram, ram), None)
    rows = []
    for kind in dict.fromkeys(each.transformer for each in every):
        own = [each for each in every if each.transformer == kind]
        fitting = [each for each in own if fits(each, (vram, ram))]
        rows.append(min(fitting, key=rank) if fitting else min(own, key=lambda each: _excess(each, (vram, ram))))
    return sorted(rows, key=lambda each: (not fits(each, (vram, ram)), rank(each)))


def fits(each: Plan, limits: tuple[int, int]) -> bool:
    return each.peak_vram <= limits[0] and each.peak_ram <= limits[1]


def rank(each: Plan) -> tuple[float, ...]:
    """Smaller is better."""
    unsure = each.streamed == "disk" or each.wait is None or each.wait > PATIENCE
    waits = (each.streamed != "none" and unsure) or each.encoder == "cpu"
    away = (each.blocks - each.resident_blocks) / each.blocks
    turns = ENCODERS[each.encoder] + (0.5 if each.encoder == "unload" and each.parked == "disk" else 0)
    reader = 0.0 if each.text_encoder == "as stored" else KINDS[each.text_encoder].error
    slow = (each.wait or 2.0) if waits else 1.0
    return (waits, slow * (each.streamed == "disk") if waits else 0, each.error, reader, away, turns, each.vae_tile, each.modulation_table)


def priced(bill: Bill, limits: tuple[int, int], quant: str | None) -> list[Plan]:
    """All candidates with their costs; of those that stream, the one that keeps as many blocks as fit."""
    found = []
    for kind, reader in kinds(bill.model, bill.device, quant):
        for encoder, tile, table, streamed, parked in ways(bill.model, kind, bill.device):
            way = Way(kind, reader, bill.net.num_layers, streamed, table, encoder, parked, tile)
            if streamed != "none":
                way = replace(way, resident=most_resident(bill, way, limits))
            found.append(price(bill, way))
    return found


def kinds(model: Model, device: Device, quant: str | None) -> Iterator[tuple[Kind, Kind]]:
    """(transformer, text encoder) in every kind they may be held in."""
    own = plain(model.dtype(device.name))
    bodies = [own, *(KINDS[name] for name in OURS)]
    if model.packed:
        bodies = [KINDS[model.kind] if model.kind in KINDS else KINDS["q8_0"]]
    if quant is not None:
        bodies = [kind for kind in [own, *KINDS.values()] if kind.name == quant]
    for body in bodies:
        readers = [own, *(KINDS[name] for name in OURS if KINDS[name].error <= max(body.error, KINDS["int8"].error))]
        if model.reader_kind not in ("bf16", "fp32", "fp16"):
            readers = [KINDS[model.reader_kind] if model.reader_kind in KINDS else KINDS["q8_0"]]
        yield from product([body], readers)


def ways(model: Model, kind: Kind, device: Device) -> Iterator[tuple[str, int, bool, str, str]]:
    """(encoder, tile, table, streamed, parked)."""
    streams = ["none", "disk"]
    if device.own_memory:
        streams.insert(1, "ram")
    if kind.packed and model.here and not model.packed:
        streams.remove("disk")  # there is no file of that kind to stream from
    if model.geometry.transformer.num_layers < 3:
        streams = ["none"]
    encoders = [("keep", "disk"), ("unload", "disk")]
    if device.own_memory:
        encoders[1:1] = [("unload", "ram")]
        encoders.append(("cpu", "disk"))
    for streamed, (encoder, parked), table, tile in product(streams, encoders, (False, True), (0, TILE)):
        yield encoder, tile, table, streamed, parked


def most_resident(bill: Bill, way: Way, limits: tuple[int, int]) -> int:
    """As many blocks as the budgets allow, at least none and never all: with all of them nothing would stream."""
    none, one = bill.peaks(replace(way, resident=0)), bill.peaks(replace(way, resident=1))
    low, high = 0, bill.net.num_layers - LIVE - 1
    if none[1] > limits[1] and one[1] < none[1]:  # what is resident on the device needs no RAM
        low = min(-(-(none[1] - limits[1]) // (none[1] - one[1])), high)
    place = 0 if bill.device.own_memory else 1
    while low < high:
        middle = (low + high + 1) // 2
        fitting = bill.peaks(replace(way, resident=middle))[place] <= limits[place]
        low, high = (middle, high) if fitting else (low, middle - 1)
    return low


def _excess(each: Plan, limits: tuple[int, int]) -> tuple[int, int]:
    over = [max(each.peak_vram - limits[0], 0), max(each.peak_ram - limits[1], 0)]
    return sum(over), each.peak_ram


def least(every: Sequence[Plan], limits: tuple[int, int]) -> tuple[int | None, int | None]:
    """(VRAM, RAM) of the smallest step that makes a plan fit; None where that budget is enough already."""
    by_vram = [each.peak_vram for each in every if each.peak_ram <= limits[1]]
    by_ram = [each.peak_ram for each in every if each.peak_vram <= limits[0]]
    if by_vram and min(by_vram) > limits[0]:
        return min(by_vram), None
    if by_ram:
        return None, min(by_ram)
    small = min(every, key=lambda each: (each.peak_vram + each.peak_ram, each.peak_vram))
    return small.peak_vram, small.peak_ram


def refusal(model: Model, job: Job, every: Sequence[Plan], device: Device, limits: tuple[int, int]) -> RefusalError:
    """A sentence with the amount of memory that would do, rounded up to tenths of a GB (or MB)."""
    vram, ram = (None if need is None else _round_up(need) for need in least(every, limits))
    parts = []
    for need, have, flag in ((vram, limits[0], "--vram"), (ram, limits[1], "--ram")):
        if need is not None:
            parts.append(say("{need} of {what} ({flag} {short})", **{"need": in_words(need), "what": flag[2:].upper(), "flag": flag, "short": short(need)}) + say(", and {have} are to be had", have=in_words(have)))
    return RefusalError(
        "{model} at {width}×{height} needs at least {needs}; a smaller --size needs less",
        vram,
        ram,
        **{"model": model.name, "width": job.size[0], "height": job.size[1], "needs": "; ".join(parts)},
    )


def short(count: int) -> str:
    """As `--vram` takes it: "10.9G", "850M"."""
    return f"{count / 1e9:.1f}G" if count >= 10**9 else f"{count // 10**6}M"


def _round_up(count: int) -> int:
    unit = 10**8 if count >= 10**9 else 10**7
    return -(-count // unit) * unit


def reasons(best: Plan, fitting: Sequence[Plan], every: Sequence[Plan], limits: tuple[int, int], model: Model) -> tuple[str, ...]:
    """Why this plan, in words."""
    said = []
    better = [each for each in every if each.error < best.error and each not in fitting]
    if best.error == 0:
        said.append(say("the weights are used as published"))
    elif better:
        finer = min(better, key=lambda each: (each.error, _excess(each, limits)))
        names = sorted({each.transformer for each in every if each.error < best.error}, key=lambda n: -KINDS[n].bits if n in KINDS else 0)
        said.append(say("{kind} is the best precision that fits without waiting ({names} would not)", kind=best.transformer, names=", ".join(names)) if finer else "")
    if best.streamed != "none":
        source = say("RAM") if best.streamed == "ram" else say("disk")
        said.append(
            say("blocks stream from {source} behind the computation", source=source)
            if best.wait is not None and best.wait <= PATIENCE
            else say("blocks stream from {source}, and steps wait for them", source=source)
        )
    if best.modulation_table:
        said.append(say("modulation is tabulated, so a third of the transformer leaves memory"))
    if best.encoder == "unload":
        said.append(say("text encoder and transformer take turns"))
    if best.encoder == "cpu":
        said.append(say("the text encoder stays on the CPU"))
    if best.vae_tile:
        said.append(say("the VAE works in tiles of {tile} pixels", tile=best.vae_tile))
    if best.transformer in OURS and best.streamed == "disk" and not model.packed:
        said.append(say("pack it once: lanting quantize {model} --to {kind}", model=model.name, kind=best.transformer))
    return tuple(filter(None, said))
