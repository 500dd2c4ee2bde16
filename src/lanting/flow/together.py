"""Velocities of several canvases in one call of the model, each at its own noise level and under its own prompt.

Nothing is asked that a canvas alone would not ask, so canvases may come and go between steps. The prompts of all of
them go together, and so do their negative prompts, which are mostly the same; a canvas that is alone is asked as ever.
Texts of similar length go in one call, so that little is padded. Whether padding changes last bits is up to the model's
attention. Rejected: prompts and negative prompts, which are short, in one call; one canvas alone would be slower.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lanting.flow.guidance import guide, join
from lanting.flow.loop import Canvas, Conditioning, Model, Question


@dataclass(frozen=True, slots=True)
class Asked:
    """What a canvas is to be told: the velocity of `latents` (B, N, C) at `sigma` (0-d float32)."""

    canvas: Canvas
    latents: Tensor
    sigma: Tensor


@dataclass(frozen=True, slots=True)
class Side:
    """One side of one canvas's guidance; `number` says which canvas."""

    number: int
    question: Question
    prompt: Conditioning

    @property
    def text(self) -> int:
        return self.prompt.embeds.shape[1]


def joinable(canvas: Canvas) -> bool:
    """Whether it may share a call: no padding of its own, no second network, no other way of asking."""
    sides = (canvas.positive, *([canvas.negative] if canvas.negative is not None else []))
    alone = canvas.control is None and canvas.steering is None and canvas.regions is None
    return alone and not canvas.batched_guidance and all(side.mask is None for side in sides)


def velocities(model: Model, asked: Sequence[Asked], most: int) -> list[Tensor]:
    """(B, N, C) for each, as `flow.loop.velocity` gives it alone; all of one grid.

    most  rows of one call: the batch sizes of what is asked
    """
    questions = [Question(model, one.canvas, one.latents, one.sigma) for one in asked]
    positive = [Side(i, question, question.canvas.positive) for i, question in enumerate(questions)]
    negative = [Side(i, q, q.canvas.negative) for i, q in enumerate(questions) if q.canvas.negative is not None]
    answers: list[list[Tensor]] = [[] for _ in asked]
    for sides in (positive, negative):
        for group in groups(sorted(sides, key=lambda side: -side.text), most):
            for side, found in zip(group, ask(model, group), strict=True):
                answers[side.number].append(found)
    return [guided(one.canvas, answer) for one, answer in zip(asked, answers, strict=True)]


def groups(sides: Sequence[Side], most: int) -> Iterator[list[Side]]:
    """Sides that go in one call, in this order; at least one a call."""
    group: list[Side] = []
    for side in sides:
        if group and sum(one.question.batch for one in (*group, side)) > most:
            yield group
            group = []
        group.append(side)
    if group:
        yield group


def ask(model: Model, sides: Sequence[Side]) -> list[Tensor]:
    """(B, N, C) of each, in one call."""
    if len(sides) == 1:
        return [sides[0].question.ask(sides[0].prompt, "both")]
    embeds, mask = join(*((side.prompt.embeds, side.prompt.mask) for side in sides))
    first = sides[0].question
    seen, timesteps = ([getattr(side.question, name) for side in sides] for name in ("seen", "timestep"))
    rows = model(torch.cat(seen), torch.cat(timesteps), embeds, mask, first.grids, first.tokens, branch="both")
    return list(rows[:, : first.tokens].split([side.question.batch for side in sides]))


def guided(canvas: Canvas, answers: Sequence[Tensor]) -> Tensor:
    """(B, N, C)"""
    if canvas.negative is None:
        return answers[0]
    return guide(answers[0], answers[1], canvas.guidance_scale, canvas.renormalize)
