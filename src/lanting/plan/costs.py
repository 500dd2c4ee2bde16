"""What one way to run a model costs: bytes at the worst moment, and seconds where the device's speed is known.

A picture has three phases: the text encoder reads (and the VAE encodes pictures), the transformer takes its steps, the
VAE decodes. Whatever is resident counts in all of them; what takes turns counts in its own. The largest phase is the
peak.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import lanting.plan.activations as a
from lanting.plan.activations import Job
from lanting.plan.kinds import Kind
from lanting.plan.machine import Device, Machine
from lanting.plan.model import Model
from lanting.plan.plan import Plan
from lanting.plan.sizes import Sizes
from lanting.plan.speeds import DISK_RATE, find_card

T = TypeVar("T")
LIVE = 2  # blocks in memory while they stream: one computes, one arrives
PROGRAM = 275 * 10**6  # bytes of Python, torch and this package before a weight is read; measured on Linux, CPU build
HALF = 18 * 10**6  # more of it when a CPU computes in 16 bits: code that is made for that
CUDA_PROGRAM = 1_400 * 10**6  # the same with CUDA's libraries; not measured here
DRIVER = 550 * 10**6  # bytes of a card that its driver takes per process; not measured here
FAULT = 1 << 16  # bytes of a file that a system maps around one that is asked for
DESKTOP_CPU = 2e11  # operations a second while it reads a prompt; an assumption
DESKTOP_RAM = 4e10  # bytes a second while it writes; an assumption
ANSWER = 250  # tokens of a rewritten prompt: it is asked to have 150 words
SLACK = 0.02  # of weights and activations: what the allocator holds beside them
CUDA_SLACK = 0.05  # the same of CUDA's caching allocator; not measured here


@dataclass(frozen=True, slots=True)
class Way:
    """What may be chosen. See Plan for the words."""

    kind: Kind
    reader: Kind
    resident: int
    streamed: str
    table: bool
    encoder: str
    parked: str
    tile: int
    kept: bool = True


class Bill:
    """Every part of the cost of drawing one job with one model on one device; parts are computed once and kept."""

    def __init__(self, model: Model, job: Job, machine: Machine, device: Device) -> None:
        self.model, self.job, self.machine, self.device = model, job, machine, device
        self.net = model.geometry.transformer
        self.dtype, self.on_cpu = model.dtype(device.name), device.name == "cpu"
        self.card = None if self.on_cpu else find_card(device.title)
        self.vae = model.vae(self.dtype)
        self.table = a.table_bytes(self.net, job, self.dtype)
        self.prefix = a.kept_bytes(self.net, job, self.dtype)
        self.laid = a.laid_bytes(model.geometry.vae, bool(job.encoded)) if self.on_cpu else 0
        self.jobs = {True: job, False: replace(job, kept=False)}
        self.kept: dict[tuple[object, ...], Any] = {}

    def once(self, key: tuple[object, ...], make: Callable[[], T]) -> T:
        """Made at the first call with this key; the key says what varies from way to way, and is quick to compare."""
        if key not in self.kept:
            self.kept[key] = make()
        return self.kept[key]

    def sizes(self, kind: Kind) -> Sizes:
        """Bytes of the transformer's weights."""
        return self.once(("sizes", kind.name), lambda: self.model.transformer(kind, self.dtype))

    def reader(self, way: Way) -> int:
        """Bytes of the text encoder's weights. Where it is read anew each time and memory is so short that the
        transformer streams from disk, its layers pass through one by one too."""
        kind, seen = way.reader, bool(self.job.seen)
        held = self.once(("reader", kind.name), lambda: self.model.reader(kind, self.dtype, seen, self.job.writes))
        every = held.every
        if (self.on_cpu or way.encoder == "cpu") and self.model.looked_up(self.dtype):
            rows = max(self.job.prompts * self.job.read_tokens, self.job.written_tokens)
            every += min(rows * FAULT, held.words) - held.words
        if not by_layers(way):
            return every
        return every - held.layers + held.layers * LIVE // max(self.model.geometry.language.num_hidden_layers, LIVE)

    def reading(self, kind: Kind, on_cpu: bool) -> int:
        """Activations of the text encoder."""
        return self.once(
            ("reading", kind.name, on_cpu),
            lambda: a.reader_peak(self.model.geometry, self.job, kind, self.dtype, on_cpu),
        )

    def painting(self, kind: Kind, table: bool, kept: bool) -> int:
        """Activations of a step, and what is kept from step to step."""
        sizes, job, dtype, on_cpu = self.sizes(kind), self.jobs[kept], self.dtype, self.on_cpu
        return self.once(
            ("painting", kind.name, table, kept),
            lambda: a.transformer_peak(self.net, sizes, kind, job, dtype, on_cpu, table),
        )

    def coding(self, tile: int) -> tuple[int, int]:
        """Activations of the VAE: (pictures to latents, latents to pictures)."""
        vae, job, dtype = self.model.geometry.vae, self.job, self.dtype
        return self.once(
            ("coding", tile),
            lambda: (a.encoding_peak(vae, job.encoded, dtype, tile), a.decoding_peak(vae, job, dtype, tile)),
        )

    def transformer(self, way: Way) -> tuple[int, int]:
        """(on the device, elsewhere in RAM) while it computes: weights."""
        sizes = self.sizes(way.kind)
        each = sizes.block + (0 if way.table else sizes.modulation)
        outside = sizes.rest + self.model.extra + (self.table if way.table else 0)
        away = sizes.blocks - way.resident
        if not away:
            return sizes.blocks * each + outside, 0
        here = min(way.resident + LIVE, sizes.blocks) * each + outside
        if not self.device.own_memory:
            return here, 0
        return here, (away if way.streamed == "ram" else LIVE) * each

    def passing(self, way: Way) -> int:
        """Of these, weights that are let go after the last step: pages of a file are, buffers of a device stay."""
        sizes, away = self.sizes(way.kind), self.net.num_layers - way.resident
        return min(LIVE, away) * (sizes.block + (0 if way.table else sizes.modulation)) if self.on_cpu else 0

    def peaks(self, way: Way) -> tuple[int, int]:
        """(VRAM, RAM) at the worst moment."""
        encoding, decoding = self.coding(way.tile)
        body, pinned = self.transformer(way)
        reader, reading = self.reader(way), self.reading(way.reader, self.on_cpu or way.encoder == "cpu")
        kept = reader if way.encoder == "keep" else 0  # beside the transformer
        waiting = body if way.encoder != "unload" else 0  # beside the text encoder
        painted = body - self.passing(way)  # and a prefix is let go
        phases = [body + kept + self.painting(way.kind, way.table, way.kept), painted + kept + decoding]
        if way.encoder == "cpu":
            phases.append(body + encoding)
        else:
            phases.append(waiting + reader + max(reading, encoding))
        laid = self.laid if way.encoder == "keep" else 0  # made anew each time where memory is short
        worst = int((self.vae + laid + max(phases)) * (1 + (CUDA_SLACK if self.device.own_memory else SLACK)))
        if not self.device.own_memory:
            return 0, PROGRAM + worst + (HALF if self.on_cpu and a.BYTES[self.dtype] == 2 else 0)
        ram = CUDA_PROGRAM + pinned
        if way.encoder == "cpu":
            ram += reader + reading
        elif way.encoder == "unload" and way.parked == "ram":
            ram += reader + body
        return DRIVER + worst, int(ram)

    def step(self, way: Way) -> tuple[float | None, float | None]:
        """(seconds of one step, what streaming and computing things again add as a factor); None where the device's
        speed is not known."""
        card, again = self.card, 1.0
        if not way.kept:
            again = a.work(self.net, self.jobs[False]) / a.work(self.net, self.job)
        if card is None or card.operations is None:
            return None, again if way.streamed == "none" else None
        sizes, job = self.sizes(way.kind), self.jobs[way.kept]
        passes = 1 if job.joined else job.branches
        weights = sizes.blocks * self.net.linears
        expanded = weights * (way.kind.bits / 8 + 8) / (card.bandwidth * 1e9) if way.kind.packed else 0.0
        computing = job.branches * a.work(self.net, job) / card.operations + passes * expanded
        each = sizes.block + (0 if way.table else sizes.modulation)
        moving = passes * (sizes.blocks - way.resident) * each / self.rate(way.streamed)
        step = max(computing, moving)
        return step, again * step / computing

    def rate(self, source: str) -> float:
        """Bytes a second from "ram" or "disk" to the device."""
        if source == "ram":
            return 1e9 * (self.card.link if self.card is not None and self.card.link else 25)
        return self.machine.disk_rate or DISK_RATE

    def image(self, way: Way, step: float | None) -> float | None:
        """Seconds of one request: reading, steps, decoding; without the first loading, with taking turns."""
        card, job, language = self.card, self.job, self.model.geometry.language
        if step is None or card is None or card.operations is None:
            return None
        rows = job.prompts * job.read_tokens * job.branches
        per_token = language.hidden_size * (2 * language.hidden_size + 3 * language.intermediate_size)
        reading = 2 * rows * language.num_hidden_layers * per_token
        seconds = reading / (DESKTOP_CPU if way.encoder == "cpu" else card.operations)
        once = job.branches * a.first_work(self.net, self.jobs[way.kept])
        once += a.decoding_work(self.model.geometry.vae, job)
        seconds += step * job.steps + once / card.operations
        if job.writes:
            seconds += job.prompts * ANSWER * self.said(way)
        if way.encoder == "unload":
            seconds += (self.reader(way) + self.transformer(way)[0]) / self.rate(way.parked)
        return seconds

    def said(self, way: Way) -> float:
        """Seconds for each word that the text encoder writes: all its weights are read for it."""
        held = self.model.reader(way.reader, self.dtype, bool(self.job.seen), True)
        bandwidth = DESKTOP_RAM if way.encoder == "cpu" or self.card is None else self.card.bandwidth * 1e9
        return held.every / bandwidth + (held.layers / self.rate("disk") if by_layers(way) else 0.0)


