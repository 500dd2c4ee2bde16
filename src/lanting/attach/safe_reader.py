"""The text encoder watched over: a prompt whose states are not finite is read again, in a safer way where it broke.

The same watch as over steps (`attach.sentinel`), with the language model's layers and the vision tower's for parts and
without a notion of what lengths are possible: states end with a norm, whose size is the weights' affair. One length and
one wait a prompt; behind it the states leave the device anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lanting.attach.sentinel import Sentinel, name_of
from lanting.core.types import note

PARTS = {"text_encoder": "model", "vision": "visual"}  # what parts are called, and where they are in a `QwenVL`
States = tuple[Any, ...]  # (B, T, D), and what belongs to it: a mask, places of pictures


class SafeReader(Sentinel):
    """Over one drawing. `known`, `told` and `mend` as for a Sentinel; a part is "text_encoder.layers.3", say."""

    def __init__(
        self,
        reader: Any,
        known: Mapping[str, str],
        told: Sequence[Sequence[Any]] | None = None,
        mend: Callable[[str], bool] = lambda path: False,
    ):
        nets = {name: getattr(reader, inside) for name, inside in PARTS.items() if hasattr(reader, inside)}
        super().__init__(nets, reader.model.norm.weight.dtype, known, told, mend=mend)
        self.band = (0.0, torch.finfo(torch.float32).max)

    def read(self, work: Callable[[], States]) -> States:
        """What `work` makes of prompts, or makes of them in a safer way. Raises NotFiniteError or ModelError."""
        others: list[Any] = []

        def ask() -> Tensor:
            states, *others[:] = work()
            return states

        return self(ask, ask), *others

    def _tell(self, made: Sequence[tuple[int, str, str]], mended: str) -> None:
        if mended:
            super()._tell(made, mended)
            return
        if not made:
            again = note("the text encoder gave numbers that are not finite, and was sound when it was asked again")
            self.notices.append(again)
            return
        parts = list(dict.fromkeys(path for _, path, _ in made))
        facts: dict[str, object] = {"part": parts[0].partition(".")[2], "more": len(parts) - 1, "way": made[-1][2]}
        if facts["way"] == "plain":
            told = note("{part} (and {more} more) of the text encoder broke: without kernels from now on", **facts)
        else:
            facts["dtype"] = name_of(self.dtype)
            told = note(
                "{part} (and {more} more) of the text encoder left the range of {dtype}: {way} from now on", **facts
            )
        self.notices.append(told)
