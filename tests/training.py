"""A training run in miniature: a narrow network, an autoencoder that was never trained, a handful of designs."""

from __future__ import annotations

import os
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tokenizers import Tokenizer

from lanting.nn.vae import AutoencoderKLQwenImage
from lanting.train import nano, presets
from lanting.train.course import Budget
from lanting.train.labels import SHAPE, WHAT
from lanting.train.loop import Trainer, mean_gradients
from lanting.train.model import NanoConfig, NanoNet, language_config, start, transformer_config
from lanting.train.nano_run import NanoRun
from lanting.train.replay import Batch
from lanting.train.vae import CONFIG, FROZEN, WEIGHTS, initialise, nano_config, save_config, save_vae
from lanting.train.vocabulary import VOCAB_SIZE, build_tokenizer, make_tokenizer

if TYPE_CHECKING:
    import pytest

WIDTH, LAYERS = 64, 1


def small_vae(seed: int = 0) -> AutoencoderKLQwenImage:
    vae = AutoencoderKLQwenImage(nano_config())
    initialise(vae, seed)
    return vae


@cache
def small_tokenizer() -> Tokenizer:
    return make_tokenizer()


def small_net(seed: int = 0) -> NanoNet:
    torch.manual_seed(seed)
    config = NanoConfig(transformer=transformer_config(WIDTH, LAYERS), language=language_config(VOCAB_SIZE))
    return start(NanoNet(config))


def a_batch(count: int = 2) -> Batch:
    """Random tokens on a tiny canvas."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(300, 900, (count, 5), generator=generator)
    what = torch.randint(0, WHAT[0], (count, 6, 2), generator=generator)
    where = torch.full((count, 5, 3), -1)
    where[:, 2] = torch.tensor([3, 2, 1])
    ink = torch.randint(0, 256, (count, 6, 64), generator=generator, dtype=torch.uint8)
    return Batch(torch.randn(count, 6, 64, generator=generator), ids, None, what, where, ink, (1, 2, 3))


def small_run(folder: Path, **changes) -> NanoRun:
    """Values under which a run takes seconds."""
    values = {"vae_minutes": 0.0, "minutes": 0.02, "workers": 1, "capacity": 12, "width": WIDTH, "layers": LAYERS}
    return NanoRun(folder, **{**values, "watch_minutes": 0.0, "device": "cpu", **changes})


def strips(chosen: presets.Preset, large: bool = False) -> tuple[presets.Kind, ...]:
    """One kind of batch instead of six, the quickest to make."""
    return tuple(kind for kind in presets.kinds(chosen, large) if kind.name == "strip")


def no_shapes(tokenizer: Tokenizer, size: int) -> torch.Tensor:
    return torch.zeros(size, SHAPE, dtype=torch.uint8)


WORK = nano.work


def light_work(rank: int, world: int, run: NanoRun) -> None:
    """`nano.work` in a process of its own."""
    nano.kinds, nano.glyph_shapes = strips, no_shapes
    WORK(rank, world, run)


def lighten(patch: pytest.MonkeyPatch) -> None:
    """Runs train on strips alone and learn no shapes: for tests of what has nothing to do with what is learnt."""
    patch.setattr(nano, "kinds", strips)
    patch.setattr(nano, "glyph_shapes", no_shapes)
    patch.setattr(nano, "work", light_work)


def imported(patch: pytest.MonkeyPatch) -> None:
    """New processes are forked from one that has imported all of it: by themselves they take seconds for that, each."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # theirs is the environment of the first that asked
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["torch._dynamo", "lanting.train.nano"])
    patch.setattr(mp, "get_context", lambda _=None: context)
    patch.setattr(mp, "spawn", partial(mp.start_processes, start_method="forkserver"))


def begun(folder: Path, seconds: float = 0.0) -> Path:
    """A run whose autoencoder is done and whose network has just begun, so that nothing needs to be seeded."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vae").mkdir()
    vae = small_vae()
    save_vae(vae, folder / "vae" / WEIGHTS)
    save_config(vae.config, folder / "vae" / CONFIG)
    (folder / "vae" / FROZEN).write_text("not trained\n")
    build_tokenizer(folder / "tokenizer")
    trainer = Trainer(small_net(), Budget(), folder)
    trainer.clock.seconds = seconds
    trainer.save()
    return folder


def union(seed: int = 0, count: int = 6) -> tuple[Batch, torch.Tensor, torch.Tensor]:
    """A batch with its times and noise."""
    torch.manual_seed(seed)
    latents, ids = torch.randn(count, 6, 64), torch.randint(300, 900, (count, 5))
    what, where = torch.randint(0, 70, (count, 6, 2)), torch.full((count, 5, 3), -1)
    where[:, 2] = torch.tensor([3, 2, 1])
    ink = torch.randint(0, 256, (count, 6, 64), dtype=torch.uint8)
    return Batch(latents, ids, None, what, where, ink, (1, 2, 3)), torch.rand(count), torch.randn(count, 6, 64)


def part_of(batch: Batch, rows: slice) -> Batch:
    what, where, ink = batch.what[rows], batch.where[rows], batch.ink[rows]
    return Batch(batch.latents[rows], batch.ids[rows], None, what, where, ink, batch.grid)


def gradients(trainer: Trainer, rows: slice) -> None:
    """The gradients of some rows of `union`, in the network."""
    torch.nn.init.normal_(trainer.net.transformer.proj_out.weight, std=0.1, generator=torch.Generator().manual_seed(0))
    batch, t, noise = union()
    trainer.loss(part_of(batch, rows), [5, 6, 7], t[rows], noise[rows])[0].backward()


def flat(trainer: Trainer) -> torch.Tensor:
    """All gradients, zeros where nothing was seen of a weight."""
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in trainer.net.parameters()])


def one_of_two(rank: int, folder: Path) -> None:
    """Half of the union in one process, averaged in both ways; the first keeps what came out."""
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=2)
    found, agreed = [], 0.0
    for _ in range(2):
        trainer = Trainer(small_net(), Budget(), folder, world=2, rank=rank)
        gradients(trainer, slice(3 * rank, 3 * rank + 3))
        trainer.clock.seconds = 10.0 + 2 * rank
        if found:
            mean_gradients(list(trainer.net.parameters()), 2)  # the way of GPUs
        else:
            trainer.exchange()
        found.append(flat(trainer))
        agreed = max(agreed, trainer.agreed)
    trainer.until = 1e12 if rank == 0 else 0.0  # the slice of the other is over
    ended = trainer.out_of_time()
    if rank == 0:
        torch.save({"ways": found, "agreed": agreed, "ended": ended}, folder / "gradients.pt")
    dist.destroy_process_group()