def by_layers(way: Way) -> bool:
    """Whether the text encoder's layers pass through memory one by one, from the disk."""
    return (way.encoder, way.parked, way.streamed) == ("unload", "disk", "disk")


def price(bill: Bill, way: Way) -> Plan:
    """A way with everything it costs."""
    model = bill.model
    vram, ram = bill.peaks(way)
    step, wait = bill.step(way)
    key = ("disk", way.kind.name, way.reader.name)
    disk = bill.once(key, lambda: model.disk(way.kind, way.reader, bill.dtype))
    return Plan(
        model=model.name,
        device=bill.device.name,
        dtype=bill.dtype,
        transformer=way.kind.name if model.kind is not None else "as stored",
        text_encoder=way.reader.name if model.reader_kind is not None else "as stored",
        blocks=bill.net.num_layers,
        resident_blocks=way.resident,
        streamed=way.streamed,
        modulation_table=way.table,
        encoder=way.encoder,
        parked=way.parked,
        vae_tile=way.tile,
        peak_vram=vram,
        peak_ram=ram,
        disk=disk,
        load_seconds=disk / (bill.machine.disk_rate or DISK_RATE),
        step_seconds=step,
        image_seconds=bill.image(way, step),
        error=way.kind.error,
        wait=wait,
        prefix_kept=way.kept,
    )
