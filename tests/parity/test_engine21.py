"""Qwen-Image-2.1 from whole folders on disk: the public Engine against diffusers' pipeline, words to 8-bit pictures."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import tiny
import tiny21
import torch

from lanting import Engine, Request
from lanting.core.checkpoint import Checkpoint
from lanting.core.errors import RequestError
from lanting.nn.single_stream import QwenImage21Transformer
from lanting.tasks.pictures import pixels_of
from plans import plan

SIDE = 96  # of the square whose area pictures are brought to
ASKED = {"num_inference_steps": 3, "output_resolution": SIDE}
GUIDED = {"true_cfg_scale": 4.0, "negative_prompt": "blurry"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny21.save_folder(tmp_path_factory.mktemp("models") / "two-one", shard="100KB")


@pytest.fixture(scope="module")
def pipe(folder):
    return tiny21.open_with_diffusers(folder)


@pytest.fixture
def engine(folder):
    """With small picture areas, as the reference is told to have."""
    engine = Engine.open(str(folder), device="cpu", dtype="float32")
    small = replace(engine.spec.defaults, vl_area=SIDE**2, vae_area=SIDE**2, size=(SIDE, SIDE))
    engine.models.spec = replace(engine.spec, defaults=small)
    return engine


def seeded(count=1):
    generators = [torch.Generator().manual_seed(7 + i) for i in range(count)]
    return generators if count > 1 else generators[0]


def worst(ours, theirs):
    """The largest difference in grey levels; the pictures must have something on them."""
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert a.size == b.size and a.mode == b.mode == "RGBA"
        assert np.asarray(a).std() > 10
    pairs = zip(ours, theirs, strict=True)
    return max(np.abs(np.asarray(a, np.int16) - np.asarray(b, np.int16)).max() for a, b in pairs)


def request(**values):
    common = {"prompt": 'a red sign that says "HI"', "steps": 3, "seed": 7}
    return Request(**{**common, **values})


def test_the_release_is_known(engine):
    assert engine.spec.name == "qwen-image-2.1"
    assert any("licence" in note for note in engine.notes)


def test_text_to_image(engine, pipe):
    ours = engine.run(request(size=(128, 96)))
    theirs = pipe('a red sign that says "HI"', width=128, height=96, generator=seeded(), **ASKED).images
    assert worst(ours.images, theirs) <= 1


def test_guidance_and_prompts_of_different_length(engine, pipe):
    prompts = ("a sign", "a much longer prompt, about a blue sign with white letters")
    ours = engine.run(request(prompt=prompts, guidance_scale=4.0, negative_prompt="blurry"))
    alone = [{"prompt": one, "generator": seeded(2)[i]} for i, one in enumerate(prompts)]
    theirs = [pipe(**one, **ASKED, **GUIDED).images[0] for one in alone]  # in a batch its padding moves the pictures
    assert worst(ours.images, theirs) <= 1


@pytest.mark.parametrize("count", [1, 3])
def test_edit(engine, pipe, count):
    pictures = [tiny.picture(96 + 32 * i, 64, "RGBA", seed=i) for i in range(count)]
    ours = engine.run(request(prompt="make it green", images=tuple(pictures), guidance_scale=4.0, negative_prompt=" "))
    asked = {**ASKED, **GUIDED, "negative_prompt": " "}
    theirs = pipe("make it green", image=pictures, generator=seeded(), **asked).images
    assert worst(ours.images, theirs) <= 1


# ---------------------------------------------------------------- what diffusers has nothing beside
@pytest.fixture
def prefixes(monkeypatch):
    """How many rows of prefixes were computed."""
    counted, whole = [], QwenImage21Transformer.prefix
    monkeypatch.setattr(
        QwenImage21Transformer, "prefix", lambda self, words, *x: counted.append(len(words)) or whole(self, words, *x)
    )
    return counted


def pixels(result):
    return np.asarray(result.images[0], np.int16)


def reopened(folder, **options):
    engine = Engine.open(str(folder), device="cpu", dtype="float32", **options)
    small = replace(engine.spec.defaults, vl_area=SIDE**2, vae_area=SIDE**2, size=(SIDE, SIDE))
    engine.models.spec = replace(engine.spec, defaults=small)
    return engine


EDIT = {"prompt": "make it green", "images": (tiny.picture(96, 64, seed=1),), "guidance_scale": 3.0}


def test_words_and_references_are_read_once_a_drawing(engine, folder, prefixes):
    kept = engine.run(request(**EDIT))
    assert prefixes == [1, 1]  # one for each side of the guidance, in three steps
    assert engine.models.transformer.prefixes is None  # and let go
    joined = engine.run(request(**EDIT, options={"batched_guidance": True}))
    assert prefixes[2:] == [2]
    assert np.abs(pixels(joined) - pixels(kept)).max() <= 1
    again = reopened(folder, plan=plan(prefix_kept=False)).run(request(**EDIT))
    assert prefixes[3:] == [1] * 6
    assert np.array_equal(pixels(again), pixels(kept))


@pytest.mark.parametrize("home", ["disk", "ram"])
def test_streamed_from_disk_it_draws_the_same(engine, folder, home):
    passing = reopened(folder, plan=plan(resident_blocks=1, streamed=home, encoder="unload"))
    assert np.array_equal(pixels(passing.run(request(**EDIT))), pixels(engine.run(request(**EDIT))))


def test_an_interrupted_drawing_goes_on(engine):
    asked = request(**EDIT)
    events = list(engine.stream_resumable(asked, every=1))
    marks = [event for event in events if isinstance(event, Checkpoint)]
    ended = list(engine.stream_resumable(asked, resume=marks[0]))[-1]
    assert np.array_equal(pixels(ended), pixels(events[-1]))


def test_the_dial_leaves_something_out_and_replays(engine):
    asked = replace(request(**EDIT, quality="fast"), steps=8)
    drawn = engine.run(asked)
    steps = drawn.recipes[0].request["choices"]["steps"].split()
    assert len(steps) == 8 and set(steps) != {"FF"}
    again = engine.run(replace(asked, choices=drawn.recipes[0].request["choices"]))
    assert np.array_equal(pixels(again), pixels(drawn))
    exact = engine.run(replace(asked, quality=None))
    assert 0 < np.abs(pixels(drawn) - pixels(exact)).mean() < 8


def test_a_step_that_breaks_is_rescued(engine):
    """A block of the first step gives NaN once: keys and values that it spoilt are not kept."""
    asked = request(**EDIT)
    sound, block, broken = engine.run(asked), engine.models.transformer.transformer_blocks[0], []

    def spoil(module, args, out):
        if broken:
            return None
        broken.append(True)
        return out[0] * float("nan"), out[1] * float("nan")

    with block.register_forward_hook(spoil):
        rescued = engine.run(asked)
    assert broken and np.array_equal(pixels(rescued), pixels(sound))


@pytest.mark.parametrize("task", ["inpaint", "edit_inpaint"])
def test_what_a_mask_leaves_alone_stays(engine, monkeypatch, task):
    source, mask, codec = tiny.picture(128, 64, seed=2), tiny.mask(128, 64, (32, 0, 64, 64)), engine.models.codec
    seen, decode = [], codec.decode
    monkeypatch.setattr(codec, "decode", lambda tokens, grid: seen.append((tokens, grid)) or decode(tokens, grid))
    drawn = engine.run(request(task=task, images=(source,), mask=mask, strength=0.9)).images[0]
    tokens, grid = seen[0]
    known = codec.encode(pixels_of(source, drawn.size, 4)).data
    differs = (tokens - known).abs().amax(-1).unflatten(1, grid[1:])[0]  # (rows, columns)
    assert drawn.size == (128, 64) and grid == (1, 4, 8)
    assert differs[:, :2].max() < 1e-5 < 0.1 < differs[:, 2:4].min()
    assert differs[:, 4:].max() < 1e-5


def test_a_variation_starts_at_the_picture(engine):
    source = tiny.picture(96, 64, seed=2)
    near, far = (engine.run(request(task="image_to_image", images=(source,), strength=s)) for s in (0.3, 0.9))
    assert near.images[0].size == (96, 64) and not np.array_equal(pixels(near), pixels(far))


def test_turbo_takes_the_levels_its_folder_brings(tmp_path):
    levels = [1.0, 0.8, 0.5, 0.2]
    folder = tiny21.save_folder(tmp_path / "few", levels)
    engine = reopened(folder)
    assert (engine.spec.name, engine.spec.defaults.steps) == ("qwen-image-2.1-turbo", 8)
    theirs = tiny21.open_with_diffusers(folder)("a sign", generator=seeded(), **ASKED).images
    assert worst(engine.run(request(prompt="a sign", steps=4)).images, theirs) <= 1
    assert len(engine.models.schedule.sigmas(3, 36)) == 4  # another number of steps: the usual line


@pytest.mark.parametrize("kind", ["int8", "int4", "fp8"])
def test_packed_while_it_is_loaded(engine, folder, kind):
    plain, drawn = engine.run(request()), reopened(folder, quant=kind).run(request())
    assert 0 < np.abs(pixels(drawn) - pixels(plain)).mean() < 4


def test_what_it_can_not_draw_is_a_sentence(engine):
    with pytest.raises(RequestError, match=r"multiples of 32\. Nearest: 128×96"):
        engine.run(request(size=(112, 96)))
    with pytest.raises(RequestError, match="at most 10 pictures"):
        engine.run(request(images=(tiny.picture(64, 64),) * 11))
