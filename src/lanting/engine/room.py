"""How many drawings may share their steps (`engine.together`): what is worth it, what stays the same, what fits.

Rows of a call that are too few leave a processor idle: on a CPU steps of small pictures take up to half as long when
they are taken together, and those of 256 x 256 pixels a tenth less (benchmarks/serve_batch.py). So a call has up to
ROWS picture tokens, and without being asked no more drawings share steps than fill it, and none where only two would:
whoever came first is done later for it.
"""

from __future__ import annotations

import torch

from lanting.core.types import Request
from lanting.engine.drawing import SPARE, free_bytes
from lanting.engine.models import Models
from lanting.plan.activations import tokens
from lanting.plan.kinds import kind_named, plain
from lanting.plan.model import job_of
from lanting.plan.room import MOST, seats
from lanting.weights.sized import planned_model

ROWS = {"cpu": 512}  # picture tokens of one call
GPU_ROWS = 8192
WORTH = 3  # drawings, from which on they share steps without being asked
TASKS = ("text_to_image", "image_to_image", "inpaint")  # their grids follow from the size


def rows_of(models: Models, picture: int) -> int:
    """Rows of a batch in one call, of `picture` tokens each. Weights that stream pass once for all of them."""
    if models.plan is not None and models.plan.streamed != "none":
        return 1 << 30
    return max(ROWS.get(models.device.type, GPU_ROWS) // picture, 1)


def may_share(models: Models, request: Request) -> bool:
    """Whether a settled request could share steps at all: exact, in a wide dtype, with networks that stay."""
    if models.single_stream:  # what is kept of words and references belongs to one drawing
        return False
    if request.rewrite:  # it takes as long as many steps, for which all others would wait
        return False
    exact = request.quality in (None, "exact") and request.choices is None
    usual = request.task in TASKS and isinstance(request.prompt, str) and not request.options
    return exact and usual and models.dtype != torch.float16 and not models.take_turns


def room(models: Models, request: Request, most: int | None, budget: int | None) -> int:
    """How many drawings like this settled request may share steps, itself counted.

    most    as many as somebody asked for; None: as many as gain something
    budget  bytes that the plan's device may take, where somebody said so
    """
    if not may_share(models, request):
        return 1
    model = planned_model(models.folder)
    job = job_of(request, model)
    if most is None:
        if models.device.type != "cpu":  # libraries choose other products for other numbers of rows: other last bits
            return 1
        most = rows_of(models, tokens(job.size)) // job.batch
        most = most if most >= WORTH else 1
    dtype = str(models.dtype).removeprefix("torch.")
    kind = plain(dtype)
    if model.packed:
        kind = model.body_kind()
    elif models.kind("transformer") != "none":
        kind = kind_named(models.kind("transformer"))
    return seats(model, job, kind, (dtype, models.device.type == "cpu"), spare(models, budget), max(min(most, MOST), 1))


def spare(models: Models, budget: int | None) -> int:
    """Bytes that further drawings may take."""
    free = int(SPARE * free_bytes(models.device))
    if models.plan is None or budget is None:
        return free
    peak = models.plan.peak_vram if models.device.type == "cuda" else models.plan.peak_ram
    return max(min(free, budget - peak), 0)
