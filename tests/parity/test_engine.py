"""Whole folders on disk: the public Engine against diffusers' pipelines, from words and files to 8-bit pictures.

The recipes themselves are compared number by number in test_tasks.py; here everything else takes part: reading
configs and shards, the tokenizer, the reader with its pictures, settling, and the way to 8 bits. Diffusers takes a
sample of the VAE's posterior where we take its mode; `patch_reference` makes it take the mode.
"""

from __future__ import annotations

import sys
from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch

from lanting import Engine, Request
from lanting.core.errors import ModelError, RequestError
from lanting.specs.sizes import fit_area

AREA = 64 * 96  # input pictures are brought to this instead of a megapixel, here and there
ASKED = {"num_inference_steps": 3, "true_cfg_scale": 4.0, "negative_prompt": "blurry"}
WORDS = 'a red sign that says "HI"'


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Tiny folders by release, made once; the plain one is sharded."""
    root = tmp_path_factory.mktemp("models")
    made = {name: tiny.save_folder(root / name, name) for name in tiny.FLAGS if name != "qwen-image"}
    made["qwen-image"] = tiny.save_folder(root / "qwen-image", shard="100KB")
    assert len(list((made["qwen-image"] / "transformer").glob("*.safetensors"))) > 1
    return made


def open_engine(folder, **options):
    """The engine with small picture areas, as the patched reference has."""
    engine = Engine.open(str(folder), device="cpu", dtype="float32", **options)
    small = replace(engine.spec.defaults, vl_area=AREA, vae_area=AREA)
    engine.models.spec = replace(engine.spec, defaults=small)
    return engine


def seeded(count=1):
    generators = [torch.Generator().manual_seed(7 + i) for i in range(count)]
    return generators if count > 1 else generators[0]


def worst(ours, theirs):
    """The largest difference in grey levels; the pictures must have something on them."""
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert a.size == b.size and a.mode == b.mode
        assert np.asarray(a).std() > 10
    pairs = zip(ours, theirs, strict=True)
    return max(np.abs(np.asarray(a, np.int16) - np.asarray(b, np.int16)).max() for a, b in pairs)


def request(**values):
    common = {"prompt": WORDS, "negative_prompt": "blurry", "steps": 3, "guidance_scale": 4.0, "seed": 7}
    return Request(**{**common, **values})


def test_text_to_image_with_prompts_of_different_length(folders):
    prompts = (WORDS, "a much longer prompt, about a blue sign with white letters")
    ours = open_engine(folders["qwen-image"]).run(request(prompt=prompts, size=(112, 80)))
    pipe = tiny.open_with_diffusers(folders["qwen-image"], "text_to_image")
    asked = {**ASKED, "negative_prompt": ["blurry", "blurry"]}
    theirs = pipe(prompt=list(prompts), width=112, height=80, generator=seeded(2), **asked).images
    assert worst(ours.images, theirs) <= 1


def test_image_to_image(folders, monkeypatch):
    tiny.patch_reference(monkeypatch, AREA)
    source = tiny.picture(96, 64)
    ours = open_engine(folders["qwen-image"]).run(
        request(task="image_to_image", images=(source,), strength=0.7, size=(96, 64))
    )
    pipe = tiny.open_with_diffusers(folders["qwen-image"], "image_to_image")
    theirs = pipe(prompt=WORDS, image=source, strength=0.7, width=96, height=64, generator=seeded(), **ASKED).images
    assert worst(ours.images, theirs) <= 1


def test_inpaint(folders, monkeypatch):
    tiny.patch_reference(monkeypatch, AREA)
    source, mask = tiny.picture(96, 64), tiny.mask(96, 64, (30, 10, 80, 50))
    ours = open_engine(folders["qwen-image"]).run(request(images=(source,), mask=mask, strength=0.9, size=(96, 64)))
    pipe = tiny.open_with_diffusers(folders["qwen-image"], "inpaint")
    asked = {"image": source, "mask_image": mask, "strength": 0.9, "width": 96, "height": 64}
    theirs = pipe(prompt=WORDS, generator=seeded(), **asked, **ASKED).images
    assert worst(ours.images, theirs) <= 1


@pytest.mark.parametrize(
    ("release", "kind", "count"),
    [
        ("qwen-image-edit", "edit", 1),
        ("qwen-image-edit-2509", "edit_plus", 2),
        ("qwen-image-edit-2511", "edit_plus", 3),
    ],
)
def test_edit(folders, monkeypatch, release, kind, count):
    tiny.patch_reference(monkeypatch, AREA)
    pictures = [tiny.picture(96 + 32 * i, 64, seed=i) for i in range(count)]
    engine = open_engine(folders[release])
    assert engine.spec.name == release
    ours = engine.run(request(prompt="make it green", images=tuple(pictures)))
    pipe = tiny.open_with_diffusers(folders[release], kind)
    shown = pictures[0] if kind == "edit" else pictures
    theirs = pipe(image=shown, prompt="make it green", generator=seeded(), **ASKED).images
    assert worst(ours.images, theirs) <= 1


def test_edit_inpaint(folders, monkeypatch):
    tiny.patch_reference(monkeypatch, AREA)
    source, mask = tiny.picture(96, 64), tiny.mask(96, 64, (30, 10, 80, 50))
    ours = open_engine(folders["qwen-image-edit"]).run(request(images=(source,), mask=mask, strength=0.9))
    pipe = tiny.open_with_diffusers(folders["qwen-image-edit"], "edit_inpaint")
    theirs = pipe(image=source, mask_image=mask, prompt=WORDS, strength=0.9, generator=seeded(), **ASKED).images
    assert worst(ours.images, theirs) <= 1


def test_layered(folders, monkeypatch):
    resolution = 160
    tiny.patch_reference(monkeypatch, resolution**2)
    source = tiny.picture(96, 64, mode="RGBA")
    engine = open_engine(folders["qwen-image-layered"])
    small = lambda area, ratio: fit_area(resolution**2, ratio)  # noqa: E731
    monkeypatch.setattr(sys.modules["lanting.specs.settle"], "fit_area", small)
    ours = engine.run(request(images=(source,), options={"layers": 3}))
    pipe = tiny.open_with_diffusers(folders["qwen-image-layered"], "layered")
    asked = {"layers": 3, "resolution": 640, "cfg_normalize": engine.spec.renormalize}
    theirs = pipe(image=source, prompt=WORDS, generator=seeded(), **asked, **ASKED).images[0]
    assert [p.mode for p in ours.images] == ["RGBA"] * 3
    assert worst(ours.images, theirs) <= 1


def test_controlnet(folders, monkeypatch, tmp_path):
    tiny.patch_reference(monkeypatch, AREA)
    net = tiny.save_controlnet(tmp_path / "union")
    hint = tiny.picture(96, 64)
    engine = open_engine(folders["qwen-image"], controlnet=str(net))
    asked = {"control_scale": 0.8, "control_end": 0.7}
    ours = engine.run(request(task="controlnet", images=(hint,), size=(96, 64), options=asked))
    pipe = tiny.open_with_diffusers(folders["qwen-image"], "controlnet", controlnet=tiny.controlnet())
    theirs = pipe(
        prompt=WORDS,
        control_image=hint,
        width=96,
        height=64,
        controlnet_conditioning_scale=0.8,
        control_guidance_end=0.7,
        generator=seeded(),
        **ASKED,
    ).images
    assert worst(ours.images, theirs) <= 1


def test_a_second_model_file_set_of_other_weights_is_noticed(folders, tmp_path):
    """Recipes carry a hash of the weights: the same folder gives the same one, other weights another."""
    first = Engine.open(str(folders["qwen-image"])).models.fingerprint
    again = Engine.open(str(folders["qwen-image"])).models.fingerprint
    other = Engine.open(str(tiny.save_folder(tmp_path / "other", layers=1))).models.fingerprint
    assert first == again != other


@pytest.mark.parametrize("component", ["transformer", "vae", "text_encoder"])
def test_damage_is_one_sentence(folders, tmp_path, component):
    folder = tiny.save_folder(tmp_path / "damaged")
    victim = next((folder / component).glob("*.safetensors"))
    victim.write_bytes(victim.read_bytes()[: victim.stat().st_size // 2])
    with pytest.raises(ModelError) as caught:
        Engine.open(str(folder)).run(request(size=(32, 32)))
    assert "\n" not in str(caught.value) and victim.name in str(caught.value)


def test_layers_without_a_prompt_are_captioned(folders, monkeypatch):
    """The picture describes itself, and the recipe says with which words, so that a replay needs no second look."""
    small = lambda area, ratio: fit_area(96 * 64, ratio)  # noqa: E731
    monkeypatch.setattr(sys.modules["lanting.specs.settle"], "fit_area", small)
    engine = open_engine(folders["qwen-image-layered"])
    described = []
    monkeypatch.setattr(engine.models.encoder, "caption", lambda image: described.append(image.size) or "a caption")
    asked = {"images": (tiny.picture(960, 640, mode="RGBA"),), "options": {"layers": 1}}
    silent, told = (engine.run(request(prompt=words, **asked)) for words in ("", "a caption"))
    assert silent.recipes[0].request["prompt"] == "a caption"
    assert described == [(96, 64)], "as it is drawn, however large it is"
    assert silent.images[0].tobytes() == told.images[0].tobytes()


def test_components_may_have_their_own_dtype(folders):
    engine = Engine.open(str(folders["qwen-image"]), device="cpu", dtype="vae=float32,transformer=bf16")
    models = engine.models
    assert next(models.transformer.parameters()).dtype == torch.bfloat16
    assert next(models.codec.vae.parameters()).dtype == torch.float32
    result = engine.run(request(size=(64, 48)))
    said = result.recipes[0].versions["dtype"]
    assert "transformer=bfloat16" in said and "vae=float32" in said
    again = Engine.open(str(folders["qwen-image"]), device="cpu", dtype=said).run(request(size=(64, 48)))
    assert again.images[0].tobytes() == result.images[0].tobytes()


@pytest.mark.parametrize("dtype", ["float8", "vae=int4", "unet=float32", "", "vae="])
def test_unknown_dtypes_are_refused(folders, dtype):
    with pytest.raises(RequestError, match="dtype"):
        Engine.open(str(folders["qwen-image"]), device="cpu", dtype=dtype)


def test_only_very_large_pictures_are_tiled(folders, monkeypatch):
    engine = open_engine(folders["qwen-image"])
    monkeypatch.setattr("lanting.engine.engine.TILE_ABOVE", 64 * 64)
    engine.run(request(size=(64, 64), steps=1))
    assert engine.models.codec.tile is False
    engine.run(request(size=(64, 80), steps=1))
    assert engine.models.codec.tile is True
