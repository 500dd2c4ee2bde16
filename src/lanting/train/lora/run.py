"""Teach a transformer what a folder of pictures shows, as a LoRA: flow matching on a frozen, maybe packed network.

A step takes a few examples, mixes each with noise at a random level, and asks for the velocity, noise minus picture,
that drawing will ask for. Everything random follows from the seed and the number of the step, so a killed run that goes
on from its checkpoint ends with the LoRA of a run that was never interrupted. The loss of single steps says little,
since the noise level decides most of it; so the same few examples at the same levels under the same noise are asked now
and then, and that is the number to look at.
Sources: Flow matching (Lipman et al., 2023); Scaling Rectified Flow Transformers (Esser et al., 2024) for the levels.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lanting.core.errors import NotFiniteError
from lanting.core.files import replace_file
from lanting.engine.placement import Placed
from lanting.flow.loop import Conditioning
from lanting.flow.schedule import Schedule
from lanting.train.kept import read_checkpoint, same_run, write_checkpoint, write_tensors
from lanting.train.lora.cache import CachedExample, load
from lanting.train.lora.dataset import batches
from lanting.train.lora.net import LoraNet, padded

SPREAD = 0x9E3779B1  # between the batches' seeds of two runs, 2^32 over the golden ratio: so soon none meet
PROBES, LEVELS = 8, (0.15, 0.4, 0.65, 0.9)  # examples asked again and again, and at which noise levels


@dataclass(frozen=True)
class LoraRun:
    """How to train.

    steps         updates in all, each from batch x accumulate examples
    rank, alpha   of the LoRA; alpha over rank scales what it adds (None: 1)
    targets       see `net.TARGETS`
    lr, warmup    highest rate, reached after so many steps; from half the steps on it falls as a cosine to a tenth
    caption_dropout  share of examples shown without their caption, so that guidance keeps working; 0 to 1
    levels        "shift": in the middle, moved towards noise as the release's schedule moves them; "even": any alike
    probe_every, save_every   steps
    """

    steps: int = 1000
    rank: int = 16
    alpha: float | None = None
    targets: str = "blocks"
    batch: int = 1
    accumulate: int = 1
    lr: float = 1e-4
    warmup: int = 20
    caption_dropout: float = 0.05
    levels: str = "shift"
    probe_every: int = 50
    save_every: int = 100
    seed: int = 0

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        share = step / max(1, self.steps)
        fall = 1.0 if share < 0.5 else 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (2 * share - 1)))
        return self.lr * min(1.0, (step + 1) / max(1, self.warmup)) * fall

    def seed_of(self, number: int) -> int:
        """Of all that is drawn for batch `number`, in 32 bits: torch's generator on CPUs leaves out any above."""
        return (self.seed * SPREAD + number) % 2**32


@dataclass(frozen=True)
class Report:
    """After a step. `probe`: mean squared error over the mean square of the target, None between probes."""

    step: int
    loss: float
    rate: float
    seconds: float  # of this step
    probe: float | None = None


