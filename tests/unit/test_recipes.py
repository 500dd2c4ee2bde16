"""Recipes and pictures on a fake studio: sizes, order, colour modes, masks, boxes, and sentences for people."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from lanting.core import TASK_NAMES, ModelError, Request, RequestError
from lanting.flow.latents import LatentCodec
from lanting.flow.loop import Conditioning, denoise
from lanting.flow.schedule import Schedule
from lanting.nn.mmdit import through
from lanting.specs import ModelSpec, get_spec, settle
from lanting.tasks import TASKS
from lanting.tasks.controlnet import active_span, per_hint, spread
from lanting.tasks.pictures import (
    box_around,
    contain,
    cover,
    mask_of,
    paste_back,
    pictures_from,
    pixels_of,
    to_mode,
)
from lanting.tasks.studio import Guide


class BlockVAE(nn.Module):
    """16 latent channels, of which the first three or four are the mean colour of 8 x 8 pixels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.dummy, self.channels = nn.Parameter(torch.zeros(1)), channels

    def encode(self, pixels, *, tile=False):
        assert pixels.shape[1] == self.channels
        mean = nn.functional.pad(nn.functional.avg_pool2d(pixels, 8), (0, 0, 0, 0, 0, 16 - self.channels))
        return mean, mean

    def decode(self, latents, *, tile=False):
        return nn.functional.interpolate(latents[:, : self.channels], scale_factor=8)


@dataclass
class FakeStudio:
    release: ModelSpec
    channels: int = 3
    guides: Sequence[Guide] = ()
    blocks: int = 60
    schedule: Schedule = field(default_factory=Schedule)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32
    asked: list = field(default_factory=list)

    def __post_init__(self) -> None:
        self.codec = LatentCodec(BlockVAE(self.channels), [0.0] * 16, [1.0] * 16, pixel_channels=self.channels)

    def encode_prompt(self, prompts, images=()) -> Conditioning:
        self.asked.append((tuple(prompts), tuple(image.size for image in images)))
        rows = [[float(len(prompt))] for prompt in prompts]
        return Conditioning(torch.tensor(rows)[:, None])  # (P, 1, 1)

    def generator(self, seed, index) -> torch.Generator:
        return torch.Generator().manual_seed(seed + index)


def stay(latents, timestep, prompt_embeds, prompt_mask, grids, target_tokens, **rest):
    """A model that predicts no change."""
    return torch.zeros_like(latents)


def to_zero(latents, timestep, *rest, **more):
    """A model whose velocity leads every latent to 0, mid-grey, along a straight line."""
    return latents / timestep[:, None, None]


