"""The training loop of nano's text model and transformer: flow matching on replayed latents.

Time is budgeted in minutes, not steps: the learning rate warms up, stays flat and decays over the last part of the
budget, so a run can be prolonged by resuming with a larger budget. One process per core keeps torch's small kernels
busy better than threads do; processes average their gradients with gloo. A checkpoint is written under another name
and renamed, so a run survives being killed at any moment.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from lanting.train.model import NanoNet, matrices
from lanting.train.optim import Muon, average_gradients
from lanting.train.replay import Batch, Replay
from lanting.train.vae import replace_file


@dataclass(frozen=True)
class Budget:
    """How long and how hard to train."""

    minutes: float = 94.0  # of training time, summed over resumed runs
    lr: float = 2e-3
    warmup_steps: int = 100
    decay_share: float = 0.35  # last part of the budget, linear to 2 %
    batch: tuple[int, ...] = (20, 10)  # per canvas size and process
    fresh: tuple[int, ...] = (4, 2)  # new signs per step and canvas size
    aux: float = 0.2  # weight of the character head
    shift: float = 3.0  # times are drawn uniformly, then shifted towards noise
    ema: float = 0.998
    save_every: float = 120.0  # seconds

    def rate(self, step: int, seconds: float) -> float:
        left = max(0.0, 1 - seconds / (60 * self.minutes))
        decay = min(1.0, left / self.decay_share) * 0.98 + 0.02
        return self.lr * min(1.0, (step + 1) / self.warmup_steps) * decay


@dataclass
class Clock:
    """What a resumed run must continue from."""

    step: int = 0
    seen: int = 0
    seconds: float = 0.0


class Trainer:
    """Network, averages and optimizers of one process."""

    def __init__(self, net: NanoNet, budget: Budget, folder: Path, world: int = 1, rank: int = 0):
        self.net, self.budget, self.folder, self.world, self.rank = net, budget, folder, world, rank
        muon, adam = matrices(net)
        self.optimizers: list[torch.optim.Optimizer] = [
            Muon(muon, lr=budget.lr),
            torch.optim.AdamW(adam, lr=budget.lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True),
        ]
        self.average = {k: v.clone() for k, v in net.state_dict().items()}
        self.clock = Clock()
        self.agreed = 0.0  # seconds as all processes last agreed on them: what rates and the end go by

    def loss(self, batch: Batch, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        """Velocity error plus the character head's cross entropy."""
        x0, count = batch.latents, batch.latents.shape[0]
        u = torch.rand(count, generator=generator)
        t = self.budget.shift * u / (1 + (self.budget.shift - 1) * u)
        noise = torch.randn(x0.shape, generator=generator)
        noisy = torch.lerp(x0, noise, t[:, None, None])
        prefix = torch.tensor([self.prefix])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            velocity, logits = self.net(noisy, t, prefix, batch.ids, batch.mask, [batch.grid])
        error = (velocity.float() - (noise - x0)).square().mean()
        target = batch.labels.flatten()
        weight = torch.where(target > 0, 1.0, 0.2) * (target >= 0)
        each = F.cross_entropy(logits.float().flatten(0, 1), target.clamp(min=0), reduction="none")
        aux = (each * weight).sum() / weight.sum()
        right = (logits.argmax(-1).flatten() == target)[target > 0].float().mean()
        report = {"loss": error.item(), "aux": aux.item(), "read": right.item()}
        return error + self.budget.aux * aux, report

    def step(self, replays: list[Replay], rng: random.Random, generator: torch.Generator) -> dict[str, float]:
        """One update over a batch of every canvas size. Returns loss figures by size."""
        began = time.monotonic()
        budget, figures = self.budget, {}
        self.prefix = replays[0].reader.prefix
        for replay, size, fresh in zip(replays, budget.batch, budget.fresh, strict=True):
            replay.add(fresh, rng)
            total, report = self.loss(replay.draw(size, rng), generator)
            (total / len(replays)).backward()
            figures |= {f"{k}{replay.size[0]}": v for k, v in report.items()}
        if self.world > 1:
            self.exchange()
        figures["norm"] = float(torch.nn.utils.clip_grad_norm_(self.net.parameters(), 1.0))
        rate = budget.rate(self.clock.step, self.agreed)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.follow()
        self.clock.step += 1
        self.clock.seen += sum(budget.batch) * self.world
        self.clock.seconds += time.monotonic() - began
        if self.world == 1:
            self.agreed = self.clock.seconds
        return figures

    def exchange(self) -> None:
        """Average gradients (and the clock, so that all processes end together)."""
        self.agreed = average_gradients(list(self.net.parameters()), self.clock.seconds, self.world)
        self.clock.seconds = self.agreed

    @torch.no_grad()
    def follow(self) -> None:
        """The running average that is shipped; fast at first, so that early pictures mean something."""
        keep = min(self.budget.ema, (1 + self.clock.step) / (10 + self.clock.step))
        now = self.net.state_dict()
        torch._foreach_lerp_(list(self.average.values()), [now[k] for k in self.average], 1 - keep)

    def save(self) -> None:
        state = {
            "net": self.net.state_dict(),
            "average": self.average,
            "optimizers": [o.state_dict() for o in self.optimizers],
            "clock": asdict(self.clock),
            "config": self.net.config.to_dict(),
        }
        replace_file(self.folder / "checkpoint.pt", lambda part: torch.save(state, part))

    def resume(self) -> bool:
        path = self.folder / "checkpoint.pt"
        if not path.exists():
            return False
        state = torch.load(path, weights_only=True)
        self.net.load_state_dict(state["net"])
        self.average = state["average"]
        for optimizer, kept in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(kept)
        self.clock = Clock(**state["clock"])
        self.agreed = self.clock.seconds
        return True


def train(trainer: Trainer, replays: list[Replay], log: Callable[[str], None], seed: int) -> None:
    """Run until the budget is spent; every process calls this."""
    rng = random.Random(seed * 1009 + trainer.rank + 7919 * trainer.clock.step)
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    for replay in replays:
        replay.add(min(1024, replay.capacity), rng)
    first = trainer.rank == 0
    saved = logged = time.monotonic()
    recent: list[dict[str, float]] = []
    while trainer.agreed < 60 * trainer.budget.minutes:
        recent.append(trainer.step(replays, rng, generator))
        now = time.monotonic()
        if first and now - logged > 20:
            log(line(trainer, recent))
            recent, logged = [], now
        if first and now - saved > trainer.budget.save_every:
            trainer.save()
            saved = now
    if first:
        trainer.save()
        log("done")


def line(trainer: Trainer, recent: list[dict[str, float]]) -> str:
    """One line of progress as JSON, for people and plots alike."""
    clock, budget = trainer.clock, trainer.budget
    mean = {k: round(sum(r[k] for r in recent) / len(recent), 4) for k in recent[0]}
    rate = clock.seen / max(clock.seconds, 1e-9)
    left = 60 * budget.minutes - clock.seconds
    return json.dumps(
        {
            "step": clock.step,
            "seen": clock.seen,
            "seconds": round(clock.seconds),
            "left": round(left),
            "per_second": round(rate, 1),
            "lr": round(budget.rate(clock.step, clock.seconds), 6),
            **mean,
        }
    )
