"""The teacher's side of few-step distillation: its walks from noise to pictures, kept at the student's times."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lanting.engine.studio import EngineStudio
from lanting.flow.loop import Canvas, Conditioning, Grid, Model, denoise
from lanting.flow.schedule import Schedule
from lanting.train.precision import cast
from lanting.weights.lora_wishes import static_shift

Prompts = Callable[[random.Random], tuple[str, tuple[int, int]]]  # a prompt and the (width, height) to draw it at


@dataclass(frozen=True)
class LightningRun:
    """How to distil; where, for how long and at which rank are `distil`'s own arguments.

    steps           of the student
    shift           its times are s t / (1 + (s - 1) t) of evenly spaced t
    teacher_steps   of the teacher, on its own schedule
    guidance_scale  of the teacher; above 1 the student learns the guided picture
    own             share of batches that start from the student's own states
    batch, fresh    walks per update, and how many of the teacher's are new
    capacity        walks kept for further updates
    threads         of torch; the training of nano runs one process per core
    targets         regular expression over the paths of Linears that get a LoRA
    save_every      seconds
    """

    steps: int = 4
    shift: float = 3.0
    teacher_steps: int = 20
    guidance_scale: float = 1.0
    own: float = 0.5
    batch: int = 16
    fresh: int = 4
    capacity: int = 1024
    lr: float = 1e-3
    warmup_steps: int = 50
    seed: int = 0
    threads: int = 1
    device: str = "cpu"
    targets: str = ".*"
    save_every: float = 120.0

    def rate(self, step: int, spent: float) -> float:
        """The learning rate when a share `spent` of the time is gone: a short ramp, then half a cosine to 1 %."""
        fall = 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, spent)))
        return self.lr * min(1.0, (step + 1) / self.warmup_steps) * fall


@dataclass(frozen=True)
class Walk:
    """One picture on its way: the teacher's states at the student's times, and what was asked."""

    states: Tensor  # (steps + 1, N, C) float32, from noise to picture
    embeds: Tensor  # (T, D)
    grid: Grid


def in_fast_numbers(net: nn.Module, device: torch.device) -> Model:
    """The network in the numbers that suit the device; answers in float32, so that sums over steps aren't rounded."""

    def call(*inputs: object, **options: object) -> Tensor:
        with cast(device):
            return net(*inputs, **options).float()

    return call


def merge_levels(own: Sequence[float], student: Sequence[float], near: float = 1e-3) -> list[float]:
    """The teacher's noise levels with the student's put in; one of the teacher's that is very near gives way."""
    kept = [level for level in own if min(abs(level - other) for other in student) > near]
    return sorted({*kept, *student}, reverse=True)


class Teacher:
    """Walks of the frozen model, in batches of pictures of one size."""

    def __init__(self, studio: EngineStudio, net: nn.Module, prompts: Prompts, run: LightningRun):
        self.studio, self.prompts, self.run = studio, prompts, run
        self.model = in_fast_numbers(net, studio.device)
        self.waiting: dict[tuple[int, int], list[str]] = {}

    def levels(self, tokens: int) -> Tensor:
        """(steps + 1,) noise levels of the student for pictures of `tokens` tokens."""
        return Schedule(**static_shift(self.run.shift)).sigmas(self.run.steps, tokens)

    @torch.no_grad()
    def walk(self, rng: random.Random) -> list[Walk]:
        """`fresh` new walks of one size, from the prompts of that size that came first."""
        while True:
            words, size = self.prompts(rng)
            queue = self.waiting.setdefault(size, [])
            queue.append(words)
            if len(queue) >= self.run.fresh:
                return self._draw(self.waiting.pop(size), size, rng)

    def _draw(self, prompts: list[str], size: tuple[int, int], rng: random.Random) -> list[Walk]:
        studio, run = self.studio, self.run
        grid = studio.codec.grid(*size)
        student = self.levels(grid[1] * grid[2]).tolist()
        own = studio.schedule.sigmas(run.teacher_steps, grid[1] * grid[2]).tolist()
        sigmas = merge_levels(own, student)
        noise = studio.codec.noise(grid, [studio.generator(rng.randrange(2**40), 0) for _ in prompts])
        asked = studio.encode_prompt(prompts)
        guided = run.guidance_scale > 1
        silence = studio.encode_prompt([studio.release.defaults.negative_prompt]) if guided else None
        canvas = Canvas(
            start=noise.to(studio.device, studio.dtype),
            grids=(grid,),
            sigmas=torch.tensor(sigmas),
            positive=asked,
            negative=silence.repeat(len(prompts)) if silence is not None else None,
            guidance_scale=run.guidance_scale,
            renormalize=studio.release.renormalize,
        )
        states = [canvas.start]
        for step in denoise(self.model, canvas):
            if step.sigma in student:
                states.append(step.latents)
        stacked = torch.stack(states, 1).float()  # (B, steps + 1, N, C)
        lengths = [asked.embeds.shape[1]] * len(prompts) if asked.mask is None else asked.mask.sum(1).tolist()
        rows = zip(stacked, asked.embeds, lengths, strict=True)
        return [Walk(state, embeds[:length].clone(), grid) for state, embeds, length in rows]


def together(walks: Sequence[Walk]) -> tuple[Tensor, Conditioning]:
    """States (B, steps + 1, N, C) and prompts (B, T, D), the shorter ones padded."""
    lengths = torch.tensor([len(walk.embeds) for walk in walks])
    embeds = nn.utils.rnn.pad_sequence([walk.embeds for walk in walks], batch_first=True)
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    return torch.stack([walk.states for walk in walks]), Conditioning(
        embeds, None if bool(mask.all()) else mask.to(embeds.device)
    )
