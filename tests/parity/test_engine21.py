"""Qwen-Image-2.1 from whole folders on disk: the public Engine against diffusers' pipeline, words to 8-bit pictures."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import tiny
import tiny21
import torch

from lanting import Engine, Request

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
    asked = {**ASKED, **GUIDED, "negative_prompt": ["blurry", "blurry"]}
    theirs = pipe(list(prompts), generator=seeded(2), **asked).images
    assert worst(ours.images, theirs) <= 1


@pytest.mark.parametrize("count", [1, 3])
def test_edit(engine, pipe, count):
    pictures = [tiny.picture(96 + 32 * i, 64, "RGBA", seed=i) for i in range(count)]
    ours = engine.run(request(prompt="make it green", images=tuple(pictures), guidance_scale=4.0, negative_prompt=" "))
    asked = {**ASKED, **GUIDED, "negative_prompt": " "}
    theirs = pipe("make it green", image=pictures, generator=seeded(), **asked).images
    assert worst(ours.images, theirs) <= 1
