"""The embedded model edits: pictures as references, from Python and the shell, equal to diffusers' Edit-Plus.

What it draws is judged elsewhere; here it is that one release both draws and edits.
"""

from __future__ import annotations

import importlib
from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from lanting import Engine, Request, read_recipe
from lanting.cli.main import main
from lanting.core.errors import RequestError
from lanting.flow.loop import denoise
from lanting.weights.find import embedded_nano

HELLO = 'A blue sign that says "HELLO"'
RED = "make it red"


def pixels(image):
    return np.asarray(image, dtype=np.int16)


def sheets(count, size=(192, 192)):
    """Soft noise of several colours, so that every reference says something else."""
    return tuple(tiny.picture(*size, seed=i) for i in range(count))


@pytest.fixture(scope="module")
def edit_plus():
    """diffusers' pipeline over the embedded folder, told which tokens are pictures as in tests/parity."""
    return tiny.open_with_diffusers(embedded_nano(), "edit_plus").to(torch.float32)


@pytest.mark.parametrize(("count", "guidance"), [(1, 3.0), (2, 1.0)])
def test_diffusers_edits_the_same_from_the_same_folder(nano, edit_plus, monkeypatch, count, guidance):
    """Edit-Plus brings every reference to one area, nano leaves them as they are: the same for this square.
    diffusers takes a sample of the VAE's posterior and `patch_reference` makes it take the mode, as we do."""
    side, own, steps = 192, nano.spec.defaults, 3
    module = importlib.import_module("diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_plus")
    monkeypatch.setattr(module, "VAE_IMAGE_SIZE", side * side)
    monkeypatch.setattr(module, "CONDITION_IMAGE_SIZE", own.vl_area)
    tiny.patch_reference(monkeypatch)
    mine, reference = [], []

    def watched(*asked):
        for step in denoise(*asked):
            mine.append(step.latents)
            yield step

    def catch(pipe, index, timestep, values):
        reference.append(values["latents"])
        return {}

    monkeypatch.setattr("lanting.engine.drawing.denoise", watched)
    references = sheets(count, (side, side))
    asked = Request(RED, images=references, seed=7, steps=steps, guidance_scale=guidance, options={"keep": False})
    ours = nano.run(asked)
    theirs = edit_plus(
        image=list(references),
        prompt=RED,
        negative_prompt=own.negative_prompt if guidance > 1 else None,
        true_cfg_scale=guidance,
        width=side,
        height=side,
        num_inference_steps=steps,
        generator=torch.Generator().manual_seed(7),
        callback_on_step_end=catch,
    ).images[0]
    assert ours.recipes[0].task == "edit" and ours.images[0].size == theirs.size == (side, side)
    assert len(mine) == len(reference) == steps
    for a, b in zip(mine, reference, strict=True):
        assert (a - b).abs().max() <= 1e-5 * guidance * b.abs().max()  # which multiplies rounding too
    assert np.abs(pixels(ours.images[0]) - pixels(theirs)).max() <= 1


def test_every_reference_and_the_words_have_a_say(nano):
    one, two = sheets(2, (128, 64))
    asked = Request(RED, images=(one, two), seed=1, steps=2)
    others = (replace(asked, images=(one,)), replace(asked, images=(two, one)), replace(asked, prompt="make it green"))
    drawn = [nano.run(request).images[0] for request in (asked, asked, *others)]
    assert drawn[0].size == (128, 64)
    assert drawn[0].tobytes() == drawn[1].tobytes()
    assert len({image.tobytes() for image in drawn}) == 4


def test_the_reader_gets_its_vision_tower_at_the_first_edit_and_words_read_as_before():
    engine = Engine.open("nano", device="cpu")
    asked = Request(HELLO, seed=7, steps=2)
    before = engine.run(asked).images[0]
    varied = engine.run(Request(HELLO, images=sheets(1, (128, 64)), strength=0.5, seed=7, steps=2))
    assert varied.recipes[0].task == "image_to_image"
    assert not hasattr(engine.models.encoder.model, "visual")
    engine.run(Request(RED, images=sheets(1, (128, 64)), seed=7, steps=2))
    assert hasattr(engine.models.encoder.model, "visual")
    assert engine.run(asked).images[0].tobytes() == before.tobytes()


def test_a_masked_edit_keeps_what_is_outside(nano):
    source = nano.run(Request('a blue sign that says "OPEN"', seed=1)).images[0]
    mask = Image.new("L", source.size)
    mask.paste(255, (112, 0, *source.size))
    result = nano.run(Request(RED, images=(source, *sheets(1)), mask=mask, seed=2))
    assert result.recipes[0].task == "edit_inpaint" and result.images[0].size == source.size
    assert np.abs(pixels(result.images[0])[:, :96] - pixels(source)[:, :96]).mean() < 6


def test_more_pictures_than_it_knows_are_refused(nano):
    most = nano.spec.defaults.max_pictures
    with pytest.raises(RequestError, match=f"at most {most} pictures"):
        nano.run(Request(RED, images=sheets(most + 1)))


def test_the_shell_edits_with_nano(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for i, image in enumerate(sheets(2, (130, 62))):
        image.save(f"picture-{i}.png")
    assert main(["edit", "picture-0.png", RED, "--steps", "1", "--seed", "3", "-o", "one.png"]) == 0
    assert main(["edit", "picture-0.png", "picture-1.png", RED, "--steps", "1", "-o", "two.png"]) == 0
    assert Image.open("one.png").size == Image.open("two.png").size == (128, 64)
    recipe = read_recipe("one.png")
    assert (recipe.model, recipe.task) == ("nano", "edit")
    assert main(["replay", "one.png", "-o", "again.png"]) == 0
    assert "identical, pixel for pixel" in capsys.readouterr().out
