"""`velocity` for less work, within a budget: the controller behind `--quality`, one for each drawing.

What it may leave out, in the order of what it gains:
    the whole step             its velocity is the last one, or on the line through the last two
    all blocks but the first   their residual is taken from earlier steps (`attach.caches`), and the guidance with it
    the unconditional branch   its difference from the conditional one is that of the last step that had both
    reference pictures         their keys and values are those of an earlier step (`attach.frozen`)
Before it leaves something out it forecasts the error from what was seen where it was computed, and asks the `Budget`.
The choices are kept as letters, one word a step (`core.quality`), so that a recipe can have them made again: a picture
must not depend on a last bit that falls otherwise on another machine.

Both branches are never taken from caches apart: their errors are alike and cancel in the difference, but one alone
would be multiplied by the guidance scale. With both sides in one call, the unconditional branch is never left out.
Rejected: guidance switched off outside an interval ("Applying Guidance in a Limited Interval Improves Sample and
Distribution Quality in Diffusion Models"). It draws other pictures, not the same ones sooner. Ideas: First Block Cache
(ParaAttention), "TeaCache" (whole steps by learned thresholds, where we measure), "TaylorSeer" (the line).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from lanting.core.quality import GUESSED, REUSED, Quality
from lanting.flow.budget import Budget, Forecast
from lanting.flow.guidance import guide
from lanting.flow.loop import Canvas, Model, Question

T = TypeVar("T")


@dataclass
class Kept:
    """What is kept of one branch: the steps that computed it, the last one last, and forecasts of using it later."""

    steps: list[int] = field(default_factory=list)
    same: Forecast = field(default_factory=Forecast)  # the last one as it is
    line: Forecast = field(default_factory=Forecast)  # the line through the last two

    def computed(self, step: int) -> None:
        self.steps = [*self.steps[-1:], step]


class Frugal:
    """Predicts the velocities of one canvas, step after step. Also the judge whom caches ask (`attach.caches.Judge`).

    told  words of an earlier drawing, one a step: its choices are made again, and nothing is forecast
    ask   makes the questions, with the arguments of `Question`
    """

    def __init__(
        self, quality: Quality, canvas: Canvas, told: Sequence[str] = (), ask: Callable[..., Question] = Question
    ):
        self.ask = ask
        self.sigmas = [float(sigma) for sigma in canvas.sigmas]
        self.budget = Budget(quality, self.sigmas)
        self.told = tuple(told)
        self.words: list[str] = []  # one a step, the present one last
        self.stopped = False
        self.difference: Tensor | None = None  # (B, N, C) what the prompt added when both sides were last asked
        self.guidance = Kept()
        self.residuals: dict[str, Kept] = {}
        self.references: dict[str, Kept] = {}
        self.velocities: list[Tensor] = []  # (B, N, C) of the last two steps that were computed in full
        self.whole = Kept()  # and which those were
        self.skips: bool | None = None  # the unconditional branch, in this step; None: not decided yet
        self.expect: Callable[[], None] | None = None  # who wants to know that it will be asked for
        self.letter, self.beside = "F", False  # of the present call, and whether beside kept references
        self.calls = 1 if canvas.negative is None or canvas.batched_guidance else 2  # in a step in full

    def __call__(self, model: Model, canvas: Canvas, latents: Tensor, sigma: Tensor) -> Tensor:
        """(B, N, C), see `flow.loop.velocity`"""
        self.budget.begin()
        self.words.append("")
        self.skips = self.expect = None
        guess = self._guess()
        if guess is not None:
            return guess.to(latents.dtype)
        velocity = self._answer(self.ask(model, canvas, latents, sigma), canvas)
        if self.words[-1].upper() == "F" * self.calls:
            self._learn_velocity(velocity)
        return velocity

    def _answer(self, question: Question, canvas: Canvas) -> Tensor:
        """The model is asked, as little as may be."""
        if canvas.negative is None:
            return self._ask(question.positive)
        if canvas.batched_guidance:
            positive, negative = self._ask(question.both)
            if self.letter == "F":
                self._learn_guidance(positive, negative, canvas.guidance_scale)
            return guide(positive, negative, canvas.guidance_scale, canvas.renormalize)
        self.expect = question.expect_negative
        if self.difference is None:
            self.expect()
        positive = self._ask(question.positive)
        if self.difference is not None and self._skips():
            self.words[-1] += REUSED
            negative = positive - self.difference
        else:
            negative = self._ask(question.negative)
            self._learn_guidance(positive, negative, canvas.guidance_scale)
        return guide(positive, negative, canvas.guidance_scale, canvas.renormalize)

    @property
    def step(self) -> int:
        return len(self.words) - 1

    def stop(self) -> None:
        """Leave nothing out any more."""
        self.stopped = True

    def redone(self) -> None:
        """The present step was computed again, in full and by others."""
        self.words[-1] = "F" * self.calls

    # ---------------------------------------------------------------- the whole step
    def _guess(self) -> Tensor | None:
        """The velocity without asking the model, where that may be."""
        if self.stopped or not self.velocities:
            return None
        if self.told:
            self.words[-1] = self.told[self.step] if self.told[self.step] in GUESSED else ""
        else:
            same = self.whole.same.expected(self._distance(self.whole))
            line = self.whole.line.expected(self._distance(self.whole) * self._arm(self.whole))
            known = line < math.inf and self.budget.may(min(same, line), self._age(self.whole))
            self.words[-1] = GUESSED[line < same] if known else ""
        if not self.words[-1]:
            return None
        line = self.words[-1] == GUESSED[1] and len(self.velocities) == 2  # strangers' words may ask for it too early
        return self._on_line() if line else self.velocities[-1]

    def _on_line(self) -> Tensor:
        """(B, N, C) float32 on the line through the last two."""
        first, last = (velocity.float() for velocity in self.velocities)
        return torch.lerp(first, last, 1 + self._distance(self.whole) / self._gap(self.whole))

    def _learn_velocity(self, velocity: Tensor) -> None:
        if self.velocities and not self.told:
            distance = self._distance(self.whole)
            self.whole.same.learn(relative(velocity - self.velocities[-1], velocity), distance)
            if len(self.velocities) == 2:
                error = relative(velocity.float() - self._on_line(), velocity)
                self.whole.line.learn(error, distance * self._arm(self.whole))
        self.velocities = [*self.velocities[-1:], velocity]
        self.whole.computed(self.step)

    # ---------------------------------------------------------------- the unconditional branch
    def _ask(self, side: Callable[[], T]) -> T:
        self.letter, self.beside = "F", False
        answer = side()
        self.words[-1] += self.letter.lower() if self.beside else self.letter
        return answer

    def _skips(self) -> bool:
        """Decided once a step, and as soon as it can be."""
        if self.skips is None:
            self.skips = self._may_skip()
        return self.skips

    def _may_skip(self) -> bool:
        if self.stopped:
            return False
        if self.told:
            return self.told[self.step][1:] == REUSED
        return self.letter != "F" or self.budget.may(self._guidance_error(), self._age(self.guidance))

    def _guidance_error(self) -> float:
        return self.guidance.same.expected(self._distance(self.guidance))

    def _learn_guidance(self, positive: Tensor, negative: Tensor, scale: float) -> None:
        new = positive - negative
        if self.difference is not None and not self.told:
            error = (scale - 1) * relative(new - self.difference, positive)
            self.guidance.same.learn(error, self._distance(self.guidance))
        self.difference = new
        self.guidance.computed(self.step)

    # ---------------------------------------------------------------- what caches ask
    def watches(self, branch: str) -> bool:
        """Whether this branch may ever be taken from a cache."""
        return not self.stopped and branch != "negative"

    def reuse(self, branch: str, change: float) -> float | None:
        """May the blocks behind the first be left out, when its residual has changed by `change` (relative) since
        all were computed? None: no. Else where on the line through the last two residuals this step's lies: 0 the
        last one, 1 as far again."""
        kept = self.residuals.setdefault(branch, Kept())
        if not kept.steps:
            return None
        if self.told:
            self.letter = self.told[self.step][0].upper()
        else:
            self.letter = self._choose(kept, change)
        if self.letter == "F" and self.expect is not None and self.difference is not None and not self._skips():
            self.expect()
        return None if self.letter == "F" else self.ahead(branch) if self.letter == "L" else 0.0

    def _choose(self, kept: Kept, change: float) -> str:
        same, line = kept.same.expected(change), kept.line.expected(change * self._arm(kept))
        if line == math.inf:  # the first steps decide what the picture is of; one measurement is too little
            return "F"
        error, age = min(same, line), self._age(kept)
        if self.difference is not None:  # the guidance would rest on earlier steps, too
            error, age = error + self._guidance_error(), max(age, self._age(self.guidance))
        return ("L" if line < same else "C") if self.budget.may(error, age) else "F"

    def ahead(self, branch: str) -> float:
        """This step's place on the line through the last two residuals; 0 where there are fewer."""
        kept = self.residuals.setdefault(branch, Kept())
        return self._distance(kept) / self._gap(kept) if len(kept.steps) == 2 else 0.0

    def computed(self, branch: str, change: float, same: float, line: float) -> None:
        """All blocks were computed. `same` and `line` are what using the last residual, or the line through the last
        two, would have cost here; not finite where there was none."""
        kept = self.residuals.setdefault(branch, Kept())
        if kept.steps:
            kept.same.learn(same, change)
        if len(kept.steps) == 2:
            kept.line.learn(line, change * self._arm(kept))
        kept.computed(self.step)

    def _gap(self, kept: Kept) -> float:
        return self.sigmas[kept.steps[0]] - self.sigmas[kept.steps[1]]

    def _arm(self, kept: Kept) -> float:
        """An error of a line grows with the product of the distances to both of its points; relative to the second."""
        return 1 + self._distance(kept) / self._gap(kept) if len(kept.steps) == 2 else 1.0

    # ---------------------------------------------------------------- what frozen references ask
    def frozen(self, branch: str) -> bool:
        """May the references' kept keys and values be used in this call?"""
        kept = self.references.setdefault(branch, Kept())
        if self.stopped or not kept.steps:
            return False
        if self.told:
            word = self.told[self.step]
            self.beside = word[-1 if branch == "negative" else 0].islower()
        else:
            self.beside = self.budget.may(kept.same.expected(self._distance(kept)), self._age(kept))
        return self.beside

    def refreshed(self, branch: str, error: float) -> None:
        """They were computed; `error` is what the kept ones would have cost, not finite where there were none."""
        kept = self.references.setdefault(branch, Kept())
        if kept.steps:
            kept.same.learn(error, self._distance(kept))
        kept.computed(self.step)

    def _distance(self, kept: Kept) -> float:
        return self.sigmas[kept.steps[-1]] - self.sigmas[self.step] if kept.steps else 0.0

    def _age(self, kept: Kept) -> int:
        return self.step - kept.steps[-1] if kept.steps else 1


def relative(error: Tensor, of: Tensor) -> float:
    """Length of `error` (B, N, C) by length of `of`; of the worst picture of a batch."""
    lengths = [torch.linalg.vector_norm(x.float(), dim=(1, 2)) for x in (error, of)]
    return float((lengths[0] / lengths[1].clamp(min=1e-12)).max())
