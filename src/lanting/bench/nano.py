"""The embedded model at work: seconds of one step, and of one picture from words to pixels, its weights being there.

Every picture has another text of the same length, because the states of a prompt that was read are kept.
"""

from __future__ import annotations

from itertools import count

from lanting.bench.subject import Clock, Subject
from lanting.bench.vae import saves
from lanting.bench.watch import Watch
from lanting.bench.work import decoding, opening, prediction, reading
from lanting.core.types import Progress, Request, Result
from lanting.engine import Engine
from lanting.plan.activations import tokens
from lanting.plan.geometry import Geometry, Language, Transformer, Vae

PROMPT = 'a blue sign that says "HELLO {number}"'


class Drawing:
    """An open engine and what one of its pictures takes."""

    def __init__(self, engine: Engine):
        self.engine, self.numbers = engine, count(10)
        engine.run(self.request())  # loads the weights
        own = engine.spec.defaults
        self.steps, self.size = own.steps, own.size
        net = Geometry.from_configs(engine.folder.configs)
        assert isinstance(net.transformer, Transformer) and isinstance(net.language, Language)
        assert isinstance(net.vae, Vae)
        self.dtype = dtype = str(engine.models.dtype).removeprefix("torch.")
        texts = [kept.embeds.shape[1] for kept in engine.models.prompts.values()]
        sides = [prediction(net.transformer, tokens(self.size), text, dtype) for text in texts]
        self.step = sum(sides[1:], sides[0])
        read = reading(net.language, opening() + max(texts), dtype)
        decoded = decoding(net.vae, self.size, dtype, saves(engine.models.codec.vae))
        self.whole = self.step * self.steps + read + decoded

    @property
    def form(self) -> str:
        """What the table calls it."""
        return {"float32": "fp32", "bfloat16": "bf16"}.get(self.dtype, self.dtype)

    def request(self) -> Request:
        return Request(PROMPT.format(number=next(self.numbers) % 90 + 10), seed=7)

    def draw(self, clock: Clock) -> None:
        """A picture."""
        self.engine.run(self.request())

    def step_seconds(self, clock: Clock) -> float:
        """A picture; returns what one of its steps took, the first left out, which finds cold caches."""
        ends = [clock() for event in self.engine.stream(self.request()) if is_step(event)]
        return (ends[-1] - ends[0]) / (len(ends) - 1)

    def look_at_step(self, watch: Watch) -> None:
        """A picture, its second step watched."""
        events = self.engine.stream(self.request())
        next(event for event in events if is_step(event))
        with watch.looking():
            next(events)
        for _ in events:
            pass

    def look_at_picture(self, watch: Watch) -> None:
        with watch.looking():
            self.draw(watch.clock)


def is_step(event: Progress | Result) -> bool:
    return isinstance(event, Progress) and event.phase == "denoise"


def step() -> Subject:
    """One step of a picture."""
    drawing = open_drawing()
    return Subject(drawing.form, drawing.step, drawing.step_seconds, drawing.look_at_step, drawing.engine.close)


def picture() -> Subject:
    """All of it."""
    drawing = open_drawing()
    return Subject(drawing.form, drawing.whole, drawing.draw, drawing.look_at_picture, drawing.engine.close)


def open_drawing() -> Drawing:
    """nano on the processor."""
    return Drawing(Engine.open("nano", device="cpu"))
