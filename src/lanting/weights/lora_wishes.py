"""How a LoRA wants to be drawn with: few-step ones need few steps, no guidance, and other noise levels. No torch.

A file says it in its notes (`lanting.steps`, `lanting.guidance_scale`, `lanting.shift`). The published Lightning files
say it in their names alone, all in one way, and so they are believed. It becomes the release's default, and flags
still override it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from lanting.core.errors import ModelError, RequestError
from lanting.specs import ModelSpec
from lanting.specs.numbers import number

LIMITS = {"lanting.steps": (1, 1000), "lanting.guidance_scale": (0, 100), "lanting.shift": (0.01, 100)}
LIGHTNING = re.compile(r"qwen-image.*lightning-(\d{1,2})steps", re.IGNORECASE)
SHIFT = 3.0  # of every Lightning: noise levels 3 t / (1 + 2 t)


@dataclass(frozen=True, slots=True)
class Wishes:
    """None: the release's own."""

    steps: int | None = None
    guidance_scale: float | None = None
    shift: float | None = None

    def __bool__(self) -> bool:
        """Whether there are any."""
        return (self.steps, self.guidance_scale, self.shift) != (None, None, None)

    @property
    def few(self) -> bool:
        """Made to be drawn without guidance."""
        return self.guidance_scale is not None and self.guidance_scale <= 1


NONE = Wishes()


class Wishing(Protocol):
    """What has wishes and a strength: a LoRA."""

    @property
    def strength(self) -> float: ...

    @property
    def wishes(self) -> Wishes: ...


def wishes_of(path: Path, notes: Mapping[str, str]) -> Wishes:
    """What a file declares. Raises ModelError for a number that can't be one."""
    told = {key: _number(path, notes[key], key) for key in LIMITS if key in notes}
    if told:
        steps = told.get("lanting.steps")
        return Wishes(
            None if steps is None else int(steps), told.get("lanting.guidance_scale"), told.get("lanting.shift")
        )
    match = LIGHTNING.search(path.name)
    return Wishes(int(match[1]), 1.0, SHIFT) if match and int(match[1]) else NONE


def _number(path: Path, text: str, key: str) -> float:
    low, high = LIMITS[key]
    try:
        value = number(key, float(text), low, high)
        if key != "lanting.steps" or value.is_integer():
            return value
    except (ValueError, RequestError):
        pass
    raise ModelError(
        "{file} declares {key} = {value}, which should be a number from {low} to {high}: use another file",
        **{"file": path.name, "key": key, "value": text[:40], "low": low, "high": high},
    )


def static_shift(shift: float) -> dict[str, Any]:
    """Scheduler config entries for noise levels s t / (1 + (s - 1) t), whatever the picture's size."""
    return {"use_dynamic_shifting": False, "shift": shift, "shift_terminal": None}


def with_wishes(spec: ModelSpec, loras: Sequence[Wishing]) -> ModelSpec:
    """The release with the defaults that its LoRAs declare; the last one counts, one of strength 0 does not."""
    for lora in loras:
        if lora.strength == 0:
            continue
        wishes = lora.wishes
        own = spec.defaults if wishes.steps is None else replace(spec.defaults, steps=wishes.steps)
        own = own if wishes.guidance_scale is None else replace(own, guidance_scale=wishes.guidance_scale)
        schedule = spec.schedule if wishes.shift is None else {**spec.schedule, **static_shift(wishes.shift)}
        spec = replace(spec, defaults=own, schedule=schedule)
    return spec
