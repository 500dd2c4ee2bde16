"""Follow the structure of a picture (edges, depth, pose) through a ControlNet's residuals.

Union: every picture of the request is a control picture. Inpainting: the picture with a hole, and the hole as
a 17th latent channel. VideoX-Fun's nets do either, and both in one. Of several nets each has its own picture, in
order, and what they say is added up. Control is data of the canvas, so it combines with any other task by `replace`.
Nets of all builds are asked for the same things; those that hang on the blocks act at the steps at which DiffSynth has
them act.
In context there is no net: a LoRA has taught the transformer to follow a picture that stands behind the target.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lanting.core import ModelError, Request, RequestError
from lanting.core.types import prompts_of
from lanting.flow.latents import opaque, pack
from lanting.flow.loop import Canvas, Conditioning, Control, Grid, Steering
from lanting.specs.settle import repainting
from lanting.tasks.pictures import Size, levels_of, mask_of, pixels_of
from lanting.tasks.studio import Blockwise, Guide, Residuals, Studio, begin, look_at, size_of

if TYPE_CHECKING:
    from PIL.Image import Image

Part = tuple[Tensor, float, tuple[float, float]]  # a hint, its scale, and the noise levels between which it is active
IN_CONTEXT = "Context_Control. "  # the words with which the LoRA was trained
NEAR = 1e-4  # of progress: where a step counts as begun or over


def controlnet(studio: Studio, request: Request) -> Canvas:
    """Options control_scale, control_start, control_end: a number, or one per picture. Or option in_context."""
    if request.options.get("in_context"):
        return in_context(studio, request)
    guides, size = guides_for(studio, request), size_of(request)
    pairs = zip(guides, request.images, strict=True)
    return with_control(studio, request, [(guide, followed(studio, guide, image, size)) for guide, image in pairs])


def controlnet_inpaint(studio: Studio, request: Request) -> Canvas:
    """White of the mask is drawn anew, from noise; nets that repaint see the rest, others follow their picture as
    ever. Options as in `controlnet`."""
    if request.mask is None:
        raise RequestError("{task} needs a mask: a picture that is white where to draw anew", task=request.task)
    size, guides = size_of(request), guides_for(studio, request)
    pairs = list(zip(guides, request.images, strict=True))
    if guides[0].both and len(studio.guides) == 1:  # a second picture is followed in the first one's hole
        beside = request.images[1] if len(pairs) > 1 else None
        hint = side_by_side(studio, beside, (request.images[0], request.mask), size)
        return with_control(studio, request, [(guides[0], hint)])
    painters = repainting([guide.masked for guide in guides], [guide.both for guide in guides])
    parts = [
        (guide, repainted(studio, guide, image, request.mask, size))
        if number in painters
        else (guide, followed(studio, guide, image, size))
        for number, (guide, image) in enumerate(pairs)
    ]
    return with_control(studio, request, parts)


def followed(studio: Studio, guide: Guide, picture: Image, size: Size) -> Tensor:
    """What a net sees of a picture that it follows: (1, N, C)"""
    return side_by_side(studio, picture, None, size) if guide.both else look_at(studio, picture, size).data


def repainted(studio: Studio, guide: Guide, picture: Image, mask: Image, size: Size) -> Tensor:
    """What a net sees of a picture that it repaints: (1, N, C)"""
    if guide.both:
        return side_by_side(studio, None, (picture, mask), size)
    return hole_in(studio, picture, mask, size, soft=isinstance(guide.net, Blockwise))


def side_by_side(studio: Studio, picture: Image | None, hole: tuple[Image, Image] | None, size: Size) -> Tensor:
    """What a net of VideoX-Fun's sees: (1, N, 2 z + 1), or 4 times as much of packed latents. Latents of the picture
    that it follows; 1 where the other picture is known; latents of that, mid-grey where the mask of `hole` is white.
    Zeros for what is missing. Both are opaque."""
    codec = studio.codec
    shape = (1, codec.channels, *(side // codec.stride for side in size[::-1]))  # (1, z, h, w)
    nothing = torch.zeros(shape)
    follow = nothing if picture is None else codec.latents(opaque(pixels_of(picture, size), codec.pixel_channels))
    known, rest = nothing[:, :1], nothing
    if hole is not None:
        source, mask = hole
        white = mask_of(mask, size)  # (1, 1, H, W)
        rest = codec.latents(opaque(pixels_of(source, size) * (1 - white), codec.pixel_channels))
        known = 1 - F.interpolate(white, size=shape[2:])
    latents = torch.cat([part.to(studio.device) for part in (follow, known, rest)], 1)
    return pack(latents, codec.patch).to(studio.dtype)


def hole_in(studio: Studio, picture: Image, mask: Image, size: Size, *, soft: bool) -> Tensor:
    """What a net that repaints sees of a picture: (1, N, 4 (z + 1)), without what is white in the mask.

    soft  grey of the mask is told as it is, by DiffSynth's nets; InstantX's know black and white. The hole itself has
          an edge either way, half-way between the two
    """
    codec, levels = studio.codec, levels_of(mask, size)  # (1, 1, H, W)
    white = levels >= 0.5
    latents = codec.latents(pixels_of(picture, size, codec.pixel_channels).masked_fill(white, -1.0))  # (1, z, H/8, W/8)
    known = 1 - F.interpolate(levels if soft else white.float(), size=latents.shape[-2:]).to(latents.device)
    return pack(torch.cat([latents, known], 1)).to(studio.device, studio.dtype)


def guides_for(studio: Studio, request: Request) -> Sequence[Guide]:
    """The net of each control picture: one follows all of them."""
    if not studio.guides:
        raise ModelError("{task} needs a ControlNet: open the model together with one", task=request.task)
    return studio.guides if len(studio.guides) > 1 else [studio.guides[0]] * len(request.images)


def with_control(studio: Studio, request: Request, parts: Sequence[tuple[Guide, Tensor]]) -> Canvas:
    """Text-to-image whose model is steered by nets, each by its hint (1, N, C), added up."""
    canvas = begin(studio, request, studio.codec.grid(*size_of(request)))
    option = request.options.get
    scales = per_hint(option("control_scale", 1.0), len(parts))
    starts, ends = (per_hint(option(f"control_{side}", at), len(parts)) for side, at in (("start", 0), ("end", 1)))
    behind: list[tuple[Blockwise, Part]] = []
    beside: list[tuple[Residuals, Part]] = []
    for (guide, hint), scale, start, end in zip(parts, scales, starts, ends, strict=True):
        if isinstance(guide.net, Blockwise):
            behind.append((guide.net, (hint, scale, progress_span(canvas.sigmas, start, end))))
        else:
            beside.append((guide.net, (hint, scale, active_span(canvas.sigmas, start, end))))
    canvas = replace(canvas, steering=steering(behind)) if behind else canvas
    return replace(canvas, control=steer(beside, studio.blocks)) if beside else canvas


def in_context(studio: Studio, request: Request) -> Canvas:
    """Text-to-image beside the control picture, as a reference of the target's size that the reader is not shown."""
    (picture,), size = request.images, size_of(request)
    words = tuple(prompt if prompt.startswith(IN_CONTEXT) else IN_CONTEXT + prompt for prompt in prompts_of(request))
    canvas = begin(studio, replace(request, prompt=words), studio.codec.grid(*size))
    return replace(canvas, references=(look_at(studio, picture, size),))


