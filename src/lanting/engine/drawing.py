"""How one canvas is drawn: what may be left out, and what was decided, for the recipe.

Between the loop, which asks for velocities, and the controllers and attachments that answer instead of the plain
network. They hang on the network only while this drawing lasts.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch

from lanting.attach.caches import residual_cache
from lanting.attach.frozen import frozen_references, kept_bytes
from lanting.core.checkpoint import Checkpoint
from lanting.core.quality import LEVELS
from lanting.core.types import Request
from lanting.engine.models import Models
from lanting.flow.frugal import Frugal
from lanting.flow.loop import Canvas, Predict, velocity
from lanting.plan import detect

SPARE = 0.5  # of the memory that is free may be taken for kept references; the rest is for what a step needs


class Drawing:
    """`predict` is what the loop is given; `choices` what a recipe has to know afterwards. Leave it as a context."""

    def __init__(self, models: Models, request: Request, canvas: Canvas, resume: Checkpoint | None = None):
        """`resume`: where an earlier drawing of the same request was left, if this canvas goes on from there."""
        self.models, self.request, self.canvas = models, request, canvas
        self.done = resume.step if resume else 0
        self.earlier = str(resume.choices.get("steps", "")).split()[: self.done] if resume else []
        self.hung = ExitStack()
        self.frugal = self._frugal()
        self.predict: Predict = self.frugal or velocity

    def __enter__(self) -> Drawing:
        if self.frugal is not None:
            net = self.models.transformer
            self.hung.enter_context(residual_cache(net, self.frugal))
            if self.canvas.references and self._room():
                self.hung.enter_context(frozen_references(net, self.frugal))
        return self

    def __exit__(self, *exception: object) -> None:
        self.hung.close()

    def _frugal(self) -> Frugal | None:
        told = str((self.request.choices or {}).get("steps", "")).split()
        level = LEVELS[self.request.quality or "exact"]
        return None if level.exact and not told else Frugal(level, self.canvas, told[self.done :])

    def _room(self) -> bool:
        """Whether the references' keys and values fit beside everything else. Where a recipe says so, they must."""
        if self.frugal is not None and self.frugal.told:
            return any(letter.islower() for word in self.frugal.told for letter in word)
        tokens = sum(reference.data.shape[1] for reference in self.canvas.references)
        calls = len(self.canvas.start) * (1 if self.canvas.negative is None else 2)
        wanted = kept_bytes(self.models.transformer.config, tokens, calls, self.models.dtype.itemsize)
        return wanted <= SPARE * free_bytes(self.models.device)

    @property
    def choice(self) -> str:
        """Of the last step."""
        return self.frugal.words[-1] if self.frugal is not None else ""

    @property
    def choices(self) -> dict[str, Any]:
        """Everything that was decided so far, and would have to be decided alike to draw the same picture."""
        if self.frugal is None:
            return {}
        return {"steps": " ".join([*self.earlier, *self.frugal.words])}

    def told(self, request: Request) -> Request:
        """The request with what was decided."""
        return replace(request, choices=self.choices or None)


def free_bytes(device: torch.device) -> int:
    """Memory that may still be taken where the network computes."""
    if device.type != "cuda":
        return detect().ram_free
    free, total = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # the allocator's own
    limit = int(total * torch.cuda.get_per_process_memory_fraction(device)) - torch.cuda.memory_allocated(device)
    return min(free, limit)
