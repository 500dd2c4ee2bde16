"""The velocities of one canvas from several devices, in place of `flow.loop.velocity`.

Each device is asked what it would be asked alone, in the same words, so two sides of the guidance on two devices give
the picture that one gives, bit for bit. In a step latents go out and velocities come back; prompts, references and
positions went once. Whatever goes wrong with the others, the step is done again here, by the leader alone, and so is
the rest of the drawing.
"""

from __future__ import annotations

import copy
import math
import os
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lanting.attach.compiled import VARIABLE, backend_of
from lanting.attach.parallel import Seat, Shared
from lanting.attach.parallel_group import GroupError
from lanting.attach.sentinel import ALIKE, HIGHEST, LOWEST, lengths
from lanting.core.types import Notice, note
from lanting.engine.parallel import Crew, layout_of, sharing_threads
from lanting.engine.parallel_follower import Job
from lanting.engine.parallel_peer import GoneError, Peer
from lanting.flow.guidance import guide
from lanting.flow.loop import Canvas, Conditioning, Model, Question, velocity
from lanting.nn.mmdit import QwenImageTransformer

if TYPE_CHECKING:
    from lanting.engine.models import Models

WORTH = 1 << 27  # tokens of a device times the width squared, below which exchanges take longer than they save
FIRST, LATER = 600.0, 60.0  # seconds that an answer is waited for: kernels are made in a first step
WORD = 1.0  # seconds in which one that failed says why
SLOWER = 10.0  # times the leader's slowest step that are added to that


@dataclass(frozen=True)
class Duty:
    """What one follower is asked in each step."""

    peer: Peer
    branches: tuple[str, ...]
    seat: Seat | None


