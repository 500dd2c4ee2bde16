"""What the tasks are handed: the engine's networks behind the `Studio` protocol of `lanting.tasks`.

The states of the last prompts are kept: drawing one again needs no text encoder, which may be on the disk by then.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from lanting.engine.models import Models
from lanting.flow.loop import Conditioning, Regional
from lanting.nn.regions import regions_of
from lanting.tasks.studio import Guide

if TYPE_CHECKING:
    from PIL.Image import Image

T = TypeVar("T")
States = tuple[Any, ...]  # (B, T, D), mask (B, T), and places of pictures where the encoder knows such
Read = Callable[[Any, Callable[[], States]], States]  # (text encoder, what it is asked) -> states

KEPT = 8  # prompts, with their pictures, whose states stay in RAM: 4 to 10 MB each for the full model


def digest(image: Image) -> str:
    """A picture's pixels as a name."""
    return hashlib.sha256(repr((image.mode, image.size)).encode() + image.tobytes()).hexdigest()


def used(kept: dict[Any, T], key: Any, most: int = KEPT) -> T:
    """A value that is kept, the last one used from now on; of more than `most` those go that were used longest ago."""
    kept[key] = found = kept.pop(key)
    while len(kept) > most:
        del kept[next(iter(kept))]
    return found


class EngineStudio:
    """One request's view of the models. `read` does what the text encoder is asked to do, under a watch."""

    def __init__(self, models: Models, read: Read = lambda encoder, work: work()):
        self.models, self.read = models, read
        self.release = models.spec
        self.codec = models.codec
        self.schedule = models.schedule
        self.blocks = int(models.folder.configs["transformer"].get("num_layers", 60))
        pairs = zip(models.controlnets, models.controls, strict=True)
        self.guides = [Guide(net, file.masked, file.chain) for net, file in pairs]
        self.device, self.dtype = models.device, models.dtype

    def encode_prompt(self, prompts: Sequence[str], images: Sequence[Image] = ()) -> Conditioning:
        """Prompts (and pictures, for releases that read them) to the transformer's device and dtype."""
        asked, kept = (tuple(prompts), tuple(map(digest, images))), self.models.prompts
        if asked not in kept:
            encoder = self.models.reader()
            embeds, mask, *places = self.read(encoder, lambda: encoder.encode(prompts, images))
            kept[asked] = Conditioning(embeds.to("cpu", self.dtype), mask, *places).to("cpu")
        return used(kept, asked).to(self.device)

    def regions(self, prompts: Sequence[str], whole: Conditioning, inside: torch.Tensor) -> Regional:
        """Each prompt encoded by itself; what sees what, on the transformer's device."""
        texts = [self.encode_prompt([prompt]).embeds for prompt in prompts]
        lengths = [text.shape[1] for text in (*texts, whole.embeds)]
        return Regional(torch.cat(texts, 1), regions_of(lengths, inside.to(self.device)))

    def generator(self, seed: int, index: int) -> torch.Generator:
        """A CPU generator, whatever the device: the same seed gives the same noise everywhere."""
        return torch.Generator("cpu").manual_seed(seed + index)