def steering(parts: Sequence[tuple[Blockwise, Part]]) -> Steering:
    """As `steer`, for nets that are asked block by block."""

    def at(sigma: Tensor) -> Any:
        active = [
            (net, hint, scale) for net, (hint, scale, (low, high)) in parts if scale and low <= float(sigma) <= high
        ]
        builds: dict[bool, list[tuple[Blockwise, Tensor, float]]] = {}
        for part in active:  # nets that are asked behind blocks come first, then those that compute along
            builds.setdefault(part[0].along, []).append(part)
        found: list[Any] = []
        for _, one in sorted(builds.items()):
            first = one[0][0]
            own = [(hint, scale) for net, hint, scale in one if net is first]
            found.append(first.steer(own, [part for part in one if part[0] is not first]))
        return tuple(found) if len(found) > 1 else next(iter(found), None)

    return at


def steer(parts: Sequence[tuple[Residuals, Part]], blocks: int) -> Control:
    """The canvas's control: a net and its part of each picture, added up for a transformer of so many blocks."""

    def residuals(
        latents: Tensor, timestep: Tensor, sigma: Tensor, prompt: Conditioning, grids: Sequence[Grid]
    ) -> list[Tensor]:
        totals: dict[int, list[Tensor]] = {}  # of nets that give as many
        for net, (hint, scale, (low, high)) in parts:
            if scale == 0 or not low <= float(sigma) <= high:
                continue
            cond = hint.expand(len(latents), -1, -1)
            found = [r * scale for r in net(latents, cond, timestep, prompt.embeds, prompt.mask, grids)]
            total = totals.get(len(found))
            totals[len(found)] = [a + b for a, b in zip(total, found, strict=True)] if total else found
        return spread(list(totals.values()), blocks)

    return residuals


def spread(sides: Sequence[list[Tensor]], blocks: int) -> list[Tensor]:
    """Residuals of nets of different depths as one list, for whoever spreads that evenly over the blocks.

    Each is spread over all of them on its own, and what meets at a block is added up. Blocks of one sum share its
    tensor.
    """
    if len(sides) < 2:
        return sides[0] if sides else []
    count = math.lcm(*map(len, sides))
    count = blocks if blocks % count else count
    known: dict[tuple[int, ...], Tensor] = {}
    found: list[Tensor] = []
    for block in range(0, blocks, blocks // count):
        places = tuple(block // math.ceil(blocks / len(side)) for side in sides)
        if places not in known:
            first, *others = (side[place] for side, place in zip(sides, places, strict=True))
            known[places] = sum(others, start=first)
        found.append(known[places])
    return found


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
