"""`lanting train nano`: the recipe that made the embedded checkpoint, one resumable command.

Stage 1 trains the autoencoder on signs and freezes its encoder; stage 2 trains the text model and the transformer on
its latents; stage 3 writes the official folder. Each stage keeps its checkpoints in the run's folder and goes on
from them, so a killed run loses at most two minutes.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tokenizers import Tokenizer

from lanting.core.errors import RequestError
from lanting.train.export import export_nano
from lanting.train.loop import Budget, Trainer, train
from lanting.train.model import NanoConfig, NanoNet, start
from lanting.train.replay import Reader, Replay
from lanting.train.signs import SIZES, SignMaker
from lanting.train.vae import finetune_decoder, load_vae, train_vae
from lanting.train.vocabulary import build_tokenizer


@dataclass(frozen=True)
class NanoRun:
    """One run: where, how long, how wide. Minutes are wall-clock time of training."""

    folder: Path
    vae_minutes: float = 17.0
    decoder_minutes: float = 0.0  # sharpens further; the shipped checkpoint did without
    minutes: float = 94.0
    workers: int = 0  # processes for stage 2; 0: one per core
    seed: int = 0
    capacity: int = 30000  # encoded signs kept per canvas size and process

    @property
    def vae(self) -> Path:
        return self.folder / "vae"

    @property
    def tokenizer(self) -> Path:
        return self.folder / "tokenizer"


def cost(run: NanoRun) -> str:
    """What the run will take, in one line, said before it starts."""
    cores = run.workers or os.cpu_count() or 1
    total = run.vae_minutes + run.decoder_minutes + run.minutes
    memory = cores * (1.2 + run.capacity * 3.6e-5)
    return f"about {total:.0f} minutes on {cores} cores, {memory:.1f} GB of memory, 0.3 GB of disk in {run.folder}"


def main(run: NanoRun) -> Path:
    """All three stages; returns the model folder. Raises RequestError for values that can't be trained with."""
    if min(run.minutes, run.vae_minutes, run.decoder_minutes) < 0:
        raise RequestError("Training minutes can't be negative; give 0 to only continue to the next stage.")
    run.folder.mkdir(parents=True, exist_ok=True)
    if not (run.tokenizer / "tokenizer.json").is_file():
        build_tokenizer(run.tokenizer)
    train_vae(run.vae, run.vae_minutes)
    if run.decoder_minutes:
        finetune_decoder(run.vae, run.decoder_minutes)
    train_transformer(run)
    return export_nano(run.folder, run.folder / "nano")


def train_transformer(run: NanoRun) -> None:
    """Stage 2 in one process per core."""
    world = run.workers or os.cpu_count() or 1
    if world == 1:
        work(0, 1, run)
        return
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    mp.spawn(work, args=(world, run), nprocs=world, join=True)


def work(rank: int, world: int, run: NanoRun) -> None:
    """One process of stage 2."""
    torch.set_num_threads(1)
    if world > 1:
        address = f"tcp://127.0.0.1:{29500 + os.getppid() % 1000}"
        dist.init_process_group("gloo", init_method=address, rank=rank, world_size=world)
    torch.manual_seed(run.seed)
    reader = Reader(Tokenizer.from_file(str(run.tokenizer / "tokenizer.json")))
    vae = load_vae(run.vae).bfloat16()  # twice as fast as autocast, and the latents are kept in 16 bits anyway
    maker = SignMaker(seed=run.seed + 1000 * rank)
    replays = [Replay(vae, reader, maker, size, run.capacity) for size in SIZES]
    trainer = Trainer(start(NanoNet(NanoConfig())), Budget(minutes=run.minutes), run.folder, world, rank)
    trainer.resume()
    journal = run.folder / "log.jsonl"

    def log(line: str) -> None:
        print(line, flush=True)
        with journal.open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    train(trainer, replays, log, run.seed)
    if world > 1:
        dist.destroy_process_group()
