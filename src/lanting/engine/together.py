"""Drawings that share their steps: one call of the transformer for all of them, each picture bit by bit as if alone.

Every drawing is the engine's own path with its own canvas, noise level, previews and checkpoints; only what its loop is
told comes from a step that all take together. They may come and go between steps. Nothing hangs on the networks
meanwhile, so whatever goes wrong in a common step (numbers that are not finite, too little memory, an error) ends the
sharing and not the drawings: each can be gone on with alone, from where it is, under its sentinel.

That the bits are the same follows from rows being computed one like the other, and from attention that leaves out what
is masked before it sums anything: our kernels for CPUs do both, and libraries need not. So it is tried: the first
common step of each shape is also taken alone, and where a bit differs nothing is shared from then on, unless somebody
asked for it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lanting.attach.sentinel import HIGHEST, LOWEST, lengths
from lanting.core.checkpoint import Checkpoint
from lanting.core.types import Progress, Request, Result
from lanting.engine.drawing import Drawing
from lanting.engine.resume import put_aside
from lanting.engine.room import rows_of
from lanting.flow.loop import Canvas, Step, denoise, velocity
from lanting.flow.together import Asked, joinable, velocities

if TYPE_CHECKING:
    from lanting.engine.engine import Engine


class ApartError(Exception):
    """The drawings have to go on one by one."""


class Joined(Drawing):
    """A drawing whose velocities come from a common step."""

    asks: Asked | None = None  # what it waits for
    answer: Tensor | None = None  # (B, N, C)
    last: Step | None = None
    schedule: tuple[float, ...] = ()

    def begin(self, canvas: Canvas) -> None:
        """Nothing may hang on networks that others use, so the autoencoder is watched before and after the steps."""
        self.hung.close()
        self.schedule = tuple(canvas.sigmas.tolist())

    def steps(self, canvas: Canvas) -> Iterator[Step | None]:
        walk = denoise(self.models.transformer, canvas, lambda *asked: self._told())
        latents = canvas.start
        for sigma in canvas.sigmas[:-1]:
            self.asks = Asked(canvas, latents, sigma)
            yield None
            self.last = step = next(walk)
            latents = step.latents
            yield step

    def _told(self) -> Tensor:
        answer, self.asks, self.answer = self.answer, None, None
        if answer is None:
            raise RuntimeError("a drawing went on before the common step was taken")
        return answer

    def rest(self) -> None:
        """Others may still need what passes through memory."""
        if self.vae is not None:
            self.hung.enter_context(self.vae)


@dataclass(eq=False)
class Seat:
    """One drawing among others."""

    drawing: Joined
    events: Any  # the engine's generator
    resume: Checkpoint | None
    work: float = 0.0  # seconds of its steps: of each common step its share
    over: bool = field(default=False)


Event = Progress | Checkpoint | Result | Exception


class Together:
    """The engine is its own until `close`.

    forced  share steps also where that changes last bits
    """

    def __init__(self, engine: Engine, forced: bool = False):
        self.engine, self.forced = engine, forced
        self.seats: list[Seat] = []
        self.apart = ""  # why no step can be shared any more: everybody has to go on alone, see `put_aside`
        self.turn = ExitStack()
        self.turn.enter_context(engine.turn.taken())

    def join(self, request: Request, previews: Any = False, every: int = 4, resume: Checkpoint | None = None) -> Seat:
        """From the next step on; as `Engine.stream_resumable`. Raises RequestError for wrong values."""
        engine = self.engine
        settled = engine.settled(request)
        drawing = Joined(engine.models, settled, engine.known(), resume)
        seat = Seat(drawing, engine.path(drawing, settled, previews, every, resume), resume)
        self.seats.append(seat)
        return seat

    def round(self) -> Iterator[tuple[Seat, Event]]:
        """Everybody's next step, with all events up to the one after; an error of one drawing is its last event.
        Nothing where the common step can't be taken: `apart` then says why."""
        for seat in [one for one in self.seats if one.drawing.asks is None]:
            yield from self._advance(seat)
        waiting = list(self.seats)
        try:
            self._answer(waiting)
        except Exception as error:  # whatever it is, it may be one drawing's own
            self.apart = str(error) if isinstance(error, ApartError) else f"{type(error).__name__}: {error}"
            return
        for seat in waiting:
            yield from self._advance(seat)

    def leave(self, seat: Seat) -> None:
        """Stop a drawing."""
        seat.over = True
        if seat in self.seats:
            self.seats.remove(seat)
        seat.events.close()

    def put_aside(self, seat: Seat) -> Checkpoint | None:
        """Where a drawing is, to go on with it alone; None: at its beginning. Its request must have been joined with
        `every` above 0."""
        drawing = seat.drawing
        if drawing.last is None:
            return seat.resume
        return put_aside(drawing.last, drawing.done, drawing.mark, drawing.aside)

    def close(self) -> None:
        """Stop all drawings and give the engine back."""
        with self.turn:
            for seat in list(self.seats):
                self.leave(seat)
            self.engine.models.rest()

    # ---------------------------------------------------------------- one after the other
    def _advance(self, seat: Seat) -> Iterator[tuple[Seat, Event]]:
        """Its events until it waits for the next common step, or has ended."""
        while not seat.over:
            try:
                event = next(seat.events, None)
            except Exception as error:
                event = error
            if event is None and seat.drawing.asks is not None:
                return
            if event is None or isinstance(event, Result | Exception):
                self.leave(seat)
            if event is not None:
                yield seat, event

    # ---------------------------------------------------------------- the common step
    @torch.no_grad()
    def _answer(self, seats: Sequence[Seat]) -> None:
        began = time.perf_counter()
        for group in self._groups(seats):
            self._ask(group)
        for seat in seats:
            seat.work += (time.perf_counter() - began) / len(seats)

    def _groups(self, seats: Sequence[Seat]) -> Iterator[list[Seat]]:
        """Those of one grid and schedule; who can't share a call is alone."""
        groups: dict[Any, list[Seat]] = {}
        for seat in seats:
            canvas = asked(seat).canvas
            grids = (*canvas.grids, *(one.grid for one in canvas.references))
            key = (grids, seat.drawing.schedule) if joinable(canvas) else (id(seat), seat.drawing.schedule)
            groups.setdefault(key, []).append(seat)
        several = len({schedule for _, schedule in groups}) > 1
        for (_, schedule), group in groups.items():
            if several:  # a table of modulations holds one schedule
                self.engine.models.prepare_transformer(torch.tensor(schedule))
            yield group

    def _ask(self, seats: Sequence[Seat]) -> None:
        models, questions = self.engine.models, [asked(seat) for seat in seats]
        net = models.transformer
        if not joinable(questions[0].canvas):
            found = [velocity(net, one.canvas, one.latents, one.sigma) for one in questions]
        else:
            grids = questions[0].canvas.grids
            most = rows_of(models, sum(frames * rows * columns for frames, rows, columns in grids))
            found = velocities(net, questions, most)
            self._prove(questions, found)
        if not all(map(sound, found)):
            raise ApartError("a velocity is not possible")
        for seat, one in zip(seats, found, strict=True):
            seat.drawing.answer = one

    def _prove(self, questions: Sequence[Asked], found: Sequence[Tensor]) -> None:
        """The first time: are they the bits of each alone?"""
        engine, canvas = self.engine, questions[0].canvas
        key = (engine.known().key, canvas.grids, sum(len(one.latents) for one in questions))
        if self.forced or len(questions) == 1 or key in engine.proved:
            return
        net = engine.models.transformer
        alone = [velocity(net, one.canvas, one.latents, one.sigma) for one in questions]
        engine.proved[key] = all(torch.equal(a, b) for a, b in zip(alone, found, strict=True))
        if not engine.proved[key]:
            raise ApartError("sharing steps changes bits here")


def asked(seat: Seat) -> Asked:
    assert seat.drawing.asks is not None
    return seat.drawing.asks


def sound(velocity: Tensor) -> bool:
    """Finite, and of a length that noise minus a picture can have; see `attach.sentinel`."""
    return all(LOWEST <= one <= HIGHEST for one in lengths(velocity).tolist())
