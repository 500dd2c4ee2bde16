"""One denoising loop for the whole family: a task is a value, a `Canvas`, and the loop never asks which.

Text-to-image, editing, inpainting, layers and ControlNet differ in what the canvas starts from, what the
model may look at, and what must be kept. The loop is a generator, so progress, previews and cancelling belong
to whoever consumes it; rejected: a callback parameter, and a pipeline class per task.
Shapes: B batch, N target tokens, R reference tokens, T text tokens, C packed channels of a token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from lanting.flow.guidance import guide, join
from lanting.flow.schedule import model_timestep

if TYPE_CHECKING:
    from PIL.Image import Image

Grid = tuple[int, int, int]  # frames, rows, columns of tokens


class Model(Protocol):
    """The transformer as the loop sees it; `lanting.nn.mmdit.QwenImageTransformer` is one. Those that read words and
    references as one text (`lanting.nn.single_stream`) are told `places`, too, where there are any; those that a
    ControlNet steers block by block are told `steer`, and `regions` where parts of the picture have words."""

    def __call__(  # noqa: PLR0913  the transformer's own arguments
        self,
        latents: Tensor,
        timestep: Tensor,
        prompt_embeds: Tensor,
        prompt_mask: Tensor | None,
        grids: Sequence[Grid],
        target_tokens: int,
        *,
        control: Sequence[Tensor] = (),
        branch: str = "positive",
    ) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class Conditioning:
    """Encoded prompts."""

    embeds: Tensor  # (B, T, D)
    mask: Tensor | None = None  # (B, T) bool, True = a real token; None: nothing is padded
    places: tuple[int, ...] = ()  # tokens in front of each reference, where those stand among the words

    def repeat(self, times: int) -> Conditioning:
        """Every prompt `times` times in a row."""
        mask = None if self.mask is None else self.mask.repeat_interleave(times, 0)
        return replace(self, embeds=self.embeds.repeat_interleave(times, 0), mask=mask)

    def to(self, device: torch.device | str) -> Conditioning:
        mask = None if self.mask is None else self.mask.to(device)
        return replace(self, embeds=self.embeds.to(device), mask=mask)


@dataclass(frozen=True, slots=True)
class Tokens:
    """A clean picture as packed latents."""

    data: Tensor  # (B or 1, R, C)
    grid: Grid


@dataclass(frozen=True, slots=True)
class Regional:
    """Words for parts of the picture, beside the prompt: on the positive side, of every picture alike."""

    embeds: Tensor  # (1, T', D): of all regions, one behind the other
    seen: Any  # what sees what, as the model is told it (`lanting.nn.regions.Regions`)


# residuals(target latents, timestep, sigma, prompt, grids), or nothing while the net is not active
Control = Callable[[Tensor, Tensor, Tensor, Conditioning, Sequence[Grid]], Sequence[Tensor]]
Steering = Callable[[Tensor], Any]  # a model's `steer` (`lanting.nn.mmdit`) at a noise level; None: nothing is active


@dataclass(frozen=True)
class Canvas:
    """Everything that tells one task from another."""

    start: Tensor  # (B, N, C) in the model's dtype and on its device, at noise level sigmas[0]
    grids: tuple[Grid, ...]  # one per picture that is being painted (layers have several)
    sigmas: Tensor  # (steps + 1,) float32 on the CPU, the last one 0
    positive: Conditioning
    negative: Conditioning | None = None  # None: no guidance, half the work
    guidance_scale: float = 4.0
    renormalize: bool = True
    batched_guidance: bool = False  # both predictions in one call of 2B instead of two of B
    references: tuple[Tokens, ...] = ()  # clean pictures the model may look at
    control: Control | None = None
    steering: Steering | None = None
    regions: Regional | None = None
    keep: Callable[[Tensor, Tensor], Tensor] | None = None  # re-impose known pixels at a noise level
    finish: Callable[[Tensor], list[Image]] = lambda latents: []

    @property
    def steps(self) -> int:
        return len(self.sigmas) - 1

    @cached_property
    def joined(self) -> Conditioning:
        """Both sides of the guidance as one batch; the same tensors at every step."""
        assert self.negative is not None
        sides = [(side.embeds, side.mask) for side in (self.positive, self.negative)]
        return Conditioning(*join(*sides), self.positive.places)


# predict(model, canvas, latents (B, N, C), sigma) -> (B, N, C): see `velocity`
Predict = Callable[[Model, Canvas, Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Step:
    """One step done: `index` of `total` (from 1), and where the latents are now."""

    index: int
    total: int
    latents: Tensor  # (B, N, C)
    velocity: Tensor  # (B, N, C), noise minus picture
    sigma: float  # the noise level of `latents`

    @property
    def denoised(self) -> Tensor:
        """(B, N, C): the finished picture as the model imagines it now; what a preview should show."""
        return self.latents - self.sigma * self.velocity


class Question:
    """What the model is asked in one step: `latents` (B, N, C) at `sigma` (0-d float32), under either prompt."""

    def __init__(self, model: Model, canvas: Canvas, latents: Tensor, sigma: Tensor):
        self.model, self.canvas = model, canvas
        self.batch, self.tokens = latents.shape[:2]
        self.timestep = model_timestep(sigma, latents.dtype).to(latents.device).expand(self.batch)
        self.residuals = _residuals(canvas, latents, self.timestep, sigma)
        self.steer = None if canvas.steering is None else canvas.steering(sigma)
        seen = (r.data.expand(self.batch, -1, -1) for r in canvas.references)
        self.seen = torch.cat([latents, *seen], 1)  # (B, N + R, C)
        self.grids = (*canvas.grids, *(r.grid for r in canvas.references))

    def positive(self) -> Tensor:
        """(B, N, C)"""
        return self.ask(self.canvas.positive, "positive")

    def negative(self) -> Tensor:
        """(B, N, C); only where there is guidance"""
        assert self.canvas.negative is not None
        return self.ask(self.canvas.negative, "negative")

    def expect_negative(self) -> None:
        """The negative side will be asked for, too: whoever computes it elsewhere may begin."""

    def both(self) -> tuple[Tensor, Tensor]:
        """Positive and negative in one call."""
        positive, negative = self.ask(self.canvas.joined, "both").chunk(2)
        return positive, negative

    def ask(self, prompt: Conditioning, branch: str) -> Tensor:
        """(B, N, C) under any prompt; `branch` is for caches"""
        copies = len(prompt.embeds) // self.batch  # 2 when both sides of the guidance go in one call
        more: dict[str, Any] = {"places": prompt.places} if prompt.places else {}
        more |= {} if self.steer is None else {"steer": self.steer}
        embeds, regions = prompt.embeds, self.canvas.regions if branch == "positive" else None
        if regions is not None:
            embeds = torch.cat([regions.embeds.expand(self.batch, -1, -1), embeds], 1)  # (B, T' + T, D)
            more["regions"] = regions.seen
        control = {id(r): stacked(r, copies) for r in self.residuals}  # blocks may share one
        prediction = self.model(
            stacked(self.seen, copies),
            stacked(self.timestep, copies),
            embeds,
            prompt.mask,
            self.grids,
            self.tokens,
            control=[control[id(r)] for r in self.residuals],
            branch=branch,
            **more,
        )
        return prediction[:, : self.tokens]


def velocity(model: Model, canvas: Canvas, latents: Tensor, sigma: Tensor) -> Tensor:
    """The guided prediction (B, N, C) of noise minus picture for `latents` (B, N, C); sigma is 0-d float32."""
    question = Question(model, canvas, latents, sigma)
    if canvas.negative is None:
        return question.positive()
    sides = question.both() if canvas.batched_guidance else (question.positive(), question.negative())
    return guide(*sides, canvas.guidance_scale, canvas.renormalize)


def stacked(x: Tensor, copies: int) -> Tensor:
    """(B, ...) -> (copies B, ...): the same rows for each side of the guidance."""
    return x if copies == 1 else torch.cat([x] * copies)


def _residuals(canvas: Canvas, latents: Tensor, timestep: Tensor, sigma: Tensor) -> Sequence[Tensor]:
    """ControlNet residuals (B, N + R, D): of the positive prompt, for both sides; zero behind references."""
    if canvas.control is None:
        return ()
    residuals = canvas.control(latents, timestep, sigma, canvas.positive, canvas.grids)
    behind = sum(math.prod(r.grid) for r in canvas.references)
    return [F.pad(r, (0, 0, 0, behind)) for r in residuals] if behind else residuals


def euler(latents: Tensor, prediction: Tensor, sigma: Tensor, next_sigma: Tensor) -> Tensor:
    """One Euler step. The sum is float32; the product keeps the prediction's dtype, so that a bfloat16 run
    rounds where the reference rounds."""
    change = (next_sigma - sigma).to(prediction.device) * prediction
    return (latents.float() + change).to(prediction.dtype)


def denoise(model: Model, canvas: Canvas, predict: Predict = velocity) -> Iterator[Step]:
    """Walk down canvas.sigmas, yielding after every step. Close the generator to cancel.

    predict  what gives the velocity of a step: `velocity`, or one that spares work (`flow.frugal`) or watches it
    """
    latents = canvas.start
    for index, (sigma, next_sigma) in enumerate(pairwise(canvas.sigmas), start=1):
        with torch.no_grad():  # not around the yield: the consumer's gradient mode is its own
            prediction = predict(model, canvas, latents, sigma)
            latents = euler(latents, prediction, sigma, next_sigma)
            if canvas.keep is not None:
                latents = canvas.keep(latents, next_sigma)
        yield Step(index, canvas.steps, latents, prediction, float(next_sigma))
