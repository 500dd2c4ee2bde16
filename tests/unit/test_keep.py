"""Edits that keep the picture: its own pixels where nothing changed, the drawn ones where something did."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lanting import Engine, Request, RequestError
from lanting.specs import settle
from lanting.specs.model_spec import get_spec
from lanting.tasks.keep import NOISE, blended, changed


def picture(seed: int, height: int = 48, width: int = 80) -> torch.Tensor:
    return torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def noise(size: float, seed: int = 9) -> torch.Tensor:
    return torch.randn(1, 3, 48, 80, generator=torch.Generator().manual_seed(seed)) * size


def test_what_differs_by_noise_alone_is_the_pictures_own():
    own, redrawn = picture(1), picture(2)
    assert torch.equal(blended(own, redrawn + noise(0.5 * NOISE), redrawn), own)


def test_what_changed_is_drawn_and_the_rest_is_not():
    own, redrawn = picture(1), picture(2)
    drawn = redrawn + noise(0.5 * NOISE)
    drawn[:, :, 16:32, 32:64] = 1.0
    kept = blended(own, drawn, redrawn)
    assert torch.equal(kept[:, :, 16:32, 32:64], drawn[:, :, 16:32, 32:64])
    assert torch.equal(kept[:, :, :, :16], own[:, :, :, :16]) and torch.equal(kept[:, :, 44:], own[:, :, 44:])
    between = changed(drawn, redrawn)
    assert 0 < float(between[(between > 0) & (between < 1)].mean()) < 1  # a soft edge


def test_a_picture_that_is_another_everywhere_stays_as_it_is_drawn():
    own, redrawn = picture(1), picture(2)
    assert torch.equal(blended(own, picture(3), redrawn), picture(3))


def test_faint_changes_of_an_area_count_and_single_pixels_of_noise_do_not():
    redrawn = torch.zeros(1, 3, 48, 80)
    faint = redrawn.clone()
    faint[:, :, :24] += 1.5 * NOISE
    assert changed(faint, redrawn)[:, :, :20].min() == 1 and changed(faint, redrawn)[:, :, 36:].max() == 0
    speck = redrawn.clone()
    speck[0, :, 20, 40] = 4 * NOISE
    assert changed(speck, redrawn).max() == 0


@pytest.mark.parametrize("size", [(16, 16), (33, 47)])
def test_any_size(size):
    one = picture(1, *size)
    assert changed(one, one).shape == (1, 1, *size) and torch.equal(blended(one, one, one), one)


def test_nano_keeps_and_others_do_when_asked(cat_picture):
    asked = Request("make it red", images=(cat_picture,))
    assert settle(asked, get_spec("nano")).options == {"keep": True}
    assert settle(asked, get_spec("qwen-image-edit-2511")).options == {}
    wished = Request("make it red", images=(cat_picture,), options={"keep": True})
    assert settle(wished, get_spec("qwen-image-edit-2511")).options == {"keep": True}
    with pytest.raises(RequestError, match="keep must be true or false, not 3"):
        settle(Request("x", images=(cat_picture,), options={"keep": 3}), get_spec("nano"))
    with pytest.raises(RequestError, match="text_to_image knows no option keep"):
        settle(Request("x", options={"keep": True}), get_spec("nano"))


@pytest.fixture
def cat_picture():
    from PIL import Image

    return Image.new("RGB", (128, 64), "white")


def test_an_edit_by_nano():
    """Letters of another colour: the ground beside them is the picture's own, the letters are those drawn alone."""
    engine = Engine.open("nano", device="cpu")
    source = engine.run(Request('a red sign with white text "TEA"', size=(128, 64), seed=7)).images[0]
    asked = Request("make the text yellow", images=(source,), seed=3)
    kept = np.asarray(engine.run(asked).images[0]).astype(int)
    alone = Request("make the text yellow", images=(source,), seed=3, options={"keep": False})
    drawn, own = (np.asarray(one).astype(int) for one in (engine.run(alone).images[0], source))
    same = (kept == own).all(-1)
    assert (drawn == own).all(-1).mean() + 0.1 < same.mean() < 0.95
    assert (kept == drawn).all(-1)[~same].mean() > 0.6  # the others lie on the soft edge
    assert np.array_equal(kept, np.asarray(engine.run(asked).images[0]))
