"""Drawings that are put aside and gone on with: between a canvas in the middle of its steps and a `Checkpoint`.

An Euler step needs nothing but the latents and the noise level it starts from, and what a task keeps or looks at is
made anew from the request, so a resumed picture is the uninterrupted one, bit by bit, on the same machine.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from lanting.core.checkpoint import Checkpoint
from lanting.core.errors import RequestError
from lanting.core.recipe import describe_request
from lanting.core.types import Request
from lanting.flow.loop import Canvas, Step

if TYPE_CHECKING:
    from lanting.engine.models import Models


def mark_of(request: Request, models: Models) -> str:
    """A hash of everything that decides the pixels: the settled request, weights, what they are packed as while they
    are loaded, LoRAs, ControlNets where they draw along, device and dtypes."""
    loras = [lora.describe() for lora in models.loras]
    dtypes = {name: str(dtype) for name, dtype in models.dtypes.items()}
    what: list[Any] = [describe_request(request), models.fingerprint, loras, dtypes, models.device.type]
    what += [[name, kind] for name in ("text_encoder", "transformer") if (kind := models.kind(name)) != "none"]
    what += [word for net in controlnets_of(request, models) for word in (net["weights"], models.kind("controlnet"))]
    return hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode()).hexdigest()[:32]


def controlnets_of(request: Request, models: Models) -> tuple[dict[str, str], ...]:
    """The ControlNets for a recipe, where they draw along; `weights` is a hash as the model's own."""
    if not (request.task or "").startswith("controlnet"):
        return ()
    nets = [(net.path, net.checkpoint.fingerprint()) for net in models.controls]
    return tuple({"name": path.name, "weights": print_, "path": str(path)} for path, print_ in nets)


def put_aside(step: Step, done: int, mark: str, choices: Mapping[str, Any] | None = None) -> Checkpoint:
    """The checkpoint after a step; `done` steps had been made before the canvas of this run began, and `choices` were
    made in all of them."""
    latents = step.latents.detach().cpu().contiguous()
    dtype = str(latents.dtype).removeprefix("torch.")
    data = latents.view(torch.uint8).numpy().tobytes()
    shape = tuple(latents.shape)
    return Checkpoint(step.index + done, step.total + done, mark, dtype, shape, data, dict(choices or {}))


def go_on(canvas: Canvas, checkpoint: Checkpoint, mark: str) -> Canvas:
    """The canvas from the checkpoint's step on. Raises RequestError where it belongs to another drawing."""
    start, size = canvas.start, len(checkpoint.latents)
    fits = (checkpoint.mark, checkpoint.steps, checkpoint.shape) == (mark, canvas.steps, tuple(start.shape))
    fits = fits and checkpoint.dtype == str(start.dtype).removeprefix("torch.")
    if not fits or size != start.nelement() * start.element_size() or not 0 < checkpoint.step < canvas.steps:
        raise RequestError("the checkpoint belongs to another drawing: start this one anew")
    latents = torch.frombuffer(bytearray(checkpoint.latents), dtype=start.dtype).view(start.shape)
    return replace(canvas, start=latents.to(start.device), sigmas=canvas.sigmas[checkpoint.step :])
