"""Few-step drawing as a LoRA: the model learns to do in 4 steps what it does in 20, and needs no guidance for it.

The teacher is the model itself with its own schedule. It walks from noise to a picture, and its states at the
student's few times are kept. The student is the same frozen network with a LoRA: from each of its times it must reach
the teacher's state at the next one in a single step, so what it learns is the straight line between the two. Half of
the batches start from where the student itself came to, so that it learns to mend its own errors instead of adding
them up. Time is budgeted in minutes; a killed run goes on from its last checkpoint.
Source: piecewise rectified flow (PeRFlow, Yan et al., 2024); progressive distillation (Salimans and Ho, 2022).
"""

from __future__ import annotations

import copy
import json
import math
import random
import re
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lanting.core.errors import ModelError, NotFiniteError, RequestError
from lanting.core.files import replace_file
from lanting.engine.models import Models
from lanting.engine.studio import EngineStudio
from lanting.flow.loop import Canvas, velocity
from lanting.nn.lora import Factors, LoraLinear, attach
from lanting.nn.mmdit import Attend
from lanting.nn.swap import swap
from lanting.train.kept import alone, read_checkpoint, write_checkpoint, write_tensors
from lanting.train.model import PlainAttend
from lanting.train.walks import LightningRun, Prompts, Teacher, Walk, in_fast_numbers, together
from lanting.weights.find import locate


@dataclass
class Clock:
    """What a resumed run must continue from."""

    step: int = 0
    walks: int = 0
    seconds: float = 0.0


def student_of(teacher: nn.Module, rank: int, targets: str, seed: int) -> tuple[nn.Module, dict[str, LoraLinear]]:
    """The same network with LoRAs that change nothing yet, and those LoRAs by path; the weights are shared."""
    student = copy.deepcopy(teacher, {id(p): p for p in teacher.parameters()})
    generator = torch.Generator().manual_seed(seed)
    parts: dict[str, list[Factors]] = {}
    for path, module in student.named_modules():
        if isinstance(module, nn.Linear) and re.fullmatch(targets, path):
            weight = module.weight
            down = torch.randn(rank, module.in_features, generator=generator) / math.sqrt(module.in_features)
            up = torch.zeros(module.out_features, rank)
            parts[path] = [Factors(down.to(weight.device), up.to(weight.device))]
    if not parts:
        raise RequestError("no Linear of this model is called {targets}: try the default", targets=repr(targets))
    attach(student, parts)
    wrapped = {path: module for path in parts if isinstance(module := student.get_submodule(path), LoraLinear)}
    for module in wrapped.values():
        module.down.requires_grad_(True)
        module.up.requires_grad_(True)
    return student, wrapped


