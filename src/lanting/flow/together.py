"""Velocities of several canvases in one call of the model, each at its own noise level and under its own prompt.

Nothing is asked that a canvas alone would not ask, so canvases may come and go between steps. Both sides of the
guidance of all of them are one list of rows; the longest texts are asked together, so that little is padded. Padding
must not change what is computed for a row: whoever calls sees to that (`attach.unpadded`), or accepts other last bits.
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
    return canvas.control is None and not canvas.batched_guidance and all(side.mask is None for side in sides)


def velocities(model: Model, asked: Sequence[Asked], most: int) -> list[Tensor]:
    """(B, N, C) for each, as `flow.loop.velocity` gives it alone; all of one grid.

    most  rows of one call: the batch sizes of what is asked, both sides of the guidance counted
    """
    questions = [Question(model, one.canvas, one.latents, one.sigma) for one in asked]
    answers: list[list[Tensor]] = [[] for _ in asked]
    sides = [Side(i, question, question.canvas.positive) for i, question in enumerate(questions)]
    sides += [Side(i, q, q.canvas.negative) for i, q in enumerate(questions) if q.canvas.negative is not None]
    found: dict[int, Tensor] = {}
    for group in groups(sorted(range(len(sides)), key=lambda i: -sides[i].text), sides, most):
        found |= zip(group, ask(model, [sides[i] for i in group]), strict=True)
    for i, side in enumerate(sides):  # positive sides come first
        answers[side.number].append(found[i])
    return [guided(one.canvas, answer) for one, answer in zip(asked, answers, strict=True)]


def groups(order: Sequence[int], sides: Sequence[Side], most: int) -> Iterator[list[int]]:
    """Numbers of sides that go in one call, in this order; at least one a call."""
    group: list[int] = []
    for i in order:
        if group and sum(sides[j].question.batch for j in (*group, i)) > most:
            yield group
            group = []
        group.append(i)
    if group:
        yield group


def ask(model: Model, sides: Sequence[Side]) -> list[Tensor]:
    """(B, N, C) of each, in one call."""
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
