"""`lanting train nano`: the recipe that made the embedded checkpoint, one resumable command.

Stage 1 trains the autoencoder on designs and freezes its encoder; stage 2 trains reader, vision tower and transformer
on its latents; stage 3 writes the official folder. Each stage keeps its checkpoints in the run's folder and goes on
from them, so a killed run loses at most two minutes. The same command runs on one core, on all cores (one process
each), on one GPU and on several.
"""

from __future__ import annotations

import os
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tokenizers import Tokenizer

from lanting.core.errors import LantingError
from lanting.core.files import unwritable
from lanting.core.lang import Phrase
from lanting.nn.vae import AutoencoderKLQwenImage
from lanting.train.course import Budget, Course
from lanting.train.designs import DesignMaker, Mix
from lanting.train.edits import EditMaker
from lanting.train.export import export_nano
from lanting.train.feed import Feed, FeedOrder, edit_mix
from lanting.train.journal import Journal
from lanting.train.kept import alone, disk_said, read_checkpoint
from lanting.train.labels import concept_pictures, glyph_shapes
from lanting.train.loop import Trainer, train
from lanting.train.model import NanoNet, compile_blocks, start
from lanting.train.nano_run import NanoRun, settled
from lanting.train.portable import pack, unpack
from lanting.train.precision import product_dtype
from lanting.train.presets import Preset, kinds, processes, room
from lanting.train.progress import Watch
from lanting.train.replay import EditReplay, Reader, Replay
from lanting.train.speed import compile_for_gpu, prepare_for_gpu
from lanting.train.twin import twin_of
from lanting.train.vae import DECODER, FROZEN, VAERecipe, finetune_decoder, load_vae, train_vae
from lanting.train.vocabulary import VOCAB_SIZE, build_tokenizer
from lanting.train.warm import continue_from, seed_embeddings, seed_names
from lanting.train.workers import kept_atlas, meet_here, parent_lives

# of a thousand pictograms each must be met as often as a character is, though a design shows one of them only
MIX = Mix(kinds=(0.32, 0.32, 0.05, 0.31), pictogram=0.3, gap=0.4)
# progress at which a stage of the curriculum begins, and how many Chinese characters it draws from
HANZI = ((0.0, 1200), (0.04, 3500))


def main(run: NanoRun) -> Path:
    """All three stages; returns the model folder, or the run's folder where a slice ended before there is a model.

    Raises RequestError for values that can't be trained with, OutputError for a folder that can't be made, ModelError
    for one in which another run is under way.
    """
    run = settled(run)
    try:
        run.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(run.folder, error) from None
    try:
        with alone(run.folder):
            return stages(run)
    finally:
        with suppress(OSError):  # but for what couldn't be brought, it is not empty
            run.folder.rmdir()


def stages(run: NanoRun) -> Path:
    """`main`, where nothing is in the way."""
    brought = (run.width, run.anew, run.vae_anew, run.config())
    if run.resume_from and not unpack(Path(run.resume_from), run.folder, *brought):
        run.say("{folder} has a checkpoint of its own and goes on from that", folder=run.folder)
    if not (run.tokenizer / "tokenizer.json").is_file():
        build_tokenizer(run.tokenizer)
    meet_here()
    train_vae(run.vae, run.vae_minutes, recipe=vae_recipe(run), log=run.say)
    if run.decoder_minutes and (run.vae / FROZEN).exists():
        finetune_decoder(run.vae, run.decoder_minutes, recipe=decoder_recipe(run), log=run.say)
    if not (run.vae / (DECODER if run.decoder_minutes else FROZEN)).exists():
        run.say("slice done; the autoencoder is not finished yet")
        pack(run.folder, run.portable)
        return run.folder
    train_transformer(run)
    if run.slice_minutes:
        pack(run.folder, run.portable)
    return export_nano(run.folder, run.folder / "nano")


def vae_recipe(run: NanoRun) -> VAERecipe:
    """Stage 1 on the run's device: two processes on a CPU, large batches in one on a GPU."""
    recipe = VAERecipe(warm=run.warm, seed=run.seed, until=run.until)
    if run.device != "cuda":
        return recipe
    feeders = run.preset(1).feeders
    return replace(recipe, device="cuda", processes=1, batch=512, canvas_batch=48, feeders=feeders, warmup_steps=100)