class Split:
    """For one drawing; a context, after which followers keep nothing of it.

    kept    what 2.1 reads once a drawing is kept
    spares  work may be left out, which the leader decides block by block: then only whole sides are shared out
    """

    def __init__(self, models: Models, crew: Crew, canvas: Canvas, kept: bool = False, spares: bool = False):
        self.models, self.crew, self.canvas, self.kept = models, crew, canvas, kept
        self.notices: list[Notice] = [*crew.notices]
        crew.notices.clear()
        self.over, self.slowest, self.first = False, 0.0, True
        self.duties: list[Duty] = []
        self.odd = False  # this model's numbers are, whoever computes them
        self.exchanged = False  # a step was made by devices that share a side
        self.own: tuple[str, ...] = ()  # branches that the leader computes
        self.shared: Shared | None = None
        self.guided = canvas.negative is not None and not canvas.batched_guidance
        self.tokens = canvas.start.shape[1] + sum(math.prod(one.grid) for one in canvas.references)
        self.layout = layout_of(len(crew.peers) + 1, self.guided, 1 if spares else self._most())
        self.threads = ExitStack()

    def __enter__(self) -> Split:
        if not self.crew.peers:
            self.over = True
        elif self.layout.devices == 1:
            self.alone(note("nothing in this picture can be shared out: {device} draws it alone", device=self.leader))
        if self.over:
            return self
        self.threads.enter_context(sharing_threads(self.crew.threads))
        try:
            self._begin()
        except GroupError as error:
            self.fail(error)
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    @property
    def leader(self) -> str:
        return self.crew.names[0]

    def alone(self, why: Notice) -> None:
        """The leader draws by itself, which is told. Before it is entered."""
        if not self.over:
            self.over = True
            self.notices.append(why)

    def stop(self) -> None:
        """From here on the leader draws by itself."""
        if not self.over:
            self.over = True
            self.threads.close()

    def __call__(self, model: Model, canvas: Canvas, latents: Tensor, sigma: Tensor) -> Tensor:
        """`flow.loop.velocity`: (B, N, C)."""
        if not self.over:
            try:
                return self._velocity(Question(model, canvas, latents, sigma))
            except (GoneError, GroupError) as error:
                self.fail(error)
            except BaseException:
                if self.shared is not None:  # others wait for this device inside of a block
                    self.crew.kill()
                raise
        return velocity(model, canvas, latents, sigma)

    def question(self, model: Model, canvas: Canvas, latents: Tensor, sigma: Tensor) -> Question:
        """For whoever asks for one side after the other, and not always for both."""
        question = Question(model, canvas, latents, sigma)
        return question if self.over else Halved(question, self)

    # ---------------------------------------------------------------- before the first step
    def _most(self) -> int:
        """Devices that one side may have."""
        net = self.models.transformer
        if not isinstance(net, QwenImageTransformer) or backend_of(os.environ.get(VARIABLE, "")) is not None:
            return 1
        worth = self.tokens * net.config.width**2 // WORTH
        return max(min(net.config.num_attention_heads, self.tokens, worth), 1)

    def _begin(self) -> None:
        """Who does what, told to everybody."""
        each, peers, canvas = self.layout.each, self.crew.peers, self.canvas
        every = ("positive", "negative") if self.guided else ("positive",) if canvas.negative is None else ("both",)
        sides = [every] if self.layout.sides == 1 else [("positive",), ("negative",)]
        self.own = sides[0]
        for number, branches in enumerate(sides):
            key = tuple(range(number * each, (number + 1) * each))
            for rank, one in enumerate(key):
                seat = Seat(rank, each, self.tokens) if each > 1 else None
                if one:
                    job = self._job(branches, seat, self.crew.place(key) if seat is not None else "")
                    peers[one - 1].tell("begin", job=job)
                    self.duties.append(Duty(peers[one - 1], branches, seat))
        if each > 1:
            net: Any = self.models.transformer
            self.shared = Shared(net, Seat(0, each, self.tokens), self.crew.group(tuple(range(each))))

    def _job(self, branches: Sequence[str], seat: Seat | None, meeting: str) -> Job:
        canvas = self.canvas
        seen = [one.data.expand(len(canvas.start), -1, -1) for one in canvas.references]
        references = torch.cat(seen, 1) if seen else None  # (B, R, C)
        grids = (*canvas.grids, *(one.grid for one in canvas.references))
        prompts = {branch: self._prompt(branch) for branch in branches}
        return Job(prompts, references, grids, canvas.start.shape[1], seat, meeting, self.kept)

    def _prompt(self, branch: str) -> Conditioning:
        canvas = self.canvas
        if branch == "both":
            return canvas.joined
        found = {"positive": canvas.positive, "negative": canvas.negative}[branch]
        assert found is not None
        return found

    # ---------------------------------------------------------------- a step
    def _velocity(self, question: Question) -> Tensor:
        """The guided velocity. Raises GoneError or GroupError where somebody failed."""
        began = time.perf_counter()
        asked = {branch: self.asked(question, branch) for branch in ("positive", "negative", "both")}
        parts = {branch: [self._computed(question, branch)] for branch in self.own}
        for branch, numbers in asked.items():
            if not numbers:
                continue
            parts.setdefault(branch, []).extend(self.answers(numbers, began, question.seen.device))
        self.exchanged |= self.shared is not None
        whole = {branch: torch.cat(found, 1) if len(found) > 1 else found[0] for branch, found in parts.items()}
        whole |= {branch: self.trusted(question, branch, whole[branch]) for branch, numbers in asked.items() if numbers}
        if self.canvas.negative is None:
            return whole["positive"]
        sides = whole["both"].chunk(2) if "both" in whole else (whole["positive"], whole["negative"])
        return guide(sides[0], sides[1], self.canvas.guidance_scale, self.canvas.renormalize)

    def asked(self, question: Question, branch: str) -> list[tuple[Duty, int]]:
        """The followers that compute a branch, and the numbers of what they were asked."""
        copies = 2 if branch == "both" else 1
        latents = question.seen[:, : question.tokens]
        numbers = []
        for duty in self.duties:
            if branch in duty.branches:
                seat = duty.seat
                residuals = [one if seat is None else seat.own(one) for one in question.residuals]
                values = {"latents": latents, "timestep": question.timestep, "residuals": residuals}
                numbers.append((duty, duty.peer.ask("step", branch=branch, copies=copies, **values)))
        return numbers

    def answers(self, asked: Sequence[tuple[Duty, int]], began: float, device: torch.device) -> list[Tensor]:
        """What followers found, on the leader's device; `began` is when they were asked. Raises GoneError."""
        seconds = (FIRST if self.first else LATER) + SLOWER * max(self.slowest, time.perf_counter() - began)
        found = [duty.peer.answer(number, seconds) for duty, number in asked]
        self.first, self.slowest = False, max(self.slowest, time.perf_counter() - began)
        return [part.to(device) for part in found]

    def trusted(self, question: Question, branch: str, found: Tensor) -> Tensor:
        """What followers found, or what the leader does where that is hardly possible. Guidance brings every sum to a
        usual length, so the sentinel would not see it."""
        if self.odd or all(LOWEST <= one <= HIGHEST for one in lengths(found).tolist()):
            return found
        own = question.ask(self._prompt(branch), branch)
        self.odd = not all(LOWEST <= one <= HIGHEST for one in lengths(own).tolist())  # for the sentinel to judge
        difference = torch.linalg.vector_norm((found - own).float()) / torch.linalg.vector_norm(own.float())
        if not self.odd or float(difference) > ALIKE:
            self.fail(GoneError("its numbers are not possible"))
        return own

    def _computed(self, question: Question, branch: str) -> Tensor:
        """The leader's part of a branch."""
        if self.shared is not None:
            question = copy.copy(question)
            question.model = self.shared
            question.residuals = [self.shared.seat.own(one) for one in question.residuals]
        return question.ask(self._prompt(branch), branch)

    def fail(self, error: Exception) -> None:
        """Tell of whoever is gone: those who waited for it may be, too."""
        if self.over:  # told already
            return
        until = time.monotonic() + WORD
        gone: list[Peer] = []
        while not gone and time.monotonic() < until:
            time.sleep(0.01)
            gone = [peer for peer in self.crew.peers if peer.ended.is_set()]
        gone.sort(key=lambda peer: GroupError.__name__ in str(peer.failure))
        device = gone[0].device if gone else ",".join(self.crew.names[1:])
        self.crew.fail(device, gone[0].failure if gone else error, self.notices)
        self.stop()


class Halved(Question):
    """A question whose negative side is another device's."""

    def __init__(self, question: Question, split: Split):
        self.__dict__.update(question.__dict__)
        self.split, self.numbers, self.began = split, [], 0.0

    def expect_negative(self) -> None:
        if not self.numbers:
            self.began = time.perf_counter()
            self.numbers = self.split.asked(self, "negative")

    def negative(self) -> Tensor:
        self.expect_negative()
        try:
            found = self.split.answers(self.numbers, self.began, self.seen.device)[0]
        except GoneError as error:
            self.split.fail(error)
            return super().negative()
        return self.split.trusted(self, "negative", found)
