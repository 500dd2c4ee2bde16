"""Follow the structure of a picture (edges, depth, pose) through a ControlNet's residuals.

Union: every picture of the request is a control picture. Inpainting: the picture with a hole, and the hole as
a 17th latent channel. Control is data of the canvas, so it combines with any other task by `replace`. Nets of both
builds are asked for the same things; those that hang on the blocks act at the steps at which DiffSynth has them act.
In context there is no net: a LoRA has taught the transformer to follow a picture that stands behind the target.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from lanting.core import ModelError, Request, RequestError
from lanting.core.types import words_of
from lanting.flow.latents import pack
from lanting.flow.loop import Canvas, Conditioning, Control, Grid, Steer, Steering
from lanting.tasks.pictures import mask_of, pixels_of
from lanting.tasks.studio import Blockwise, Residuals, Studio, begin, look_at, size_of

IN_CONTEXT = "Context_Control. "  # the words with which the LoRA was trained
NEAR = 1e-4  # of progress: where a step counts as begun or over


def controlnet(studio: Studio, request: Request) -> Canvas:
    """Options control_scale, control_start, control_end: a number, or one per picture. Or option in_context."""
    if request.options.get("in_context"):
        return in_context(studio, request)
    size = size_of(request)
    hints = [look_at(studio, image, size).data for image in request.images]
    return with_control(studio, request, hints)


def controlnet_inpaint(studio: Studio, request: Request) -> Canvas:
    """White of the mask is drawn anew, from noise; the net sees the rest. Options as in `controlnet`."""
    if request.mask is None:
        raise RequestError("{task} needs a mask: a picture that is white where to draw anew", task=request.task)
    size, codec = size_of(request), studio.codec
    mask = mask_of(request.mask, size)  # (1, 1, H, W)
    hole = pixels_of(request.images[0], size, codec.pixel_channels).masked_fill(mask > 0.5, -1.0)
    latents = codec.latents(hole)  # (1, z, H/8, W/8)
    known = 1 - F.interpolate(mask, size=latents.shape[-2:]).to(latents.device)
    hint = pack(torch.cat([latents, known], 1))  # (1, N, 4 (z + 1))
    return with_control(studio, request, [hint.to(studio.device, studio.dtype)])


def with_control(studio: Studio, request: Request, hints: Sequence[Tensor]) -> Canvas:
    """Text-to-image whose model is steered by `hints` (1, N, C), added up."""
    net = studio.controlnet
    if net is None:
        raise ModelError("{task} needs a ControlNet: open the model together with one", task=request.task)
    canvas = begin(studio, request, studio.codec.grid(*size_of(request)))
    option = request.options.get
    scales = per_hint(option("control_scale", 1.0), len(hints))
    starts, ends = (per_hint(option(f"control_{side}", at), len(hints)) for side, at in (("start", 0), ("end", 1)))
    span = progress_span if isinstance(net, Blockwise) else active_span
    spans = [span(canvas.sigmas, start, end) for start, end in zip(starts, ends, strict=True)]
    parts = list(zip(hints, scales, spans, strict=True))
    if isinstance(net, Blockwise):
        return replace(canvas, steering=steering(net, parts))
    return replace(canvas, control=steer(net, parts))


def in_context(studio: Studio, request: Request) -> Canvas:
    """Text-to-image beside the control picture, as a reference of the target's size that the reader is not shown."""
    (picture,), size = request.images, size_of(request)
    words = tuple(prompt if prompt.startswith(IN_CONTEXT) else IN_CONTEXT + prompt for prompt in words_of(request))
    canvas = begin(studio, replace(request, prompt=words), studio.codec.grid(*size))
    return replace(canvas, references=(look_at(studio, picture, size),))


def steering(net: Blockwise, parts: Sequence[tuple[Tensor, float, tuple[float, float]]]) -> Steering:
    """As `steer`, for a net that is asked block by block."""

    def at(sigma: Tensor) -> Steer | None:
        hints = [(hint, scale) for hint, scale, (low, high) in parts if scale and low <= float(sigma) <= high]
        return net.steer(hints) if hints else None

    return at


def steer(net: Residuals, parts: Sequence[tuple[Tensor, float, tuple[float, float]]]) -> Control:
    """The canvas's control: per part a hint, a scale, and the noise levels between which it is active."""

    def residuals(
        latents: Tensor, timestep: Tensor, sigma: Tensor, prompt: Conditioning, grids: Sequence[Grid]
    ) -> list[Tensor]:
        total: list[Tensor] = []
        for hint, scale, (low, high) in parts:
            if scale == 0 or not low <= float(sigma) <= high:
                continue
            cond = hint.expand(len(latents), -1, -1)
            found = [r * scale for r in net(latents, cond, timestep, prompt.embeds, prompt.mask, grids)]
            total = [a + b for a, b in zip(total, found, strict=True)] if total else found
        return total

    return residuals


def active_span(sigmas: Tensor, start: float, end: float) -> tuple[float, float]:
    """(low, high) noise levels of the steps i of n with start <= i/n and (i + 1)/n <= end; (1, 0) for none.

    Levels instead of step numbers: they mean the same to any solver, and to a schedule begun half-way.
    """
    steps = len(sigmas) - 1
    active = [float(sigmas[i]) for i in range(steps) if i / steps >= start and (i + 1) / steps <= end]
    return (active[-1], active[0]) if active else (1.0, 0.0)


def progress_span(sigmas: Tensor, start: float, end: float) -> tuple[float, float]:
    """As `active_span`, by DiffSynth's count: of the steps i of n with start <= i / (n - 1) <= end."""
    last = len(sigmas) - 2
    progress = [1 - (last - i) / max(last, 1) for i in range(last + 1)]  # an only step is at its end
    levels = zip(progress, sigmas.tolist(), strict=False)
    active = [level for at, level in levels if start - NEAR <= at <= end + NEAR]
    return (active[-1], active[0]) if active else (1.0, 0.0)


def per_hint(value: float | Sequence[float], count: int) -> list[float]:
    """One number for each of `count` control pictures."""
    if isinstance(value, int | float):
        return [float(value)] * count
    if len(value) != count:
        raise RequestError("{given} control values were given for {count} pictures", given=len(value), count=count)
    return [float(one) for one in value]
