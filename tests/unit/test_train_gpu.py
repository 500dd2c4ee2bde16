"""What only a GPU needs, tested without one: the same numbers as on a CPU, and nothing that would make it wait."""

from __future__ import annotations

import contextlib
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.overrides import TorchFunctionMode

from lanting.core.errors import ModelError, RequestError
from lanting.nn.qwen_language import initialize
from lanting.nn.qwen_vision import QwenVision
from lanting.train.atlas import default_atlas
from lanting.train.course import Budget
from lanting.train.design import SQUARE, STRIP, WIDE
from lanting.train.draw import paint
from lanting.train.feed import ROUND, FeedOrder, lengthened
from lanting.train.loop import Trainer
from lanting.train.model import PlainAttend, PlainCausalAttend, matrices, vision_config
from lanting.train.optim import Muon
from lanting.train.pieces import PaintedScraps, ScrapOrder, cut
from lanting.train.presets import KINDS, Preset, kinds, on_gpu, pick_device, preset, processes, room
from lanting.train.replay import Reader, encode_pictures, patches_of
from lanting.train.ring import Ring, picture_cells
from lanting.train.sight import TogetherVision, patches_together
from lanting.train.speed import compiled_block, prepare_for_gpu
from lanting.train.twin import twin_of
from lanting.train.workers import kept_atlas
from training import small_net, small_tokenizer, small_vae

SMALL = tuple(replace(kind, batch=4, fresh=2) for kind in KINDS)


@pytest.fixture(scope="module")
def order(tmp_path_factory) -> FeedOrder:
    folder = tmp_path_factory.mktemp("feed")
    small_tokenizer().save(str(folder / "tokenizer.json"))
    kept_atlas(folder / "atlas.npz")
    return FeedOrder(SMALL, str(folder / "tokenizer.json"), str(folder / "atlas.npz"), seed=1, workers=1, chunk=6)


def filled(order: FeedOrder, number: int, device: str = "cpu", capacity: int = 9) -> tuple[Ring, list]:
    """A ring of one kind with two chunks, of which the first lost some of its places to the second."""
    kind = order.kinds[number]
    reader = Reader(small_tokenizer(), "edit-plus" if kind.pictures else "text-to-image")
    ring = Ring(kind, reader, small_vae().to(device), default_atlas().to(device), None, capacity)  # type: ignore[arg-type]
    maker = order.maker(0)
    chunks = [maker.chunk(number) for _ in range(2)]
    for chunk in chunks:
        ring.put(chunk)
    return ring, chunks


def test_equal_pictures_are_seen_together_as_one_by_one():
    torch.manual_seed(0)
    visual = QwenVision(vision_config())
    initialize(visual, std=0.05)
    for size in (WIDE, SQUARE):
        grid = picture_cells(size)[1]
        patches = torch.randn(3 * grid[0] * grid[1], 1176)
        assert torch.allclose(visual(patches, [grid] * 3), TogetherVision(visual)(patches, [grid] * 3), atol=1e-5)
    with pytest.raises(ValueError, match="one shape"):
        TogetherVision(visual)(patches, [grid, (2, 4)])


@pytest.mark.parametrize("size", [WIDE, SQUARE, STRIP])
def test_references_are_resized_on_the_device_as_pillow_does(size):
    noise = torch.randint(0, 256, (2, size[1], size[0], 3), dtype=torch.uint8)
    flat = np.array(Image.fromarray(noise[0].numpy()).resize((14, 6)).resize(size, Image.Resampling.NEAREST))
    pictures = torch.cat([noise[:1], torch.from_numpy(flat)[None]])
    ours = patches_together(pictures, *picture_cells(size)).float()
    theirs = torch.stack([patches_of(p.numpy()) for p in pictures]).float()
    step = 1 / 255 / 0.26  # one grey level, normalised
    assert (ours - theirs).abs().max() < 2.1 * step and (ours - theirs).abs().mean() < 0.01 * step


@pytest.mark.parametrize("number", [1, 4], ids=["designs", "edits of two pictures"])
def test_a_ring_gives_back_what_was_put_in(order, number):
    ring, chunks = filled(order, number)
    assert ring.filled == 9 and ring.next == 3 and len(ring.items) == 9
    chunk, pictures = chunks[1], ring.kind.pictures  # its last three begin the ring anew
    pixels = paint(chunk.plan, ring.atlas)
    latents = encode_pictures(ring.vae, pixels).unflatten(0, (1 + pictures, 6))
    assert torch.allclose(ring.latents[6].float(), latents[:, 0].flatten(0, 1), atol=0.01)
    assert torch.allclose(ring.latents[0].float(), latents[:, 3].flatten(0, 1), atol=0.01)
    for slot, row in ((6, 0), (0, 3)):
        length = int(chunk.lengths[row])
        assert ring.lengths[slot] == length
        assert ring.ids[slot, :length].tolist() == chunk.ids[row, :length].tolist()
        spots = chunk.spots[chunk.spots[:, 0] == row]
        for _, token, *spot in spots.tolist():
            assert ring.where[slot, token].tolist() == spot
        assert int((ring.where[slot, :, 0] >= 0).sum()) == len({s[1] for s in spots.tolist()})
        assert ring.what[slot].tolist() == chunk.what[row].tolist()
    if ring.seen is not None:
        expected = patches_together(pixels[6:], ring.first, ring.patch_grid).unflatten(0, (2, 6))
        assert torch.equal(ring.seen[6], expected[:, 0])