def decoder_recipe(run: NanoRun) -> VAERecipe:
    """The decoder alone, in one process, on other pictures than before; where and until when as all of stage 1."""
    return replace(vae_recipe(run), lr=1e-3, processes=1, warm="", seed=run.seed + 1)


def train_transformer(run: NanoRun) -> None:
    """Stage 2 in one process per core or GPU."""
    run = settled(run)
    world = processes(run.device, run.workers)
    if world == 1:
        work(0, 1, run)
        return
    told = mp.get_context("spawn").SimpleQueue()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as meeting:
        run = replace(run, meeting=str(Path(meeting) / "here"))
        try:
            mp.spawn(one_of, args=(world, run, work, told), nprocs=world, join=True)
        except mp.ProcessRaisedException:
            if told.empty():
                raise
            kind, sentence, values = told.get()
            raise kind(sentence, **values) from None


def one_of(rank: int, world: int, run: NanoRun, job: Callable[[int, int, NanoRun], None], told: Any) -> None:
    """`job` in a process of its own, which tells what can be explained as it is: spawn brings a traceback's text."""
    try:
        with disk_said(run.folder):
            job(rank, world, run)
    except LantingError as error:
        told.put((type(error), error.sentence, error.values))
        raise


def courses(
    run: NanoRun, vae: AutoencoderKLQwenImage, tokenizer: Tokenizer, rank: int, chosen: Preset | None = None
) -> list[Course]:
    """Every kind of batch of the curriculum, made in the trainer itself."""
    chosen = chosen or run.preset(1)
    mix = replace(MIX, hanzi=HANZI[0][1], concepts=run.concepts)
    reader, editor = Reader(tokenizer), Reader(tokenizer, "edit-plus")
    designs = DesignMaker(run.seed + 1000 * rank, mix=mix)
    edits = EditMaker(run.seed + 1000 * rank + 1, mix=edit_mix(mix))
    found = []
    for kind in kinds(chosen, run.large):
        if kind.pictures:
            replay = EditReplay(vae, editor, edits, kind.size, room(kind, chosen), kind.pictures)
        else:
            replay = Replay(vae, reader, designs, kind.size, room(kind, chosen))
        found.append(Course(kind.name, replay, kind.share, kind.batch, kind.fresh, kind.early))
    return found


def order(run: NanoRun, rank: int, chosen: Preset, step: int) -> FeedOrder:
    """What the feeders of one trainer make; a resumed run must not make the same again."""
    chosen_kinds = kinds(chosen, run.large)
    return FeedOrder(
        chosen_kinds,
        str(run.tokenizer / "tokenizer.json"),
        str(run.folder / "atlas.npz"),
        seed=run.seed + 1000 * rank + 7919 * step,
        workers=chosen.feeders,
        chunk=min(128, *(room(kind, chosen) for kind in chosen_kinds)),
        mix=replace(MIX, hanzi=HANZI[0][1], concepts=run.concepts),
    )


def curriculum(kinds: Sequence[Course], trainer: Trainer, feed: Feed | None = None) -> None:
    """More characters as the run goes on."""
    hanzi = next(count for begin, count in reversed(HANZI) if trainer.progress >= begin)
    if feed is not None:
        feed.change(hanzi)
        return
    for course in kinds:
        assert isinstance(course.replay, Replay)
        maker = course.replay.maker
        designs = maker.designs if isinstance(maker, EditMaker) else maker
        if designs.mix.hanzi != hanzi:
            designs.change(replace(designs.mix, hanzi=hanzi))


def build(run: NanoRun, tokenizer: Tokenizer, vae: AutoencoderKLQwenImage) -> NanoNet:
    """The network as a run begins it."""
    torch.manual_seed(run.seed)
    net = start(NanoNet(run.config()))
    if not (run.folder / "checkpoint.pt").exists():  # else all of it is replaced at once
        seed_embeddings(net, tokenizer, vae)
        if run.warm:
            continue_from(net, tokenizer, Path(run.warm))
    if run.compiled and run.device != "cuda":
        compile_blocks(net)
    return net