class Distiller:
    """One run in memory: teacher, student, walks kept, optimizer."""

    def __init__(self, models: Models, prompts: Prompts, rank: int, run: LightningRun):
        self.models, self.rank, self.run = models, rank, run
        net = models.transformer
        if models.device.type == "cpu":
            swap(net, Attend, lambda path, old: PlainAttend())
        self.student, self.loras = student_of(net, rank, run.targets, run.seed)
        self.model = in_fast_numbers(self.student, models.device)
        self.teacher = Teacher(EngineStudio(models), net, prompts, run)
        self.parameters = [p for lora in self.loras.values() for p in (lora.down, lora.up)]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=run.lr, betas=(0.9, 0.98), weight_decay=0.0)
        self.kept: deque[Walk] = deque(maxlen=run.capacity)
        self.clock = Clock()
        self.rng = random.Random(run.seed)

    def add(self) -> None:
        """New walks of the teacher."""
        walks = self.teacher.walk(self.rng)
        self.kept.extend(walks)
        self.clock.walks += len(walks)

    def draw(self) -> list[Walk]:
        """A random batch of walks of one size; sizes come as often as they are kept."""
        grid = self.rng.choice(self.kept).grid
        same = [walk for walk in self.kept if walk.grid == grid]
        return self.rng.sample(same, min(self.run.batch, len(same)))

    def step(self, spent: float = 0.0) -> dict[str, Any]:
        """One update over all of the student's steps. `spent`: share of the time that is gone, 0..1.

        Returns the error of each step relative to its target, and where own states were used, how far the student's
        last state is from the teacher's. Raises NotFiniteError before such numbers reach the LoRA.
        """
        began = time.monotonic()
        self.add()
        while len(self.kept) < self.run.batch:
            self.add()
        walks = self.draw()
        report = self.learn(walks, own=self.rng.random() < self.run.own)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        if not math.isfinite(report["loss"]) or not bool(norm.isfinite()):  # before it is learnt, and then saved
            raise NotFiniteError(
                "the training broke into numbers that are not finite in step {step}: begin again with a lower --lr",
                step=self.clock.step + 1,
            )
        for group in self.optimizer.param_groups:
            group["lr"] = self.run.rate(self.clock.step, spent)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.clock.step += 1
        self.clock.seconds += time.monotonic() - began
        return report

    def learn(self, walks: Sequence[Walk], own: bool) -> dict[str, Any]:
        """Gradients of the mean error over the student's steps, from its own states or from the teacher's."""
        states, asked = together(walks)
        sigmas = self.teacher.levels(states.shape[2])
        canvas = Canvas(states[:, 0], (walks[0].grid,), sigmas, asked, guidance_scale=1.0)
        x, errors = states[:, 0], []
        for index, (sigma, following) in enumerate(pairwise(sigmas)):
            x = x if own else states[:, index]
            width = (following - sigma).item()
            target = (states[:, index + 1] - x) / width  # (B, N, C)
            predicted = velocity(self.model, canvas, x, sigma)
            error = (predicted - target).square().mean()
            (error / self.run.steps).backward()
            errors.append(error.item() / max(target.square().mean().item(), 1e-12))
            x = x + width * predicted.detach()
        last = states[:, -1]
        end = {"end": ((x - last).square().mean() / last.square().mean().clamp(min=1e-12)).item()} if own else {}
        return {"loss": sum(errors) / len(errors), "each": errors} | end

    def state(self) -> dict[str, Any]:
        return {
            "lora": {path: {"down": m.down.detach(), "up": m.up.detach()} for path, m in self.loras.items()},
            "optimizer": self.optimizer.state_dict(),
            "clock": asdict(self.clock),
            "kind": self.kind(),
        }

    def kind(self) -> list[Any]:
        """What two runs must have in common for one to go on from the other."""
        run = self.run
        return [self.models.fingerprint, self.rank, run.steps, run.shift, run.guidance_scale, sorted(self.loras)]

    def resume(self, checkpoint: Path) -> bool:
        """Go on from a checkpoint, if there is one. Raises ModelError when it belongs to another run."""
        if not checkpoint.exists():
            return False
        state = read_checkpoint(checkpoint, self.models.device, ("kind", "lora", "optimizer", "clock"))
        if state["kind"] != self.kind():
            raise ModelError(
                "{path} was begun with another model or settings: remove it, or write elsewhere", path=checkpoint
            )
        with torch.no_grad():
            for path, halves in state["lora"].items():
                self.loras[path].down.copy_(halves["down"])
                self.loras[path].up.copy_(halves["up"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.clock = Clock(**state["clock"])
        self.rng = random.Random(self.run.seed + 7919 * self.clock.step)
        return True


def export(loras: dict[str, LoraLinear], out: Path, run: LightningRun) -> Path:
    """The LoRA as a file in Lightning's names, bfloat16, with the settings it wants to be drawn with."""
    tensors: dict[str, Tensor] = {}
    for path, module in loras.items():
        rank = len(module.down)
        tensors[f"{path}.lora_down.weight"] = module.down.detach().to("cpu", torch.bfloat16).contiguous()
        tensors[f"{path}.lora_up.weight"] = module.up.detach().to("cpu", torch.bfloat16).contiguous()
        tensors[f"{path}.alpha"] = torch.tensor(float(rank), dtype=torch.bfloat16)
    wishes = {"lanting.steps": run.steps, "lanting.guidance_scale": 1.0, "lanting.shift": run.shift}
    notes = {"format": "pt"} | {key: str(value) for key, value in wishes.items()}
    out.parent.mkdir(parents=True, exist_ok=True)
    replace_file(out, lambda part: write_tensors(part, tensors, notes))
    return out


def distil(
    model_folder: Path,
    prompts: Prompts,
    out: Path,
    minutes: float,
    rank: int = 16,
    run: LightningRun = LightningRun(),  # noqa: B008  frozen
    log: Callable[[str], None] = print,
) -> Path:
    """Distil the model in `model_folder` into the LoRA file `out`, for `minutes` summed over resumed runs.

    The file is written anew with every checkpoint (`out` with the ending .checkpoint), so there is always one to try.
    Raises RequestError for values that can't be trained with, ModelError for a folder or checkpoint that can't be used,
    and where another process trains `out`.
    """
    if minutes < 0 or rank < 1 or run.steps < 1 or min(run.batch, run.fresh) < 1:
        raise RequestError("Minutes can't be negative; rank, steps, batch and fresh must be at least 1.")
    with alone(out), threads(run.threads):
        distiller = Distiller(Models(locate(str(model_folder)), run.device, "float32"), prompts, rank, run)
        checkpoint = out.with_suffix(".checkpoint")
        distiller.resume(checkpoint)
        for report in training(distiller, 60 * minutes, lambda: save(distiller, checkpoint, out)):
            log(report)
    return out


def training(distiller: Distiller, budget: float, keep: Callable[[], object]) -> Iterator[str]:
    """Update until `budget` seconds are spent, call `keep` now and then and at the end; yields lines of progress."""
    saved = told = time.monotonic()
    recent: list[dict[str, Any]] = []
    while (seconds := distiller.clock.seconds) < budget:
        recent.append(distiller.step(seconds / budget))
        now = time.monotonic()
        if now - told > 20 or distiller.clock.step == 1:
            yield line(distiller, recent, budget)
            recent, told = [], now
        if now - saved > distiller.run.save_every:
            keep()
            saved = now
    keep()
    if recent:
        yield line(distiller, recent, budget)


def save(distiller: Distiller, checkpoint: Path, out: Path) -> None:
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    write_checkpoint(checkpoint, distiller.state())
    export(distiller.loras, out, distiller.run)


def line(distiller: Distiller, recent: Sequence[dict[str, Any]], budget: float) -> str:
    """Progress as JSON: `loss` and `each` are mean squared errors of the velocity over that of the target; `end` the
    same of the last state of the student's own walks."""
    clock = distiller.clock
    ends = [report["end"] for report in recent if "end" in report]
    each = [sum(column) / len(recent) for column in zip(*(report["each"] for report in recent), strict=True)]
    figures = {
        "step": clock.step,
        "walks": clock.walks,
        "seconds": round(clock.seconds),
        "left": round(max(0.0, budget - clock.seconds)),
        "loss": round(sum(each) / len(each), 4),
        "each": [round(value, 4) for value in each],
        "end": round(sum(ends) / len(ends), 4) if ends else None,
    }
    return json.dumps(figures)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Run with `count` threads of torch, then with as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
