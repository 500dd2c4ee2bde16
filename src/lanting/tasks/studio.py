"""What a task may ask for, and the beginning all tasks share.

A task is a function (Studio, Request) -> Canvas. The Studio is a protocol, so tasks know neither files nor
devices nor networks, and a test can hand them a few tensors instead of an engine.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from lanting.core import Request
from lanting.core.types import prompts_of
from lanting.flow.latents import LatentCodec
from lanting.flow.loop import Canvas, Conditioning, Grid, Regional, Tokens
from lanting.flow.schedule import Schedule
from lanting.specs import ModelSpec
from lanting.specs.regions import covered
from lanting.tasks.pictures import pictures_from, pixels_of

if TYPE_CHECKING:
    from PIL.Image import Image

# residuals(latents, control latents, timestep, prompt_embeds, prompt_mask, grids), see lanting.nn.controlnet
Residuals = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None, Sequence[Grid]], list[Tensor]]


@runtime_checkable
class Blockwise(Protocol):
    """A ControlNet that is asked behind blocks of the transformer, see `lanting.nn.blockwise`, `nn.chains`."""

    @property
    def along(self) -> bool:
        """It computes beside the blocks, and is not only asked behind them: who steers knows one of each."""
        ...

    def steer(
        self, hints: Sequence[tuple[Tensor, float]], beside: Sequence[tuple[Blockwise, Tensor, float]] = ()
    ) -> Any:
        """From (control latents, scale) of each control picture, and of those that other nets follow."""
        ...


ControlNet = Residuals | Blockwise


@dataclass(frozen=True, slots=True)
class Guide:
    """A ControlNet, and what it reads.

    masked  it repaints: it reads a picture with a hole, and where that is
    both    it reads a picture to follow, and beside it such a one, of which either may be missing (VideoX-Fun's)
    """

    net: ControlNet
    masked: bool = False
    both: bool = False


class Studio(Protocol):
    """The engine as a task sees it. `device` and `dtype` are the transformer's."""

    @property
    def release(self) -> ModelSpec: ...

    @property
    def codec(self) -> LatentCodec: ...

    @property
    def schedule(self) -> Schedule: ...

    @property
    def blocks(self) -> int:
        """Of the transformer."""
        ...

    @property
    def guides(self) -> Sequence[Guide]:
        """One follows all control pictures; of several each has its own."""
        ...

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def encode_prompt(self, prompts: Sequence[str], images: Sequence[Image] = ()) -> Conditioning:
        """One row per prompt, on the transformer's device and in its dtype; every prompt is shown all `images`.

        The mask is None when nothing is padded."""
        ...

    def regions(self, prompts: Sequence[str], whole: Conditioning, inside: Tensor) -> Regional:
        """Prompts for parts of the picture beside the one for all of it. inside (K, N) bool: which tokens of the
        target each of the K prompts is for."""
        ...

    def generator(self, seed: int, index: int) -> torch.Generator:
        """The CPU generator of picture `index` of a batch, seeded seed + index."""
        ...


def begin(
    studio: Studio,
    request: Request,
    grid: Grid,
    *,
    images: Sequence[Image] = (),
    frames: int = 1,
    mu: float | None = None,
) -> Canvas:
    """A canvas of noise under the request's prompts: text-to-image, and what every other task starts from.

    images  shown to the text encoder beside the prompts (edit releases)
    frames  pictures of `grid` painted together (layers)
    mu      shift of the schedule, where it isn't the line over the target's tokens
    """
    prompts = prompts_of(request)
    batch = len(prompts) * request.count
    noise = studio.codec.noise(grid, [studio.generator(request.seed or 0, i) for i in range(batch)], frames)
    guided = request.guidance_scale is not None and request.guidance_scale > 1
    negative = [" " if request.negative_prompt is None else request.negative_prompt]
    positive = studio.encode_prompt(prompts, images)
    return Canvas(
        start=noise.to(studio.device, studio.dtype),
        grids=(grid,) * frames,
        sigmas=studio.schedule.sigmas(
            request.steps or 0, grid[1] * grid[2], custom=request.options.get("sigmas"), mu=mu
        ),
        positive=positive.repeat(request.count),
        negative=studio.encode_prompt(negative, images).repeat(batch) if guided else None,
        guidance_scale=request.guidance_scale or 1.0,
        renormalize=studio.release.renormalize,
        batched_guidance=bool(request.options.get("batched_guidance", False)),
        regions=_regional(studio, request, grid, positive) if request.options.get("regions") else None,
        finish=partial(draw, studio.codec, grid),
    )


def _regional(studio: Studio, request: Request, grid: Grid, whole: Conditioning) -> Regional:
    """The words of the request's boxes, each for the tokens that its box touches."""
    regions, (_, rows, columns) = request.options["regions"], grid
    inside = torch.zeros(len(regions), rows, columns, dtype=torch.bool)
    for part, region in zip(inside, regions, strict=True):
        down, across = covered(region["box"], rows, columns)
        part[down.start : down.stop, across.start : across.stop] = True
    return studio.regions([region["prompt"] for region in regions], whole, inside.flatten(1))


def draw(codec: LatentCodec, grid: Grid, latents: Tensor) -> list[Image]:
    """(B, h w, 4z) -> B pictures."""
    return pictures_from(codec.decode(latents, grid))


def look_at(studio: Studio, picture: Image, size: tuple[int, int]) -> Tokens:
    """A picture resized to (width, height) and encoded: (1, N, 4z) in the model's dtype, on its device."""
    return on_device(studio, studio.codec.encode(pixels_of(picture, size, studio.codec.pixel_channels)))


def on_device(studio: Studio, tokens: Tokens) -> Tokens:
    return Tokens(tokens.data.to(studio.device, studio.dtype), tokens.grid)


def size_of(request: Request) -> tuple[int, int]:
    """(width, height) of a settled request."""
    if request.size is None:
        raise ValueError("the request isn't settled: it has no size")
    return request.size