def end_with_parent(every: float = 2.0) -> None:
    """Let this process end when the one that started it is gone: a killed command leaves nobody training on."""

    def watch() -> None:
        while parent_lives():
            time.sleep(every)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def join(rank: int, world: int, device: str, meeting: str) -> str:
    """Meet the other processes in a file, so that no port has to be free; returns the device of this one."""
    own = f"cuda:{rank}" if device == "cuda" else "cpu"
    if device == "cuda":
        torch.cuda.set_device(rank)
    if world > 1:
        end_with_parent()
        backend = "nccl" if device == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.FileStore(meeting, world), rank=rank, world_size=world)
    return own


def work(rank: int, world: int, run: NanoRun) -> None:
    """One process of stage 2."""
    chosen = run.preset(world)
    device = join(rank, world, run.device, run.meeting)
    if rank == 0 and chosen.feeders:
        kept_atlas(run.folder / "atlas.npz")
    if world > 1:
        dist.barrier()
    step = seen_steps(run.folder)
    feed = Feed(order(run, rank, chosen, step)) if chosen.feeders else None
    try:
        trainer, vae, tokenizer = prepared(run, chosen, world, rank, device)
        kinds = feed.courses(vae, tokenizer, chosen) if feed else courses(run, vae, tokenizer, rank, chosen)
        go(run, trainer, kinds, feed, vae)
    finally:
        if feed is not None:
            feed.close()
    if world > 1:
        dist.destroy_process_group()


def seen_steps(folder: Path) -> int:
    """Steps of the checkpoint a run goes on from."""
    path = folder / "checkpoint.pt"
    return read_checkpoint(path, needs=["clock"])["clock"]["step"] if path.exists() else 0


def prepared(
    run: NanoRun, chosen: Preset, world: int, rank: int, device: str
) -> tuple[Trainer, AutoencoderKLQwenImage, Tokenizer]:
    """Trainer, autoencoder and tokenizer of one process on its device."""
    torch.set_num_threads(1 if device == "cpu" else max(1, chosen.feeders))
    tokenizer = Tokenizer.from_file(str(run.tokenizer / "tokenizer.json"))
    vae = load_vae(run.vae)
    net = build(run, tokenizer, vae)
    torch.set_num_threads(1)
    vae.to(product_dtype(torch.device(device)))  # twice as fast as autocast; latents are kept in 16 bits anyway
    twin = None
    if device != "cpu":
        alone = world == 1 and not run.compiled
        twin = twin_of(net.to(device)) if alone else None
        prepare_for_gpu(net)
        if run.compiled is not False and not alone:
            compile_for_gpu()
        vae.to(device)
    budget: Budget = chosen.budget(run.minutes)
    trainer = Trainer(net, budget, run.folder, world, rank, device)
    trainer.until = run.until
    trainer.shapes = glyph_shapes(tokenizer, VOCAB_SIZE).to(device)
    trainer.pictures = concept_pictures().to(device)
    if trainer.resume() and run.recode:
        for table in (net.language.embed_tokens.weight, trainer.average["language.embed_tokens.weight"]):
            seed_names(table, tokenizer, vae)
    if twin is not None:
        trainer.use(twin)
    return trainer, vae, tokenizer


def go(run: NanoRun, trainer: Trainer, kinds: Sequence[Course], feed: Feed | None, vae: AutoencoderKLQwenImage) -> None:
    """Train, tell, and draw sheets."""
    asked = [trainer.clock.seen, trainer.clock.seconds]

    def more() -> dict[str, float]:
        if feed is None:
            return {}
        clock = trainer.clock
        found = feed.figures((clock.seen - asked[0]) // trainer.world, clock.seconds - asked[1])
        asked[:] = [clock.seen, clock.seconds]
        return found

    journal = Journal(run.folder, run.say, more)
    watch = Watch(run.folder, kinds[0].replay.reader, vae, run.watch_minutes, journal.note, run.scorer)

    def every(trainer: Trainer) -> None:
        curriculum(kinds, trainer, feed)
        watch(trainer)

    if feed is not None:
        journal.note(Phrase("a first stock of designs after {seconds:.0f} s", seconds=feed.fill()))
    curriculum(kinds, trainer, feed)
    train(trainer, kinds, journal, run.seed, every)
    if run.slice_minutes and run.watch_minutes and trainer.rank == 0:
        watch.look(trainer)
