"""What the tasks are handed: the engine's networks behind the `Studio` protocol of `lanting.tasks`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from lanting.engine.models import Models
from lanting.flow.loop import Conditioning

if TYPE_CHECKING:
    from PIL.Image import Image


class EngineStudio:
    """One request's view of the models."""

    def __init__(self, models: Models):
        self.models = models
        self.release = models.spec
        self.codec = models.codec
        self.schedule = models.schedule
        self.controlnet = models.controlnet
        self.device, self.dtype = models.device, models.dtype

    def encode_prompt(self, prompts: Sequence[str], images: Sequence[Image] = ()) -> Conditioning:
        """Prompts (and pictures, for releases that read them) to the transformer's device and dtype."""
        embeds, mask = self.models.encoder.encode(prompts, images)
        return Conditioning(embeds.to(self.device, self.dtype), None if mask is None else mask.to(self.device))

    def generator(self, seed: int, index: int) -> torch.Generator:
        """A CPU generator, whatever the device: the same seed gives the same noise everywhere."""
        return torch.Generator("cpu").manual_seed(seed + index)