def studio(release="qwen-image", area=64 * 64, **rest) -> FakeStudio:
    spec = get_spec(release)
    return FakeStudio(replace(spec, defaults=replace(spec.defaults, vae_area=area, vl_area=area // 4)), **rest)


def wish(task, **rest) -> Request:
    given = {"prompt": "a cat", "size": (64, 48), "steps": 3, "guidance_scale": 1.0, "seed": 7, **rest}
    return Request(task=task, **given)


def finished(desk, request, model=stay):
    canvas = TASKS[request.task](desk, request)
    *_, last = denoise(model, canvas)
    return list(canvas.finish(last.latents))


def grey(width=64, height=48, level=128, mode="RGB"):
    return Image.new(mode, (width, height), level if mode == "L" else (level,) * len(mode))


def ramp(width=64, height=48):
    x = np.linspace(0, 255, width)[None].repeat(height, 0)
    return Image.fromarray(np.stack([x, x[:, ::-1], x * 0 + 90], -1).astype(np.uint8))


def hole(width, height, box):
    sheet = Image.new("L", (width, height))
    sheet.paste(255, box)
    return sheet


# ---------------------------------------------------------------- the table
def test_every_task_has_a_recipe():
    assert tuple(TASKS) == TASK_NAMES


def test_batches_run_over_prompts_then_count_with_one_seed_each():
    desk = studio()
    canvas = TASKS["text_to_image"](desk, wish("text_to_image", prompt=("aa", "bbbb"), count=2))
    assert canvas.positive.embeds.flatten().tolist() == [2, 2, 4, 4] and canvas.negative is None
    for i in range(4):
        alone = TASKS["text_to_image"](desk, wish("text_to_image", seed=7 + i))
        assert torch.equal(canvas.start[i : i + 1], alone.start)


def test_guidance_encodes_the_negative_prompt_once():
    desk = studio()
    asked = wish("text_to_image", prompt=("aa", "bbbb"), guidance_scale=4.0, negative_prompt="ugly")
    canvas = TASKS["text_to_image"](desk, asked)
    assert desk.asked == [(("aa", "bbbb"), ()), (("ugly",), ())]
    assert canvas.negative is not None and canvas.negative.embeds.flatten().tolist() == [4, 4]


def test_a_settled_request_of_every_release_is_understood():
    for release, task in (("qwen-image", "inpaint"), ("qwen-image-edit-2511", "edit"), ("nano", "text_to_image")):
        images = () if task == "text_to_image" else (ramp(),)
        mask = hole(64, 48, (8, 8, 40, 40)) if task == "inpaint" else None
        spec = get_spec(release)
        spec = replace(spec, defaults=replace(spec.defaults, vae_area=64 * 64, size=(64, 48)))
        asked = settle(Request(prompt="a cat", images=images, mask=mask, steps=2), spec)
        assert asked.task == task and finished(FakeStudio(spec), asked)[0].size == asked.size


# ---------------------------------------------------------------- from a picture
def test_image_to_image_begins_part_of_the_way_down():
    canvas = TASKS["image_to_image"](studio(), wish("image_to_image", images=(grey(),), steps=10, strength=0.3))
    assert canvas.steps == 3
    noise = TASKS["text_to_image"](studio(), wish("text_to_image")).start
    known = pixels_of(grey(), (64, 48))[0, 0, 0, 0] * torch.ones(1)
    first = canvas.start.unflatten(2, (16, 4))[:, :, 0] - canvas.sigmas[0] * noise.unflatten(2, (16, 4))[:, :, 0]
    assert torch.allclose(first, ((1 - canvas.sigmas[0]) * known).expand_as(first), atol=1e-6)


def test_inpaint_gives_back_what_the_mask_keeps():
    source, mask = ramp(), hole(64, 48, (16, 8, 48, 40))
    picture = finished(studio(), wish("inpaint", images=(source,), mask=mask, strength=1.0), to_zero)[0]
    blocks = pictures_from(
        nn.functional.interpolate(nn.functional.avg_pool2d(pixels_of(source, (64, 48)), 8), scale_factor=8)
    )
    drawn, known = np.asarray(picture).astype(int), np.asarray(blocks[0]).astype(int)
    kept = np.asarray(mask) == 0
    assert abs(drawn - known)[kept].max() <= 1
    assert abs(drawn - 128)[~kept].max() <= 1


@pytest.mark.parametrize("task", ["inpaint", "edit_inpaint"])
def test_a_cut_out_comes_back_at_its_place_and_size(task):
    source, mask = ramp(200, 150), hole(200, 150, (100, 60, 130, 90))
    asked = wish(task, images=(source,), mask=mask, strength=1.0, options={"padding_mask_crop": 10})
    picture = finished(studio("qwen-image-edit" if task == "edit_inpaint" else "qwen-image"), asked, to_zero)[0]
    assert picture.size == (200, 150)
    drawn, kept = np.asarray(picture).astype(int), np.asarray(mask) == 0
    assert (drawn[kept] == np.asarray(source)[kept]).all()
    assert abs(drawn[68:82, 108:122] - 128).max() <= 2  # the edge shares 8 x 8 blocks with what is kept


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "1", "CMYK", "I;16", "I"])
def test_any_mode_of_picture_can_be_read(mode):
    source = {
        "I;16": lambda: Image.fromarray(np.full((48, 64), 128 * 257, np.uint16)),
        "I": lambda: Image.fromarray(np.full((48, 64), 128 * 257, np.int32)),
    }.get(mode, lambda: grey().convert(mode))()
    picture = finished(studio(), wish("image_to_image", images=(source,), strength=0.5), stay)
    assert picture[0].mode == "RGB" and to_mode(source).mode == "RGB"
    if mode not in ("1", "P", "CMYK"):  # those are dithered or inverted
        assert abs(np.asarray(to_mode(source)).astype(int) - 128).max() <= 1


def test_transparent_pictures_show_white():
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert to_mode(clear).getpixel((0, 0)) == (255, 255, 255)
    assert to_mode(clear, 4).getpixel((0, 0)) == (255, 0, 0, 0)


# ---------------------------------------------------------------- editing
def test_edit_shows_small_copies_to_the_reader_and_large_ones_to_the_vae():
    desk = studio("qwen-image-edit-2509")
    canvas = TASKS["edit"](desk, wish("edit", images=(ramp(120, 60), grey(50, 50)), guidance_scale=4.0))
    assert desk.asked == [(("a cat",), ((32, 32), (32, 32))), ((" ",), ((32, 32), (32, 32)))]
    assert [r.grid for r in canvas.references] == [(1, 2, 6), (1, 4, 4)]
    assert canvas.grids == ((1, 3, 4),)


def test_a_release_without_a_vae_area_shows_the_vae_pictures_as_they_are():
    desk = studio("nano", area=0)
    canvas = TASKS["edit"](desk, wish("edit", images=(grey(128, 64), grey(60, 50), grey(1024, 1024))))
    assert [r.grid for r in canvas.references] == [(1, 4, 8), (1, 3, 4), (1, 16, 16)]


def test_edit_inpaint_looks_at_the_picture_it_keeps_and_at_the_others():
    desk = studio("qwen-image-edit-2509")
    mask = hole(64, 48, (16, 8, 48, 40))
    canvas = TASKS["edit_inpaint"](desk, wish("edit_inpaint", images=(ramp(), grey(50, 50)), mask=mask, strength=0.5))
    assert [r.grid for r in canvas.references] == [(1, 3, 4), (1, 4, 4)] and canvas.keep is not None


# ---------------------------------------------------------------- layers
def test_layers_leave_out_the_composite_and_come_lowest_first():
    desk = studio("qwen-image-layered", channels=4)
    asked = wish("layered", images=(ramp(),), count=2, options={"layers": 3})
    canvas = TASKS["layered"](desk, asked)
    assert canvas.grids == ((1, 3, 4),) * 4 and canvas.references[0].grid == (1, 3, 4)
    levels = torch.linspace(-1, 1, 8).view(2, 4, 1, 1).expand(2, 4, 12, 64)  # a grey of its own for every frame
    pictures = canvas.finish(levels.reshape(2, 48, 64))
    assert [p.mode for p in pictures] == ["RGBA"] * 6
    want = pictures_from(torch.linspace(-1, 1, 8).view(8, 1, 1, 1).expand(8, 3, 1, 1))
    assert [p.getpixel((9, 9))[0] for p in pictures] == [want[i].getpixel((0, 0))[0] for i in (1, 2, 3, 5, 6, 7)]


# ---------------------------------------------------------------- ControlNet
def test_control_is_active_between_start_and_end():
    sigmas = torch.tensor([1.0, 0.8, 0.6, 0.4, 0.0])
    assert active_span(sigmas, 0, 1) == (pytest.approx(0.4), 1.0)
    assert active_span(sigmas, 0.25, 0.75) == (pytest.approx(0.6), pytest.approx(0.8))
    low, high = active_span(sigmas, 0.0, 0.1)
    assert low > high


def test_an_idle_net_is_not_run():
    seen = []

    def net(latents, hint, timestep, embeds, mask, grids):
        seen.append((round(timestep[0].item(), 3), hint.shape))
        return [torch.zeros_like(latents)]

    options = {"control_start": 0.5, "control_scale": 1.0}
    finished(studio(guides=[Guide(net)]), wish("controlnet", images=(ramp(),), steps=4, count=2, options=options))
    assert seen == [(0.5, (2, 12, 64)), (0.25, (2, 12, 64))]


def test_the_hole_is_a_seventeenth_channel():
    hints = []

    def net(latents, hint, *rest):
        hints.append(hint)
        return [torch.zeros_like(latents)]

    mask = hole(64, 48, (32, 0, 64, 48))
    finished(studio(guides=[Guide(net, masked=True)]), wish("controlnet_inpaint", images=(grey(level=255),), mask=mask))
    channels = hints[0].unflatten(2, (17, 4))  # (1, 12, 17, 4)
    left = torch.tensor([True, True, False, False]).repeat(3)
    assert channels[0, left, 16].unique().tolist() == [1.0] and channels[0, ~left, 16].unique().tolist() == [0.0]
    assert channels[0, left, 0].unique().tolist() == [1.0] and channels[0, ~left, 0].unique().tolist() == [-1.0]


def test_several_nets_have_a_picture_each_and_are_added_up():
    """A net that repaints among them gets the hole."""
    seen = {}

    def net_of(name, depth):
        def net(latents, hint, *rest):
            seen[name] = hint
            return [torch.full_like(latents, 10.0**name + index) for index in range(depth)]

        return net

    given = []

    def model(latents, *rest, control=(), **more):
        given.append([residual[0, 0, 0].item() for residual in control])
        return torch.zeros_like(latents)

    guides = [Guide(net_of(1, 2), masked=True), Guide(net_of(2, 2)), Guide(net_of(3, 3))]
    images, mask = (grey(level=255), ramp(), grey(level=0)), hole(64, 48, (32, 0, 64, 48))
    scales = {"control_scale": (1, 2, 1), "control_start": (0, 0, 0.5)}
    desk = studio(guides=guides, blocks=12)
    finished(desk, wish("controlnet_inpaint", images=images, mask=mask, steps=2, options=scales), model)
    assert [seen[name].shape[2] for name in (1, 2, 3)] == [68, 64, 64]
    assert torch.equal(seen[3], desk.codec.encode(pixels_of(images[2], (64, 48))).data)
    assert given == [[210.0, 213.0], [1210.0, 1210.0, 1211.0, 1214.0, 1215.0, 1215.0]]


@pytest.mark.parametrize(("blocks", "lengths"), [(60, (5, 6)), (7, (2, 3)), (4, (1, 2)), (12, (4, 6, 12))])
def test_residuals_of_nets_of_several_depths_meet_each_block_as_alone(blocks, lengths):
    sides = [[torch.tensor(float(64**i + j)) for j in range(length)] for i, length in enumerate(lengths)]
    stack = [lambda img, txt, ctx: (img, txt)] * blocks

    def met(control):
        """What is added behind each block."""
        ctx = SimpleNamespace(control=tuple(control), steer=None, beside=None)
        walks = [through(stack, torch.zeros((), dtype=torch.float64), None, ctx, i, i + 1)[0] for i in range(blocks)]
        return torch.stack(walks)

    found = spread(sides, blocks)
    assert torch.equal(met(found), sum(met(side) for side in sides))
    assert len({id(one) for one in found}) < sum(lengths) and len(spread([sides[0]], blocks)) == lengths[0]


def test_grey_of_a_mask_is_told_to_those_who_know_it():
    """DiffSynth's net reads it as it is; the hole has an edge half-way for both."""

    class Behind:
        along = False

        def steer(self, hints, beside=()):
            self.hints = hints
            return lambda index, img, target_tokens: img

    hints = []

    def net(latents, hint, *rest):
        hints.append(hint)
        return [torch.zeros_like(latents)]

    behind = Behind()
    mask = Image.new("L", (64, 48), 102)
    mask.paste(204, (32, 0, 64, 48))
    for guide in (Guide(net, masked=True), Guide(behind, masked=True)):
        asked = wish("controlnet_inpaint", images=(grey(level=255),), mask=mask)
        finished(studio(guides=[guide]), asked, lambda latents, *rest, **more: torch.zeros_like(latents))
    told = [each.unflatten(2, (17, 4)) for each in (hints[0], behind.hints[0][0])]
    left = torch.tensor([True, True, False, False]).repeat(3)
    for side, levels in ((left, (1.0, 0.6)), (~left, (0.0, 0.2))):
        for each, level in zip(told, levels, strict=True):
            assert torch.allclose(each[0, side, 16], torch.tensor(level))
    assert torch.equal(told[0][:, :, :16], told[1][:, :, :16])  # the same hole


def test_one_number_or_one_for_each_picture():
    assert per_hint(0.5, 3) == [0.5, 0.5, 0.5] and per_hint([1, 2], 2) == [1.0, 2.0]
    with pytest.raises(RequestError, match="3 control values were given for 2"):
        per_hint([1, 2, 3], 2)


# ---------------------------------------------------------------- sentences
@pytest.mark.parametrize("task", ["controlnet", "controlnet_inpaint"])
def test_a_missing_net_is_named(task):
    with pytest.raises(ModelError, match=f"{task} needs a ControlNet"):
        TASKS[task](studio(), wish(task, images=(ramp(),), mask=hole(64, 48, (0, 0, 8, 8))))


@pytest.mark.parametrize("task", ["inpaint", "edit_inpaint", "controlnet_inpaint"])
def test_a_missing_mask_is_named(task):
    with pytest.raises(RequestError, match=f"{task} needs a"):
        TASKS[task](studio(), wish(task, images=(ramp(),)))


# ---------------------------------------------------------------- pictures
def test_masks_are_white_from_the_middle_up():
    levels = Image.fromarray(np.array([[0, 127, 128, 255]], np.uint8))
    assert mask_of(levels, (4, 1)).flatten().tolist() == [0, 0, 1, 1]


def test_pixels_and_back():
    source = ramp()
    assert pixels_of(source, (64, 48)).shape == (1, 3, 48, 64)
    assert (np.asarray(pictures_from(pixels_of(source, (64, 48)))[0]) == np.asarray(source)).all()
    assert pixels_of(source, (64, 48), 4)[0, 3].unique().tolist() == [1.0]


@pytest.mark.parametrize(
    ("box", "padding", "size", "want"),
    [
        ((40, 40, 60, 60), 0, (64, 64), (40, 40, 60, 60)),
        ((40, 40, 60, 60), 5, (64, 64), (35, 35, 65, 65)),
        ((40, 40, 60, 60), 0, (128, 64), (30, 40, 70, 60)),
        ((0, 40, 20, 60), 0, (128, 64), (0, 40, 40, 60)),  # moved in from the left
        ((80, 40, 100, 60), 0, (64, 128), (80, 30, 100, 70)),
        ((0, 0, 100, 100), 0, (128, 64), (0, 0, 100, 100)),  # nowhere to grow
    ],
)
def test_the_box_follows_the_ratio_inside_the_picture(box, padding, size, want):
    assert box_around(hole(100, 100, box), size, padding) == want


@pytest.mark.parametrize("size", [(64, 64), (96, 32), (32, 96), (64, 48)])
def test_contain_and_cover_fill_the_frame(size):
    source = Image.new("RGB", (40, 30), (10, 200, 30))
    for fitted in (contain(source, size), cover(source, size)):
        assert fitted.size == size and abs(np.asarray(fitted).astype(int) - (10, 200, 30)).max() <= 1


def test_paste_back_blends_where_the_mask_is_grey():
    original, patch = grey(20, 20, 0), grey(8, 8, 200)
    mask = hole(20, 20, (4, 4, 12, 12))
    mask.paste(128, (4, 4, 8, 12))
    pasted = paste_back(original, mask, (4, 4, 12, 12), patch)
    assert pasted.getpixel((10, 6)) == (200, 200, 200) and pasted.getpixel((15, 6)) == (0, 0, 0)
    assert abs(pasted.getpixel((5, 6))[0] - 100) <= 2
