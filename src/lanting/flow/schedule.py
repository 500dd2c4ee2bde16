"""Noise levels (sigmas) from 1, pure noise, down to 0, the picture: the flow-match Euler schedule.

A schedule is five numbers of `scheduler_config.json`, so it is a value with one method, not an object that
walks through the steps; the loop does the walking. Arithmetic is NumPy float32 in the order of diffusers'
0.42 `FlowMatchEulerDiscreteScheduler`, so the sigmas are equal to the last bit. Sources: "Scaling Rectified
Flow Transformers" (the shift), LTX-Video (the stretch to a terminal value).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lanting.core import ModelError, RequestError
from lanting.core.lang import Phrase

CLASS_NAME = "FlowMatchEulerDiscreteScheduler"
TRAIN_TIMESTEPS = 1000
MAX_STEPS = 1000

# Keys that would change the numbers in a way no Qwen-Image release uses; false is the only value we accept.
UNSUPPORTED = (
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
    "invert_sigmas",
    "stochastic_sampling",
)


@dataclass(frozen=True, slots=True)
class Schedule:
    """How `steps` noise levels are spread; defaults are those of the scheduler class, not of a release.

    With `use_dynamic_shifting` the shift is e**mu, mu a straight line through (base_image_seq_len,
    base_shift) and (max_image_seq_len, max_shift): larger pictures stay noisy for longer. `shift_terminal`
    then stretches the levels so that the last one before 0 has exactly that value. `sample_sigmas` are the levels a
    distilled release was taught with, before the shift; they are taken where as many steps are asked for.
    """

    use_dynamic_shifting: bool = False
    shift: float = 1.0
    base_shift: float = 0.5
    max_shift: float = 1.15
    base_image_seq_len: int = 256
    max_image_seq_len: int = 4096
    shift_terminal: float | None = None
    time_shift_type: str = "exponential"
    sample_sigmas: tuple[float, ...] = ()

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Schedule:
        """Read `scheduler_config.json`. Raises ModelError for a schedule we can't follow."""
        name = config.get("_class_name", CLASS_NAME)
        if name != CLASS_NAME:
            raise _wrong(
                Phrase("its scheduler is {value}, and lanting follows only {known}", value=name, known=CLASS_NAME)
            )
        for key in UNSUPPORTED:
            if config.get(key):
                raise _wrong(Phrase("{key} is set, which lanting doesn't support: set it to false", key=key))
        if (steps := config.get("num_train_timesteps", TRAIN_TIMESTEPS)) != TRAIN_TIMESTEPS:
            told = Phrase("num_train_timesteps is {value}: Qwen-Image models use {known}", value=steps, known=1000)
            raise _wrong(told)
        if (kind := config.get("time_shift_type", "exponential")) not in ("exponential", "linear"):
            raise _wrong(Phrase("time_shift_type is {value}: it must be exponential or linear", value=kind))
        return cls(**{f.name: config[f.name] for f in fields(cls) if f.name in config})

    def mu(self, tokens: int) -> float:
        """The shift's exponent for a picture of `tokens` target tokens (references and text don't count)."""
        slope = (self.max_shift - self.base_shift) / (self.max_image_seq_len - self.base_image_seq_len)
        return tokens * slope + (self.base_shift - slope * self.base_image_seq_len)

    def sigmas(
        self, steps: int, tokens: int, *, custom: Sequence[float] | None = None, mu: float | None = None
    ) -> Tensor:
        """(steps + 1,) float32 on the CPU, falling, the last one 0.

        custom  own levels in (0, 1], falling, before shift and stretch; their number replaces `steps`
        mu      overrides the line of `mu()` (Layered takes it from the condition picture)
        """
        if custom is None and self.sample_sigmas and steps == len(self.sample_sigmas):
            custom = self.sample_sigmas
        line = np.linspace(1.0, 1.0 / check_steps(steps), steps) if custom is None else check_custom(custom)
        levels = line.astype(np.float32)
        if self.use_dynamic_shifting:
            levels = self._shifted(levels, self.mu(tokens) if mu is None else mu)
        else:
            levels = self.shift * levels / (1 + (self.shift - 1) * levels)
        if self.shift_terminal:
            levels = stretch(levels, self.shift_terminal)
        return torch.cat([torch.from_numpy(levels), torch.zeros(1)])

    def _shifted(self, levels: np.ndarray, mu: float) -> np.ndarray:
        factor = math.exp(mu) if self.time_shift_type == "exponential" else mu
        return factor / (factor + (1 / levels - 1))


def stretch(levels: np.ndarray, terminal: float) -> np.ndarray:
    """Scale the distance from 1 so that the last level becomes `terminal`.

    A single level of 1 has no distance to scale: it stays, where the reference divides 0 by 0 and draws NaN.
    """
    distance = 1 - levels
    if distance[-1] == 0:
        return levels
    return 1 - distance / (distance[-1] / (1 - terminal))


def check_steps(steps: int) -> int:
    if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= MAX_STEPS:
        raise RequestError(
            "{name} must be a whole number from {low} to {high}, not {value}",
            name="steps",
            low=1,
            high=MAX_STEPS,
            value=steps,
        )
    return steps


def check_custom(custom: Sequence[float]) -> np.ndarray:
    line = np.asarray(custom, dtype=np.float64)
    falls = line.ndim == 1 and 1 <= line.size <= MAX_STEPS and bool((np.diff(line) < 0).all())
    if not falls or not bool(((line > 0) & (line <= 1)).all()):
        raise RequestError("sigmas must be 1 to 1000 falling numbers, each above 0 and at most 1")
    return line


def _wrong(reason: Phrase) -> ModelError:
    return ModelError("scheduler_config.json can't be followed: {reason}", reason=reason)


def skipped_steps(steps: int, strength: float) -> int:
    """How many of the first `steps` are left out so that a share `strength` of the way is walked.

    strength 1 walks all of it and forgets the picture; the remainder is rounded up to whole steps, so at
    least one is left.
    """
    if not 0 < strength <= 1:
        raise RequestError("strength must be above 0 and at most 1, not {value}", value=strength)
    return min(int(max(steps - min(steps * strength, steps), 0)), steps - 1)


def scale_noise(clean: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """The point at level `sigma` on the straight line from the picture to the noise; same shapes in and out.

    sigma is rounded to the tensors' dtype first, as the reference does.
    """
    level = sigma.to(clean.device, clean.dtype).reshape([1] * clean.ndim)  # a 0-d tensor would not take part
    return level * noise + (1.0 - level) * clean


def model_timestep(sigma: Tensor, dtype: torch.dtype) -> Tensor:
    """What the transformer is told for `sigma` (0-d float32), in [0, 1].

    The reference goes through timesteps of 0..1000 in the model's dtype; in bfloat16 this rounds twice, up to
    0.0034 away from sigma, and the released models were used that way.
    """
    return (sigma * TRAIN_TIMESTEPS).to(dtype) / TRAIN_TIMESTEPS
