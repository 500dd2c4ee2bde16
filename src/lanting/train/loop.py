"""The training loop of nano's reader and transformer: flow matching on replayed latents.

Time is budgeted in minutes, not steps: the learning rate warms up, stays flat and decays over the last part of the
budget, so a run can be prolonged by resuming with a larger budget. Each step picks two kinds of batches by their
shares. On CPUs one process per core keeps torch's small kernels busy better than threads do; processes average their
gradients. On a GPU nothing in a step asks for a number, so that Python runs ahead of it: figures stay tensors until
they are logged, and processes agree on the time now and then only. A checkpoint is written under another name and
renamed, so a run survives being killed at any moment.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lanting.core.errors import ModelError
from lanting.core.lang import Phrase
from lanting.train.assets import concepts
from lanting.train.course import STOCK, Budget, Clock, Course
from lanting.train.graphs import Passes, passes_for
from lanting.train.journal import Meter
from lanting.train.kept import read_checkpoint, write_checkpoint
from lanting.train.labels import SCENE, SHAPE
from lanting.train.losses import judged
from lanting.train.model import NanoNet, matrices
from lanting.train.optim import Muon, average_gradients, mean_gradients
from lanting.train.precision import cast
from lanting.train.replay import Batch

AGREE = 20  # steps on GPUs between two agreements on the time
NEW = ("scene", "named")  # heads that only help, and that a checkpoint may be older than


class Trainer:
    """Network, averages and optimizers of one process. The network must be on `device` already."""

    def __init__(self, net: NanoNet, budget: Budget, folder: Path, world: int = 1, rank: int = 0, device: str = "cpu"):
        self.net, self.budget, self.folder, self.world, self.rank = net, budget, folder, world, rank
        self.fast = net  # what goes forward and backward: the network, or a copy of it in 16 bits
        self.device = torch.device(device)
        muon, adam = matrices(net)
        self.optimizers: list[torch.optim.Optimizer] = [
            Muon(muon, lr=budget.lr),
            torch.optim.AdamW(adam, lr=budget.lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True),
        ]
        self.average = {k: v.clone() for k, v in net.state_dict().items()}
        self.clock = Clock()
        self.agreed = 0.0  # seconds as all processes last agreed on them: what rates and the end go by
        self.until = float("inf")  # time.monotonic() at which this slice of the run ends
        self.warm_from = 0  # step at which the optimizers began with empty hands
        self.scale = 1.0  # of the batches, halved when a GPU's memory was too small
        self.ticked = 0.0
        self.shapes = torch.zeros(net.config.language.vocab_size, SHAPE, dtype=torch.uint8)
        self.pictures = torch.zeros(len(concepts()), SCENE)
        self._prefixes: dict[tuple[int, ...], Tensor] = {}
        self._pairs: tuple[list[Tensor], list[Tensor]] = ([], [])  # what follows and what is followed
        self._paired: tuple[object, object] = (None, None)  # whose they are
        self._copied: tuple[list[Tensor], list[Tensor]] = ([], [])  # weights of the copy, and those they come from
        self.passes: Passes = passes_for(self)

    def use(self, fast: NanoNet) -> None:
        """Go forward and backward through a copy of the network in 16 bits (`twin`) from now on."""
        self.fast = fast
        self.passes = passes_for(self)
        self._copied = list(fast.parameters()), list(self.net.parameters())
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Bring the copy, if there is one, up to the network's weights."""
        if self.fast is not self.net:
            torch._foreach_copy_(*self._copied)

    @property
    def progress(self) -> float:
        """Share of the budget that is spent, 0..1."""
        return min(1.0, self.agreed / max(1e-9, 60 * self.budget.minutes))

    def noised(self, batch: Batch, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """Times (B,) and noise (B, N, C) for a batch's latents. The first edits of a batch are at t = 1."""
        x0, shift = batch.latents, self.budget.shift
        u = torch.rand(x0.shape[0], generator=generator, device=self.device)
        t = shift * u / (1 + (shift - 1) * u)
        t[: batch.starting(self.budget.starts)] = 1.0
        return t, torch.randn(x0.shape, generator=generator, device=self.device)

    def prefix(self, ids: Sequence[int]) -> Tensor:
        """(1, P) on the device; sent there once."""
        key = tuple(ids)
        if key not in self._prefixes:
            self._prefixes[key] = torch.tensor([list(ids)], device=self.device)
        return self._prefixes[key]

    def loss(self, batch: Batch, prefix: Sequence[int], t: Tensor, noise: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Velocity error at times t plus what the helper heads missed."""
        x0, weights = batch.latents, self.budget
        noisy = torch.lerp(x0, noise, t[:, None, None])
        if self.fast is not self.net:
            dtype = self.fast.ink.out.weight.dtype
            velocity, said = self.fast(noisy.to(dtype), t, self.prefix(prefix), batch.pictures_in(dtype))
        else:
            with cast(self.device):
                velocity, said = self.net(noisy, t, self.prefix(prefix), batch)
        error = (velocity.float() - (noise - x0)).square().mean()
        return judged(error, said, batch, (self.shapes, self.pictures), weights)

    def step(
        self, courses: Sequence[Course], rng: random.Random, generator: torch.Generator, seed: int
    ) -> dict[str, Tensor]:
        """One update over `picks` batches of every process. Returns figures by course.

        Each process picks its own kinds, so that a step sees more of them; all kinds cost about the same.
        """
        began = time.monotonic()
        picker = random.Random((seed * 7919 + self.clock.step) * 64 + self.rank)
        shares = [c.due(self.progress, self.budget.turn) for c in courses]
        figures: dict[str, Tensor] = {}
        for course in picker.choices(courses, shares, k=self.budget.picks):
            course.replay.add(course.fresh, rng)
            count = max(1, int(course.batch * self.scale))
            batch = course.replay.draw(count, rng).to(self.device)
            t, noise = self.noised(batch, generator)
            report = self.passes(course.name, batch, course.replay.reader.prefix, t, noise)
            figures |= {f"{course.name} {k}": v for k, v in report.items()}
            self.clock.seen += count * self.world
        if self.world > 1:
            self.exchange()
        self.update()
        self.clock.step += 1
        self.tick(began)
        return figures

    def update(self) -> None:
        """Move the weights along the gradients, and the average behind them."""
        self.passes.gather()
        torch.nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
        rate = self.budget.rate(self.clock.step - self.warm_from, self.agreed)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad(set_to_none=self.world == 1)
        self.passes.clear()
        self.follow()
        self.refresh()

    def tick(self, began: float) -> None:
        """Advance the clock. A GPU is still busy when a step returns, so there time counts from step to step."""
        now = time.monotonic()
        if self.device.type != "cpu" and self.ticked:
            began = self.ticked
        self.ticked = now
        self.clock.seconds += now - began
        if self.world == 1:
            self.agreed = self.clock.seconds

    def exchange(self) -> None:
        """Average gradients, and the clock, so that all processes end together."""
        parameters = list(self.net.parameters())
        if self.device.type == "cpu":
            self.agreed = average_gradients(parameters, self.clock.seconds, self.world)
            self.clock.seconds = self.agreed
            return
        mean_gradients(parameters, self.world)
        if self.clock.step % AGREE == 0:
            seconds = torch.tensor([self.clock.seconds], device=self.device)
            dist.all_reduce(seconds)
            self.agreed = self.clock.seconds = seconds.item() / self.world

    def out_of_time(self) -> bool:
        """Whether this slice has ended for any process; all get the same answer."""
        if self.world == 1:
            return time.monotonic() > self.until
        if self.until == float("inf") or (self.device.type != "cpu" and self.clock.step % AGREE):
            return False
        late = torch.tensor([float(time.monotonic() > self.until)], device=self.device)
        dist.all_reduce(late, op=dist.ReduceOp.MAX)
        return late.item() > 0

    @torch.no_grad()
    def follow(self) -> None:
        """The running average that is shipped; fast at first, so that early pictures mean something."""
        keep = min(self.budget.ema, (1 + self.clock.step) / (10 + self.clock.step))
        if self._paired[0] is not self.net or self._paired[1] is not self.average:
            now = self.net.state_dict()  # a walk through all modules: once is enough
            self._pairs = list(self.average.values()), [now[k] for k in self.average]
            self._paired = self.net, self.average
        torch._foreach_lerp_(*self._pairs, 1 - keep)

    def save(self) -> None:
        state = {
            "net": self.net.state_dict(),
            "average": self.average,
            "optimizers": [o.state_dict() for o in self.optimizers],
            "clock": asdict(self.clock),
            "config": self.net.config.to_dict(),
        }
        write_checkpoint(self.folder / "checkpoint.pt", state)

    def resume(self) -> bool:
        """Go on from the folder's checkpoint; False where there is none. Raises ModelError for another network's.

        A checkpoint may come without optimizer states; rates then warm up again.
        """
        path = self.folder / "checkpoint.pt"
        if not path.exists():
            return False
        state = read_checkpoint(path, self.device, ("net", "average", "optimizers", "clock"))
        fresh = self.net.state_dict()
        for weights in (state["net"], state["average"]):  # a head that only helps may be newer than the checkpoint
            weights |= {k: v.clone() for k, v in fresh.items() if k not in weights and k.split(".")[0] in NEW}
        shapes = {k: v.shape for k, v in fresh.items()}
        if {k: v.shape for k, v in state["net"].items()} != shapes:
            raise ModelError(
                "{path} holds a network of another shape: give its --width and --layers, or another folder", path=path
            )
        self.net.load_state_dict(state["net"])
        self.average = state["average"]
        self.clock = Clock(**state["clock"])
        self.agreed = self.clock.seconds
        for optimizer, kept in zip(self.optimizers, state["optimizers"], strict=False):
            groups = optimizer.state_dict()["param_groups"]
            optimizer.load_state_dict({"state": kept["state"], "param_groups": kept.get("param_groups") or groups})
        self.warm_from = 0 if state["optimizers"] else self.clock.step
        self.refresh()
        return True


def train(
    trainer: Trainer,
    courses: Sequence[Course],
    log: Callable[[dict[str, Any]], None],
    seed: int,
    every: Callable[[Trainer], None] = lambda trainer: None,
) -> bool:
    """Run until the budget or the slice is spent; every process calls this. `every` is called after each step
    (curriculum). Returns whether the budget is spent."""
    rng = random.Random(seed * 1009 + trainer.rank + 7919 * trainer.clock.step)
    generator = torch.Generator(trainer.device).manual_seed(rng.randrange(2**31))
    for course in courses:
        while (lacking := min(STOCK, course.replay.capacity) - len(course.replay.items)) > 0:
            course.replay.add(min(32, lacking), rng)
    first, budget = trainer.rank == 0, trainer.budget
    saved = logged = time.monotonic()
    meter = Meter(trainer)
    while trainer.agreed < 60 * budget.minutes and not trainer.out_of_time():
        try:
            meter.recent.append(trainer.step(courses, rng, generator, seed))
        except torch.OutOfMemoryError:
            make_smaller(trainer)
            continue
        every(trainer)
        now = time.monotonic()
        if first and now - logged > budget.log_every:
            log(meter.entry())
            logged = now
        if first and now - saved > budget.save_every:
            trainer.save()
            saved = now
    done = trainer.agreed >= 60 * budget.minutes
    if first:
        trainer.save()
        if meter.recent:
            log(meter.entry())
        log({"note": Phrase("done") if done else Phrase("slice done")})
    return done


def make_smaller(trainer: Trainer) -> None:
    """Halve the batches after a GPU's memory was too small. Raises ModelError where that can't help."""
    if trainer.world > 1 or trainer.scale < 0.1:
        raise ModelError("The GPU's memory is too small for these batches; give a smaller --batch-times.")
    trainer.scale /= 2
    trainer.passes.forget()
    torch.cuda.empty_cache()