def test_a_batch_of_a_ring_trains_like_one_of_the_replay(order, tmp_path):
    ring, _ = filled(order, 4)
    batch = ring.draw(4, random.Random(1), silence=0.0)
    assert batch.mask is None and batch.positions is not None and batch.patches is not None
    assert batch.positions.shape == (3, *batch.ids.shape) and batch.patches.shape[:2] == (4, 2)
    assert len({int(length) for length in (batch.ids != ring.pad).sum(1)}) == 1
    quiet = ring.draw(4, random.Random(1), silence=1.0)
    assert quiet.ids[0].tolist() == ring.silent_ids and (quiet.what == -1).all() and (quiet.where == -1).all()
    trainer = Trainer(small_net(), Budget(), tmp_path)
    generator = torch.Generator().manual_seed(0)
    for each in (batch, quiet):
        total, report = trainer.loss(each, ring.reader.prefix, *trainer.noised(each, generator))
        assert torch.isfinite(total) and set(report) == {
            *("loss", "read", "placed", "shown", "ink", "shape", "scene", "named")
        }


class NoWaiting(TorchFunctionMode):
    """Refuses what makes a GPU wait though no value is asked for: a list as an index, tensors made of numbers."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        if name in ("__getitem__", "__setitem__"):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            assert not any(isinstance(part, list) for part in index), "a list as an index"
        assert name not in ("tensor", "as_tensor", "item", "tolist", "nonzero", "masked_scatter", "masked_select"), name
        if name == "where":
            assert all(isinstance(part, torch.Tensor) for part in args[1:]), "numbers in where"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("copied", [False, True], ids=["itself", "copy"])
@pytest.mark.parametrize("number", [1, 3], ids=["designs", "edits"])
def test_a_step_on_a_device_never_waits_for_a_number(order, number, copied, monkeypatch, tmp_path):
    """On the meta device every tensor from elsewhere and every question for a value is an error."""
    monkeypatch.setattr("torch.autocast", lambda *_, **__: contextlib.nullcontext())
    ring, _ = filled(order, number, "meta")
    trainer = Trainer(small_net(), Budget(), tmp_path)
    trainer.device = torch.device("meta")
    trainer.shapes, trainer.pictures = trainer.shapes.to("meta"), trainer.pictures.to("meta")
    trainer.net = prepare_for_gpu(small_net()).to("meta")
    trainer.fast = twin_of(small_net().to("meta")) if copied else trainer.net
    trainer.average = {k: v.clone() for k, v in trainer.net.state_dict().items()}
    update, refusing = Muon(matrices(trainer.fast)[0]), contextlib.nullcontext()
    for _ in range(2):  # the first time, tables are made that are kept
        with refusing:
            batch = ring.draw(4, random.Random(0), silence=0.0)
            total, report = trainer.loss(batch, ring.reader.prefix, *trainer.noised(batch, None))
            total.backward()
            torch.nn.utils.clip_grad_norm_(trainer.fast.parameters(), 1.0)
            update.step()
            trainer.follow()
        refusing = NoWaiting()
    assert all(value.device.type == "meta" for value in report.values())
    assert all(p.grad is None or p.grad.device.type == "meta" for p in trainer.fast.parameters())


def test_the_network_for_a_gpu_computes_the_same(order):
    ring, _ = filled(order, 3)
    batch = ring.draw(4, random.Random(2), silence=0.0)
    prefix, noisy, times = torch.tensor([ring.reader.prefix]), torch.randn(4, ring.tokens, 64), torch.rand(4)
    plain, fast = small_net(), prepare_for_gpu(small_net())
    assert not any(isinstance(m, PlainAttend | PlainCausalAttend) for m in fast.modules())
    assert set(plain.state_dict()) == set(fast.state_dict())
    for net in (plain, fast):  # the output layer begins at zero
        torch.manual_seed(1)
        torch.nn.init.normal_(net.transformer.proj_out.weight, std=0.1)
    with torch.no_grad():
        first, second = (net(noisy, times, prefix, batch)[0] for net in (plain, fast))
    assert first.abs().max() > 0.01 and torch.allclose(first, second, atol=1e-4)


def test_all_blocks_are_compiled_as_one(monkeypatch):
    seen = []
    monkeypatch.setattr("torch.compile", lambda function, **_: lambda *given: seen.append(given) or function(*given))
    run = compiled_block(lambda block, img, txt, ctx: (img + txt.sum(), txt))
    img, txt = torch.ones(2, 3), torch.ones(2, 3)
    assert run(torch.nn.Identity(), img[:, :2], txt, None)[0].sum() == 28  # type: ignore[arg-type]
    assert not seen[0][1]._is_view() and seen[0][2] is txt


def test_where_compiling_fails_the_blocks_run_as_they_are(monkeypatch, capsys):
    def broken(*_, **__):
        def fail(*_):
            raise RuntimeError("no compiler\nand more")

        return fail

    monkeypatch.setattr("torch.compile", broken)
    run = compiled_block(lambda block, img, txt, ctx: (img + 1, txt))
    for _ in range(2):
        assert run(torch.nn.Identity(), torch.zeros(1), torch.zeros(1), None)[0].item() == 1  # type: ignore[arg-type]
    assert capsys.readouterr().err.count("not compiled") == 1


def test_workers_begin_with_every_kind(order):
    makers = [replace(order, workers=2, chunk=512).maker(n) for n in range(2)]
    assert sorted(maker.choose() for maker in makers for _ in range(3)) == list(range(6))
    often = [makers[0].choose() for _ in range(300)]
    assert often.count(3) > often.count(1) > often.count(4)  # edits, wide, edits with two pictures


def test_more_characters_come_into_use(order):
    maker = order.maker(3)
    maker.make(800)
    assert maker.designs.mix.hanzi == maker.edits.designs.mix.hanzi == 800
    maker.make(3500)
    assert maker.designs.mix.hanzi == 3500


def test_pieces_are_cut_where_something_is_written(order):
    maker = ScrapOrder(order.atlas, seed=3, edge=48, sheet=5).maker(0)
    made, others = maker.make(3500)
    assert others.shape[1:] == (48, 48, 3)
    torch.manual_seed(0)
    sheet = paint(made, default_atlas())
    pieces = cut(sheet, 48)
    assert pieces.shape == (25, 48, 48, 3) and pieces.dtype == torch.uint8
    spread = pieces.flatten(1, 2).int().amax(1) - pieces.flatten(1, 2).int().amin(1)
    assert int((spread.amax(-1) > 60).sum()) >= 18


def test_crops_and_canvases_for_the_autoencoder(order):
    class Here:
        """Workers without processes."""

        def __init__(self):
            self.maker = ScrapOrder(order.atlas, seed=4, edge=32, sheet=4).maker(0)

        def wait(self):
            return self.maker.make(3500)

        take = wait

    scraps = PaintedScraps(Here(), default_atlas(), 32, random.Random(0), kept=40)  # type: ignore[arg-type]
    crops = scraps.crops(8, 32)
    assert crops.shape == (8, 3, 32, 32) and -1 <= float(crops.min()) < float(crops.max()) <= 1
    assert scraps.filled >= 32 and scraps.canvases(2).shape[0] == 2


def test_presets_use_what_a_device_has():
    assert preset("cpu", 2) == Preset() and kinds(Preset()) == KINDS
    large, small = on_gpu(79, 16), on_gpu(8, 4)
    assert large.times > 4 * small.times >= 4 and large.feeders == 14 and small.feeders == 2
    assert on_gpu(24, 8, 256 * 12).times < on_gpu(24, 8).times / 2
    chosen = kinds(large, large=True)
    assert sum(kind.share for kind in chosen) == pytest.approx(1) and chosen[-1].size == (256, 256)
    assert all(k.batch == o.batch * large.times for k, o in zip(chosen, KINDS, strict=False))
    assert all(room(kind, large) > 512 for kind in chosen)
    assert large.budget(9).picks == 3 and large.budget(9).minutes == 9


def test_a_device_that_is_not_there_is_a_sentence(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert pick_device("auto") == "cpu"
    for asked in ("cuda", "tpu"):
        with pytest.raises(RequestError):
            pick_device(asked)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert processes("cuda", 0) == 2
    with pytest.raises(RequestError):
        processes("cuda", 3)


def test_an_atlas_travels_in_a_file(order, tmp_path):
    assert kept_atlas(tmp_path / "new" / "atlas.npz").names == default_atlas().names
    default_atlas().save(tmp_path / "other.npz", "someone's")
    with pytest.raises(ModelError):
        kept_atlas(tmp_path / "other.npz")


def test_prompts_are_lengthened_by_spaces_at_their_end(order):
    reader = Reader(small_tokenizer())
    for prompt in ('A blue sign that says "HI"', "一张海报", " "):
        ((ids, starts),) = reader.read([prompt])
        longer = lengthened(ids, starts, len(prompt), reader.tokenizer.encode(" ", add_special_tokens=False).ids[0])
        assert len(longer) % ROUND == 0 and 0 <= len(longer) - len(ids) < ROUND
        assert longer == reader.read([prompt + " " * (len(longer) - len(ids))])[0][0]
    assert all(length % ROUND == 0 for number in (1, 3) for length in order.maker(0).chunk(number).lengths)
