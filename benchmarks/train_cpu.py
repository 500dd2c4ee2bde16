"""What a step of nano's training costs on one core in bfloat16 and in float32, kind by kind of batch.

    python benchmarks/train_cpu.py [--width 128] [--rounds 3] [--json FILE]

A network with fresh weights and an untrained autoencoder: the work is the same. Both ways take turns on the same
batches, best of the rounds in processor time, since other work on the machine disturbs. `lanting train nano` takes the
way that `chosen` names. Samples a second hold new designs, the pass forward and backward, and this batch's share of the
optimizers' update; `mix` is the curriculum's, `autoencoder` crops of its own training.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from unittest import mock

import torch

from lanting.nn.vae import AutoencoderKLQwenImage
from lanting.train import precision
from lanting.train.course import Course
from lanting.train.loop import Trainer
from lanting.train.model import NanoNet, start
from lanting.train.nano import courses
from lanting.train.nano_run import NanoRun
from lanting.train.presets import preset
from lanting.train.vae import VAERecipe, VAETrainer, initialise, nano_config
from lanting.train.vocabulary import make_tokenizer

WAYS = {"bfloat16": True, "float32": False}  # whether the CPU is said to multiply bfloat16 itself
CPU = torch.device("cpu")


def taking(way: str) -> AbstractContextManager[object]:
    """Training takes this way, whatever the machine is."""
    return mock.patch.object(precision, "native_on_cpu", lambda: WAYS[way])


@dataclass
class Bench:
    """What is timed, and the best seconds so far by (way, what)."""

    trainer: Trainer
    drawing: VAETrainer
    vae: AutoencoderKLQwenImage  # frozen, for new designs
    kinds: list[Course]
    best: dict[tuple[str, str], float] = field(default_factory=dict)
    rng: random.Random = field(default_factory=lambda: random.Random(0))

    def time(self, way: str, what: str, work: Callable[[], object]) -> None:
        with taking(way):
            self.vae.to(precision.product_dtype(CPU))
            begin = time.process_time()
            work()
            spent = time.process_time() - begin
        self.best[way, what] = min(spent, self.best.get((way, what), float("inf")))

    def round(self) -> None:
        """Every kind, the update and a step of the autoencoder, once each way."""
        for kind in self.kinds:
            batch = kind.replay.draw(kind.batch, self.rng)
            t, noise = self.trainer.noised(batch, None)
            work = partial(self.trainer.passes, kind.name, batch, kind.replay.reader.prefix, t, noise)
            for way in WAYS:
                self.time(way, f"{kind.name} new", partial(kind.replay.add, kind.fresh, self.rng))
                self.time(way, f"{kind.name} pass", work)
        crops = torch.rand(self.drawing.recipe.batch, 3, 64, 64).to(memory_format=torch.channels_last) * 2 - 1
        for way in WAYS:
            self.time(way, "update", self.trainer.update)
            self.time(way, "autoencoder", partial(self.drawing.train_step, crops))
            with taking(way):
                work()  # gradients for the next update

    def rates(self, way: str) -> dict[str, float]:
        """Samples a second of every kind, and of the curriculum's mix."""
        update = self.best[way, "update"] / self.trainer.budget.picks
        costs = {
            k.name: self.best[way, f"{k.name} new"] + self.best[way, f"{k.name} pass"] + update for k in self.kinds
        }
        mixed = sum(k.share * k.batch for k in self.kinds) / sum(k.share * costs[k.name] for k in self.kinds)
        crops = self.drawing.recipe.batch / self.best[way, "autoencoder"]
        return {k.name: k.batch / costs[k.name] for k in self.kinds} | {"mix": mixed, "autoencoder": crops}


def bench(width: int, folder: Path) -> Bench:
    """Everything in place, with a few designs of every kind."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    run, chosen = NanoRun(folder, device="cpu", width=width), preset("cpu", 1, width)
    vae, other = (AutoencoderKLQwenImage(nano_config()) for _ in range(2))
    for each in (vae, other):
        initialise(each, 0)
    kinds = courses(run, vae, make_tokenizer(), 0, chosen)
    trainer = Trainer(start(NanoNet(run.config())), chosen.budget(1.0), folder)
    made = Bench(trainer, VAETrainer(other, VAERecipe(processes=1), 1.0, "all"), vae, kinds)
    for kind in kinds:
        kind.replay.add(32, made.rng)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        made = bench(asked.width, Path(folder))
        for number in range(asked.rounds + 1):
            made.round()
            if not number:
                made.best.clear()  # the first round warms up
    half, full = (made.rates(way) for way in WAYS)
    for name in half:
        print(f"{name:11s} {half[name]:7.2f} samples/s in bfloat16, {full[name]:7.2f} in float32", flush=True)
    report = {
        "width": asked.width,
        "torch": torch.__version__,
        "machine": platform.machine(),
        "chosen": str(precision.product_dtype(CPU)),
        "samples a second": {"bfloat16": half, "float32": full},
        "seconds": {f"{way}, {what}": seconds for (way, what), seconds in made.best.items()},
    }
    if asked.json:
        asked.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
