"""Choose: every way to run a model on a machine is priced, those within the budgets are ranked, the first is taken.

The rule, in words: a plan that never waits beats one that does; among those the better precision; then whatever moves
fewer bytes and takes fewer turns. "Waits" means that streaming, or computing the same again at every step, makes a step
more than 1.3 times as long, that blocks come from a disk whose speed is not known, or that a CPU reads the prompt for a
GPU. All of it is arithmetic over some hundred candidates, so more memory can only add candidates and never make the
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
from lanting.plan.kinds import KINDS, KNOWN, OURS, Kind, kind_named, plain
from lanting.plan.machine import Device, Machine
from lanting.plan.model import PLAIN, Model
from lanting.plan.plan import Plan
from lanting.plan.words import size as in_words

TILE_ABOVE = 2048 * 2048  # pixels; the engine always decodes larger pictures in tiles
SPARE = 1.04  # a budget holds even where a peak is this much above what is predicted (fp8 streamed: 10 % measured)
LARGE = 10**9  # bytes of a prefix that may be too many to keep
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

    def of(self, machine: Machine, device: Device, among: int = 1) -> tuple[int, int]:
        """(VRAM, RAM) that a plan may take. A device without memory of its own shares the computer's, and all
        `among` processes of one picture do."""
        ram = (machine.ram_free if self.ram is None else self.ram) // among
        if device.own_memory:
            return device.free if self.vram is None else self.vram, ram
        shared = [ram, *([self.vram] if self.vram is not None else []), *([device.free] if device.free else [])]
        return 0, min(shared)


def plan(
    model: Model,
    job: Job,
    machine: Machine,
    budget: Budget | None = None,
    device: str | None = None,
    quant: str | None = None,
) -> Plan:
    """The best plan within the budgets; a RefusalError where there is none. `quant`: only this kind."""
    place = machine.device(device)
    among = max(len(machine.several(device)), 1)
    has = (budget or Budget()).of(machine, place, among)
    limits = spared(has)
    every = candidates((model, job, machine, place), limits, quant)
    fitting = [each for each in every if fits(each, limits)]
    if not fitting:
        raise refusal(model, job, every, has, among)
    best = min(fitting, key=rank)
    return replace(best, reasons=reasons(best, every, limits, model))


def survey(
    model: Model, job: Job, machine: Machine, budget: Budget | None = None, device: str | None = None
) -> list[tuple[Plan, bool]]:
    """For every kind the best plan that fits and True, else the one that needs least and False; the best first."""
    place = machine.device(device)
    limits = spared((budget or Budget()).of(machine, place, max(len(machine.several(device)), 1)))
    every = candidates((model, job, machine, place), limits, None)
    rows = []
    for kind in dict.fromkeys(each.transformer for each in every):
        own = [each for each in every if each.transformer == kind]
        fitting = [each for each in own if fits(each, limits)]
        rows.append(min(fitting, key=rank) if fitting else min(own, key=lambda each: _excess(each, limits)))
    return sorted(((each, fits(each, limits)) for each in rows), key=lambda row: (not row[1], rank(row[0])))


def spared(has: tuple[int, int]) -> tuple[int, int]:
    """What a plan may be predicted to take of these."""
    return int(has[0] / SPARE), int(has[1] / SPARE)


def fits(each: Plan, limits: tuple[int, int]) -> bool:
    return each.peak_vram <= limits[0] and each.peak_ram <= limits[1]


def rank(each: Plan) -> tuple[float, ...]:
    """Smaller is better: waiting (and how long), the error of the kinds, a prefix computed again, blocks that move,
    turns, tiles, the table."""
    unsure = each.streamed == "disk" or each.wait is None or each.wait > PATIENCE
    moves = each.streamed != "none" or not each.prefix_kept
    waits = (moves and unsure) or each.encoder == "cpu"
    longer = each.streamed == "disk" or not each.prefix_kept
    unknown = 2.0 if each.prefix_kept else 1000.0  # both at once is the last resort
    slow = ((each.wait or unknown) if longer else 1.0) if waits else 0.0
    error = (each.error, 0.0 if each.text_encoder == "as stored" else KNOWN[each.text_encoder].error)
    away = (each.blocks - each.resident_blocks) / each.blocks
    turns = ENCODERS[each.encoder] + (0.5 if (each.encoder, each.parked) == ("unload", "disk") else 0.0)
    return (waits, slow, *error, not each.prefix_kept, away, turns, each.vae_tile, each.modulation_table)


Asked = tuple[Model, Job, Machine, Device]
_last: list[tuple[Asked, tuple[object, ...], list[Plan]]] = []  # the last answer: a plan and its survey ask the same


def candidates(asked: Asked, limits: tuple[int, int], quant: str | None) -> list[Plan]:
    """`priced`, but for the very question that was asked last."""
    if _last:
        before, others, found = _last[0]
        if others == (limits, quant) and all(a is b for a, b in zip(before, asked, strict=True)):
            return found
    found = priced(Bill(*asked), limits, quant)
    _last[:] = [(asked, (limits, quant), found)]
    return found


def priced(bill: Bill, limits: tuple[int, int], quant: str | None) -> list[Plan]:
    """All candidates with their costs; of those that stream, the one that keeps as many blocks as fit."""
    found = []
    for kind, reader in kinds(bill.model, bill.device, quant):
        for (encoder, tile, table, streamed, parked), kept in product(ways(bill, kind), keeping(bill)):
            way = Way(kind, reader, bill.net.num_layers, streamed, table, encoder, parked, tile, kept)
            if streamed != "none":
                way = replace(way, resident=most_resident(bill, way, limits))
            found.append(price(bill, way))
    return found


def kinds(model: Model, device: Device, quant: str | None) -> Iterator[tuple[Kind, Kind]]:
    """(transformer, text encoder) in every kind they may be held in."""
    own = plain(model.dtype(device.name))
    bodies = [own, *(KINDS[name] for name in OURS)]
    if model.packed:
        bodies = [model.body_kind()]
    elif quant == "none":
        bodies = [own]
    elif quant not in (None, "auto"):
        bodies = [kind_named(str(quant))]
    for body in bodies:
        readers = [own, *(KINDS[name] for name in OURS)]
        if model.reader_kind not in PLAIN:
            readers = [KNOWN.get(model.reader_kind or "", KINDS["q4_k"])]
        elif quant not in (None, "auto") and not model.packed:
            readers = bodies  # an asked kind is meant for both
        yield from product([body], readers)


def ways(bill: Bill, kind: Kind) -> Iterator[tuple[str, int, bool, str, str]]:
    """(encoder, tile, table, streamed, parked)."""
    model, device, size = bill.model, bill.device, bill.job.size
    tiles = (0, TILE) if size[0] * size[1] <= TILE_ABOVE else (TILE,)
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
    tables = (False, True) if bill.table else (False,)
    for streamed, (encoder, parked), table, tile in product(streams, encoders, tables, tiles):
        yield encoder, tile, table, streamed, parked


def keeping(bill: Bill) -> tuple[bool, ...]:
    """Whether the prefix is kept; without it little is saved where it is small."""
    return (True, False) if bill.prefix > LARGE else (True,)


def most_resident(bill: Bill, way: Way, limits: tuple[int, int]) -> int:
    """As many blocks as the budgets allow, at least none and never all: with all of them nothing would stream."""
    none, one = bill.peaks(replace(way, resident=0)), bill.peaks(replace(way, resident=1))
    low, high = 0, bill.net.num_layers - LIVE - 1
    if none[1] > limits[1] and one[1] < none[1]:  # what is resident on the device needs no RAM
        low = min(-(-(none[1] - limits[1]) // (none[1] - one[1])), high)
    place = 0 if bill.device.own_memory else 1

    def over(resident: int) -> int:
        return bill.peaks(replace(way, resident=resident))[place] - limits[place]

    while low < high and (excess := over(high)) > 0:
        slope = excess - over(high - 1)  # peaks are the largest of straight lines, so this one is the steepest
        high = low if slope <= 0 else max(low, high - max(1, excess // slope))
    return max(low, high)


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


def refusal(model: Model, job: Job, every: Sequence[Plan], has: tuple[int, int], among: int = 1) -> RefusalError:
    """A sentence with the amount of memory that would do, rounded up to tenths of a GB (or tens of MB). RAM is that of
    all `among` processes together, as a budget is."""
    needs_more = least(every, spared(has))
    totals = (needs_more[0], None if needs_more[1] is None else (needs_more[1] + 1) * among)
    vram, ram = (None if need is None else _round_up(int(need * SPARE) + 1) for need in totals)
    needs = [f"{in_words(vram)} VRAM (--vram {short(vram)})"] if vram is not None else []
    needs += [f"{in_words(ram)} RAM (--ram {short(ram)})"] if ram is not None else []
    there = [f"{in_words(has[0])} VRAM"] if vram is not None else []
    there += [f"{in_words(has[1] * among)} RAM"] if ram is not None else []
    return RefusalError(
        "{model} at {width}×{height} needs at least {needs}, and {has} are there: give more or a smaller --size",
        vram,
        ram,
        **{
            "model": model.name,
            "width": job.size[0],
            "height": job.size[1],
            "needs": " + ".join(needs),
            "has": " + ".join(there),
        },
    )


def short(count: int) -> str:
    """As `--vram` takes it: "10.9G", "850M"."""
    return f"{count / 1e9:.1f}G" if count >= 10**9 else f"{count // 10**6}M"


def _round_up(count: int) -> int:
    unit = 10**8 if count >= 10**9 else 10**7
    return -(-count // unit) * unit


def reasons(best: Plan, every: Sequence[Plan], limits: tuple[int, int], model: Model) -> tuple[str, ...]:
    """Why this plan, in words."""
    said = [_about_precision(best, every, model)]
    source = say("RAM") if best.streamed == "ram" else say("disk")
    if best.streamed != "none":
        hidden = rank(best)[0] == 0
        said.append(
            say("blocks stream from {source} while others compute, at no loss of time", source=source)
            if hidden
            else say("blocks stream from {source}, and steps may wait for them", source=source)
        )
    if not best.prefix_kept:
        said.append(say("words and references are computed again at every step, as there is no room to keep them"))
    if best.modulation_table:
        said.append(say("modulation is tabulated, so a third of the transformer leaves memory"))
    if best.encoder == "unload":
        said.append(say("text encoder and transformer take turns"))
    if best.encoder == "cpu":
        said.append(say("the text encoder stays on the CPU, which reads slowly"))
    if best.vae_tile:
        said.append(say("the VAE works in tiles of {tile} pixels", tile=best.vae_tile))
    if best.transformer in OURS and best.streamed == "disk" and not model.packed:
        said.append(say("pack it once: lanting quantize {model} --to {kind}", model=model.name, kind=best.transformer))
    return tuple(said)


def _about_precision(best: Plan, every: Sequence[Plan], model: Model) -> str:
    if model.packed:
        return say("the file is packed already and used as it is")
    finer = {each.transformer: each.error for each in every if each.error < best.error}
    if not finer:
        return say("the weights keep the precision they are published in")
    names = ", ".join(sorted(finer, key=lambda name: finer[name]))
    return say("{kind}, because {finer} would not fit or would wait", kind=best.transformer, finer=names)