@dataclass
class Trainer:
    """One run in memory.

    placed    the transformer
    schedule  the release's, whose shift the noise levels follow
    files     what `cache.prepare` made
    same      what another run must have in common with this one to go on from its checkpoint
    """

    placed: Placed[Any]
    schedule: Schedule
    files: Sequence[Path]
    run: LoraRun
    same: Mapping[str, Any] = field(default_factory=dict[str, Any])
    step: int = 0

    def __post_init__(self) -> None:
        run = self.run
        self.net = LoraNet(self.placed, run.rank, run.alpha or run.rank, run.targets, run.seed)
        self.optimizer = torch.optim.AdamW(self.net.parameters, lr=run.lr, betas=(0.9, 0.99), weight_decay=0.01)
        self.kinds = [kind_of(load(path)) for path in self.files]
        self.plan = 0, batches(self.kinds, run.batch, run.seed, 0)  # of an epoch

    def batch_at(self, number: int) -> list[int]:
        """The examples of batch `number` since the beginning."""
        each = len(self.plan[1])  # of every epoch, since examples are of the same kinds in each
        if self.plan[0] != number // each:
            self.plan = number // each, batches(self.kinds, self.run.batch, self.run.seed, number // each)
        return self.plan[1][number % each]

    # ---------------------------------------------------------------- learning
    def learn(self) -> Report:
        """One update."""
        run, began, total = self.run, time.monotonic(), 0.0
        for part in range(run.accumulate):
            number = self.step * run.accumulate + part
            draw = torch.Generator().manual_seed(run.seed_of(number))
            seen = [load(self.files[index]) for index in self.batch_at(number)]
            dropped = (torch.rand(len(seen), generator=draw) < run.caption_dropout).tolist()
            if seen[0].words.places:  # all rows of a batch have their references behind as many words
                dropped = [dropped[0]] * len(seen)
            error = self.error(seen, self.noise_levels(seen, draw), draw, dropped)
            self.net.learn(error / run.accumulate)
            total += error.item() / run.accumulate
        norm = torch.nn.utils.clip_grad_norm_(self.net.parameters, 1.0)
        if not math.isfinite(total) or not bool(norm.isfinite()):
            raise NotFiniteError(
                "the training broke into numbers that are not finite in step {step}: begin again with a lower --lr",
                step=self.step + 1,
            )
        rate = run.rate(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return Report(self.step, total, rate, time.monotonic() - began)

    def noise_levels(self, seen: Sequence[CachedExample], draw: torch.Generator) -> Tensor:
        """(B,) in (0, 1)"""
        if self.run.levels == "even":
            return torch.rand(len(seen), generator=draw) * 0.998 + 0.001
        middle = torch.randn(len(seen), generator=draw).sigmoid()
        shift = shift_of(self.schedule, seen[0].clean.shape[1])
        return shift * middle / (1 + (shift - 1) * middle)

    def error(
        self, seen: Sequence[CachedExample], levels: Tensor, draw: torch.Generator, dropped: Sequence[bool]
    ) -> Tensor:
        """The mean squared error of the velocity; 0-d, with a gradient where one is wanted. `dropped`: whose captions
        are hidden."""
        device = self.placed.device
        clean = torch.cat([one.clean for one in seen]).float()  # (B, N, C)
        noise = torch.randn(clean.shape, generator=draw)
        mixed = torch.lerp(clean, noise, levels[:, None, None])
        dtype = seen[0].clean.dtype
        latents = torch.cat([mixed.to(dtype), torch.cat([one.references for one in seen])], 1).to(device)
        asked = together(
            [one.empty if hidden else one.words for one, hidden in zip(seen, dropped, strict=True)], device
        )
        grids = (seen[0].grid, *seen[0].grids)
        more: dict[str, Any] = {"places": asked.places} if asked.places else {}
        tokens = clean.shape[1]
        found = self.net(latents, levels.to(device), asked.embeds, asked.mask, grids, tokens, **more)[:, :tokens]
        return (found.float() - (noise - clean).to(device)).square().mean()

    @torch.no_grad()
    def probe(self) -> float:
        """The error at the same examples, levels and noise as ever, over that of the answer 0."""
        errors, squares = 0.0, 0.0
        for index in range(min(PROBES, len(self.files))):
            seen = [load(self.files[index])]
            for level in LEVELS:
                draw = torch.Generator().manual_seed(index)
                errors += self.error(seen, torch.tensor([level]), draw, [False]).item()
                noise = torch.randn(seen[0].clean.shape, generator=torch.Generator().manual_seed(index))
                squares += (noise - seen[0].clean.float()).square().mean().item()
        return errors / squares

    def train(self, checkpoint: Path, out: Path, notes: Mapping[str, str]) -> Iterator[Report]:
        """Until all steps are made. Checkpoint and LoRA are written now and then, and at the end."""
        if self.step == 0:
            yield Report(0, 0.0, 0.0, 0.0, self.probe())
        while self.step < self.run.steps:
            report = self.learn()
            last = self.step == self.run.steps
            if last or self.step % self.run.save_every == 0:
                self.save(checkpoint)
                export(self.net, out, notes)
            told = last or self.step % self.run.probe_every == 0
            yield Report(**{**asdict(report), "probe": self.probe() if told else None})

    # ---------------------------------------------------------------- to disk and back
    def kind(self) -> dict[str, Any]:
        """What two runs must have in common."""
        own = asdict(self.run)
        for name in ("save_every", "probe_every", "steps"):  # more steps may be wanted than at first
            del own[name]
        return {**own, **self.same, "examples": [path.stem for path in self.files]}

    def save(self, path: Path) -> None:
        state = {
            "lora": {path: (one.down.detach(), one.up.detach()) for path, one in self.net.loras.items()},
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "kind": self.kind(),
        }
        write_checkpoint(path, state)

    def resume(self, path: Path) -> bool:
        """Go on from a checkpoint, if there is one. Raises ModelError where it belongs to another run."""
        if not path.exists():
            return False
        state = read_checkpoint(path, "cpu", ("kind", "lora", "optimizer", "step"))  # AdamW counts its steps there
        own = dict(sorted(self.kind().items()))
        same_run(path, own, {name: state["kind"].get(name) for name in own})  # what only older versions knew is nothing
        with torch.no_grad():
            for place, (down, up) in state["lora"].items():
                self.net.loras[place].down.copy_(down)
                self.net.loras[place].up.copy_(up)
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]
        return True


def kind_of(seen: CachedExample) -> Any:
    """What examples of one batch must have in common."""
    return seen.grid, seen.grids, seen.words.places


def together(sides: Sequence[Conditioning], device: torch.device) -> Conditioning:
    """Several prompts as one batch, the shorter ones padded."""
    embeds, mask = padded([side.embeds for side in sides])
    return Conditioning(embeds.to(device), None if mask is None else mask.to(device), sides[0].places)


def shift_of(schedule: Schedule, tokens: int) -> float:
    """The factor by which drawing moves noise levels of a picture of so many tokens towards noise."""
    if not schedule.use_dynamic_shifting:
        return schedule.shift
    mu = schedule.mu(tokens)
    return math.exp(mu) if schedule.time_shift_type == "exponential" else mu


def export(net: LoraNet, out: Path, notes: Mapping[str, str]) -> Path:
    """The LoRA in the names of diffusers, which ComfyUI reads too; bfloat16, its scale within, so that nobody needs to
    know an alpha."""
    tensors: dict[str, Tensor] = {}
    for path, down, up in net.factors():
        tensors[f"transformer.{path}.lora_A.weight"] = down.to(torch.bfloat16).contiguous()
        tensors[f"transformer.{path}.lora_B.weight"] = up.to(torch.bfloat16).contiguous()
    out.parent.mkdir(parents=True, exist_ok=True)
    replace_file(out, lambda part: write_tensors(part, tensors, {"format": "pt", **notes}))
    return out
