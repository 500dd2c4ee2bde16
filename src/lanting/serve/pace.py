"""How long a job will take, from how long jobs took: seconds per unit of drawing, and seconds beside it.

A unit is a step over 256 square pixels, twice where there is guidance, once more for every input picture. Attention
makes large pictures dearer than that, so the estimate follows what was drawn lately. Until something was drawn there
is no estimate, rather than a guess.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lanting.core.types import Request, prompts_of

LATELY = 0.3  # weight of the newest job
TOKEN = 256  # pixels


def units(request: Request) -> float:
    """Of a settled request."""
    width, height = request.size or (0, 0)
    layers = int(request.options.get("layers", 0)) + 1
    sides = 2 if request.guidance_scale is not None and request.guidance_scale > 1 else 1
    tokens = width * height / TOKEN * (layers + len(request.images))
    steps = (request.steps or 1) * (1.0 if request.strength is None else request.strength)
    return max(tokens * steps * sides * len(prompts_of(request)) * request.count, 1.0)


@dataclass(slots=True)
class Pace:
    """Of one model; None: nothing was drawn yet."""

    per_unit: float | None = None  # seconds
    beside: float = 0.0  # seconds of reading the prompt and developing

    def learn(self, cost: float, seconds: Mapping[str, float]) -> None:
        """From a finished job that was drawn in one go. Loading is not counted: it happens once."""
        drawing = seconds.get("denoise", 0.0) / cost
        beside = sum(spent for phase, spent in seconds.items() if phase not in ("denoise", "load"))
        if self.per_unit is None:
            self.per_unit, self.beside = drawing, beside
        else:
            self.per_unit += LATELY * (drawing - self.per_unit)
            self.beside += LATELY * (beside - self.beside)

    def seconds(self, cost: float) -> float | None:
        return None if self.per_unit is None else self.per_unit * cost + self.beside
