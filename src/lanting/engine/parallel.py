"""One picture on several devices: the engine's process leads, and a process for each further device follows.

The leader does everything that it does alone. A follower holds the transformer and nothing else, loaded in the same
way, and answers calls of it (`engine.parallel_follower`). What is shared out is decided for each drawing: the two sides
of the guidance first, which have nothing to say to one another within a step, then the tokens of a side
(`engine.parallel_split`). A follower that fails is told of in a sentence, the leader goes on alone, and for the next
picture followers are started anew; after a few failures no more.

Rejected: threads of one process, which queue up for Python's lock when they ask several GPUs for thousands of kernels;
and a launcher (torchrun), since whoever calls `Engine.open` is a program already.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lanting.attach.parallel_group import Group
from lanting.core.types import Notice, note
from lanting.engine.choose import say_dtypes
from lanting.engine.controls import check_devices
from lanting.engine.parallel_follower import Opening
from lanting.engine.parallel_peer import GoneError, Peer
from lanting.kernels.library import thread_count, use_threads

if TYPE_CHECKING:
    from lanting.engine.models import Models

FAILURES = 3  # in a row, after which no followers are started any more
LOADING = 300.0  # seconds beyond what the leader took that a follower may load
SLOWER = 5.0  # times what the leader took
MEETING = 300.0  # seconds that devices wait for one another inside a step


@dataclass(frozen=True, slots=True)
class Layout:
    """How a drawing is shared out: one or both `sides` of the guidance, `each` with so many devices."""

    sides: int = 1
    each: int = 1

    @property
    def devices(self) -> int:
        return self.sides * self.each


def layout_of(devices: int, guided: bool, most: int) -> Layout:
    """The layout with most devices; of equal ones that with two sides, which costs no exchange.

    guided  the two sides of the guidance are asked for apart
    most    devices that one side may have
    """
    sides = (1, 2) if guided else (1,)
    every = [Layout(side, each) for side in sides for each in range(1, most + 1) if side * each <= devices]
    return max(every, key=lambda one: (one.devices, one.sides))


class Crew:
    """The followers of one engine, started when the first picture is drawn.

    names  of all devices, the leader's first
    vram   a budget for each of them, as `Engine.open` takes it
    """

    def __init__(self, models: Models, names: Sequence[str], vram: str | int | None = None):
        check_devices(models)
        self.models, self.names = models, tuple(names)
        loras = tuple(f"{lora.given}:{lora.strength!r}" for lora in models.loras)
        dtypes = say_dtypes(models.dtypes)
        on_cpu = models.device.type == "cpu"
        self.threads = max(thread_count() // len(names), 1) if on_cpu else None  # of each; None: as many as there are
        self.opening = Opening(
            folder=models.folder,
            dtype=dtypes,
            loras=loras,
            quant=models.quant,
            plan=models.plan,
            vram=vram,
            cwd=os.getcwd(),
            threads=self.threads,
        )
        self.peers: list[Peer] = []
        self.waiting: list[int] = []  # numbers under which they say that they have loaded
        self.began = 0.0
        self.failures = 0
        self.notices: list[Notice] = []  # of what went wrong before a drawing's steps, for that drawing to tell
        self.places: list[str] = []  # the folder where groups meet, once there is one
        self.groups: dict[tuple[int, ...], Group] = {}
        self.end = weakref.finalize(self, end, self.peers, self.places)

    def start(self) -> None:
        """Have them load, beside whatever the leader does; those that run already go on."""
        self.notices.clear()
        if self.peers and all(peer.here for peer in self.peers):
            return
        if self.peers:  # one was ended between two pictures
            self.kill()
            self.failures += 1
        if self.failures >= FAILURES:
            self.notices.append(note("the other devices failed too often: {device} draws alone", device=self.names[0]))
            return
        self.began = time.monotonic()
        strengths = [lora.strength for lora in self.models.loras]
        for name in self.names[1:]:
            try:
                peer = Peer(name, self.threads)
            except OSError as error:  # no more processes, or no memory for one
                self.fail(name, error)
                return
            peer.tell("open", device=name, opening=self.opening, strengths=strengths, patience=MEETING)
            self.peers.append(peer)
            self.waiting.append(peer.ask("ready"))

    def prepare(self, sigmas: Tensor) -> None:
        """The leader has its weights and a schedule: wait for the followers', and tell them."""
        try:
            seconds = LOADING + SLOWER * (time.monotonic() - self.began)
            for peer, serial in zip(self.peers, self.waiting, strict=False):
                try:
                    found = peer.answer(serial, seconds)
                    if found != self.models.fingerprint:
                        raise GoneError("the model's files were changed")
                except GoneError as error:
                    self.fail(peer.device, error)
                    return
        finally:
            self.waiting.clear()
        for peer in self.peers:
            peer.tell("prepare", sigmas=sigmas)

    def strengths(self, strengths: Sequence[float]) -> None:
        """Of LoRAs, from the next picture on."""
        for peer in self.peers:
            peer.tell("strengths", strengths=list(strengths))

    def rest(self) -> None:
        """A drawing is over; with them, where they are still there."""
        self.failures = 0 if self.peers else self.failures
        for peer in self.peers:
            peer.tell("rest")

    def place(self, key: tuple[int, ...]) -> str:
        """The file where the devices of these numbers (0: the leader) meet."""
        if not self.places:
            self.places.append(tempfile.mkdtemp(prefix="lanting-"))
        marks = "-".join(str(self.peers[one - 1].process.pid) for one in key if one)
        return os.path.join(self.places[0], f"{key[0]}-{marks}")

    def group(self, key: tuple[int, ...]) -> Group:
        """The leader's part of such a group, once the others were told of it. Raises GroupError."""
        if key not in self.groups:
            group = self.groups[key] = Group(self.place(key), 0, len(key), self.models.device, MEETING)
            for one in key[1:]:
                self.peers[one - 1].when_gone.append(group.abort)
        return self.groups[key]

    def fail(self, device: str, error: Exception, notices: list[Notice] | None = None) -> None:
        """One of them can't go on: none does, for they may be waiting for one another."""
        told = note("{device} can't help: {reason}; the picture is drawn without it", device=device, reason=str(error))
        (self.notices if notices is None else notices).append(told)
        self.failures += 1
        self.kill()

    def kill(self) -> None:
        """End all followers; the next picture starts them anew."""
        for peer in self.peers:
            peer.kill()
        self._forget()

    def close(self) -> None:
        """Let them leave."""
        for peer in self.peers:
            peer.orders.put(None)
        for peer in self.peers:
            peer.close()
        self._forget()
        self.failures = 0

    def _forget(self) -> None:
        self.peers.clear()
        self.waiting.clear()
        self.groups.clear()
        remove(self.places)


def end(peers: Sequence[Peer], places: list[str]) -> None:
    """What an engine that nobody closed leaves behind."""
    for peer in peers:
        peer.process.kill()
    remove(places)


def remove(places: list[str]) -> None:
    for place in places:
        shutil.rmtree(place, ignore_errors=True)
    places.clear()


@contextmanager
def sharing_threads(threads: int | None) -> Iterator[None]:
    """A share of the processor's threads while several processes compute; all of them again afterwards."""
    if threads is None:
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(min(threads, before))
    use_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
        use_threads(thread_count())
