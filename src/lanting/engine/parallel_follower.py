"""The process that follows: it holds the transformer, and answers calls of it until the leader is gone.

It loads what the leader loads, in the same way, so the same question has the same bits for its answer. Whatever fails
here ends it, with a sentence for the leader, which goes on alone; half a follower would be a source of wrong pictures.
Messages are (verb, values), each verb a method of `Follower`; those with a `serial` are answered.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import IO, Any

import torch
from torch import Tensor

from lanting.attach.parallel import Seat, Shared
from lanting.attach.parallel_group import Group
from lanting.core.errors import LantingError
from lanting.core.processes import own_pipes
from lanting.engine.fit import hold
from lanting.engine.models import Models
from lanting.engine.parallel_peer import packed, read, write
from lanting.flow.loop import Conditioning, stacked
from lanting.nn.single_stream import QwenImage21Transformer, keep_prefix
from lanting.weights.find import ModelFolder


@dataclass(frozen=True)
class Opening:
    """What the leader's own models were made from."""

    folder: ModelFolder
    dtype: str
    loras: tuple[str, ...]
    quant: str
    plan: Any  # a lanting.plan.Plan or None
    vram: str | int | None
    cwd: str  # paths may be relative to where the leader was
    threads: int | None  # None: as many as there are


@dataclass(frozen=True)
class Job:
    """What stays the same in all steps of a drawing, on one follower."""

    prompts: Mapping[str, Conditioning]  # branch -> prompt
    references: Tensor | None  # (B, R, C)
    grids: tuple[tuple[int, int, int], ...]
    target: int  # tokens that are asked for
    seat: Seat | None  # among the devices of its side; None: it is its side
    meeting: str  # the file where that side's group meets
    kept: bool  # what 2.1 reads once is kept


@dataclass
class Follower:
    """One model on one device. `out` is the way back to the leader."""

    device: str
    models: Models
    out: IO[bytes]
    patience: float = 300.0  # seconds that other devices of a group are waited for
    job: Job | None = None
    drawing: ExitStack = field(default_factory=ExitStack)
    groups: dict[str, Group] = field(default_factory=dict[str, Group])

    def ready(self, serial: int) -> None:
        """Answered when the weights are there, with what they are."""
        _ = self.models.transformer
        write(self.out, packed(("answer", serial, self.models.fingerprint)))

    def strengths(self, strengths: Sequence[float]) -> None:
        self.models.set_strengths(strengths)

    def prepare(self, sigmas: Tensor) -> None:
        """A schedule's steps are about to be asked for."""
        self.models.prepare_transformer(sigmas)

    def begin(self, job: Job) -> None:
        self.end()
        net, device = self.models.transformer, self.models.device
        prompts = {branch: prompt.to(device) for branch, prompt in job.prompts.items()}
        references = None if job.references is None else job.references.to(device)
        self.job = replace(job, prompts=prompts, references=references)
        if job.kept and isinstance(net, QwenImage21Transformer):
            self.drawing.enter_context(keep_prefix(net))
        if job.seat is not None and job.meeting not in self.groups:
            seat = job.seat
            self.groups[job.meeting] = Group(job.meeting, seat.rank, seat.size, device, self.patience)

    def step(
        self, serial: int, branch: str, latents: Tensor, timestep: Tensor, residuals: Sequence[Tensor], copies: int
    ) -> None:
        """Answered with this follower's part of the target's velocity."""
        job, device = self.job, self.models.device
        assert job is not None
        net: Any = self.models.transformer
        if job.seat is not None:
            net = Shared(net, job.seat, self.groups[job.meeting])
        prompt, rows = job.prompts[branch], latents.to(device)
        if job.references is not None:
            rows = torch.cat([rows, job.references.expand(len(rows), -1, -1)], 1)  # (B, N + R, C)
        more: dict[str, Any] = {"places": prompt.places} if prompt.places else {}
        control = [stacked(one.to(device), copies) for one in residuals]
        found = net(
            stacked(rows, copies),
            stacked(timestep.to(device), copies),
            prompt.embeds,
            prompt.mask,
            job.grids,
            job.target,
            control=control,
            branch=branch,
            **more,
        )
        write(self.out, packed(("answer", serial, found[:, : job.target])))

    def end(self) -> None:
        """A drawing is over."""
        self.drawing.close()
        self.job = None

    def rest(self) -> None:
        """Nothing that only passes through memory stays there."""
        self.end()
        self.models.rest()


def opened(device: str, opening: Opening, strengths: Sequence[float], patience: float, out: IO[bytes]) -> Follower:
    os.chdir(opening.cwd)
    if opening.threads is not None:
        torch.set_num_threads(opening.threads)
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    models = Models(opening.folder, device, opening.dtype, loras=opening.loras, quant=opening.quant, plan=opening.plan)
    hold(models.device, opening.vram)
    models.set_strengths(strengths)
    return Follower(device, models, out, patience)


def listen(pipe: IO[bytes], orders: queue.SimpleQueue[Any], leave: Callable[[], object]) -> None:
    """Beside the work, so that a leader that is gone ends whatever is under way."""
    try:
        while True:
            orders.put(read(pipe))
    except (EOFError, OSError):
        orders.put(None)
        leave()


@torch.no_grad()
def serve(pipe: IO[bytes], out: IO[bytes], leave: Callable[[], object]) -> None:
    """Until the leader is gone, or something fails. The first message says what to open."""
    orders: queue.SimpleQueue[Any] = queue.SimpleQueue()
    threading.Thread(target=listen, args=(pipe, orders, leave), daemon=True).start()
    follower: Follower | None = None
    try:
        while (order := orders.get()) is not None:
            verb, values = order
            if follower is None:
                follower = opened(out=out, **values)
            else:
                getattr(follower, verb)(**values)
        return
    except LantingError as error:
        told: tuple[str, Mapping[str, object]] = (error.sentence, error.values)
    except BaseException as error:
        line = (str(error).strip().splitlines() or [""])[0]
        told = (f"{type(error).__name__}: {line}", {})
    write(out, packed(("failed", *told)))


def main() -> None:
    orders, answers = own_pipes()
    try:
        serve(orders, answers, lambda: os._exit(0))
    except OSError:  # nobody hears of it any more
        pass
    finally:
        os._exit(0)  # not waiting for groups whose other members may be gone
