"""Every task against diffusers' 0.42 pipelines, on the same tiny random weights and the same noise.

Stated tolerances: float32 latents after 4 guided steps within 1e-5 of the largest, decoded pictures within one
grey level; bfloat16 in `test_bfloat16_stays_close`. Where diffusers can't do what we do, or does it wrong:
  - it samples posteriors in five pipelines (in one with the global generator, so that no seed repeats) and takes
    the mode in three; `patch_reference` makes it take the mode everywhere, as we do;
  - with several pictures per prompt it gives padded prompts each other's masks: it is given repeated prompts;
  - Edit-Plus refuses batches, Layered mis-slices them: our batches are compared with single runs;
  - it neither converts RGBA nor grey pictures: it is given converted ones.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from diffusers import QwenImageMultiControlNetModel
from PIL import Image
from torch import Tensor

from lanting.core import Request
from lanting.flow.latents import LatentCodec
from lanting.flow.loop import Conditioning, denoise
from lanting.flow.schedule import Schedule
from lanting.specs import ModelSpec, fit_area, get_spec
from lanting.tasks import TASKS
from lanting.tasks.studio import Guide

AREA = 64 * 64
SEED = 7
LATENTS, GREY = 1e-5, 1


# ---------------------------------------------------------------- the two sides
@dataclass
class Desk:
    """A Studio whose text encoder is a table of random states: a prompt's length depends on its words."""

    release: ModelSpec
    codec: LatentCodec
    schedule: Schedule = field(default_factory=lambda: Schedule.from_config(tiny.SCHEDULE))
    guides: Sequence[Guide] = ()
    blocks: int = 2
    dtype: torch.dtype = torch.float32
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    shown: list[list[tuple[int, int]]] = field(default_factory=list)

    def encode_prompt(self, prompts, images=()) -> Conditioning:
        self.shown.append([image.size for image in images])
        embeds, mask = states(prompts, self.dtype)
        return Conditioning(embeds, mask)

    def generator(self, seed: int, index: int) -> torch.Generator:
        return torch.Generator("cpu").manual_seed(seed + index)


def states(prompts, dtype=torch.float32) -> tuple[Tensor, Tensor | None]:
    rows = []
    for prompt in prompts:
        generator = torch.Generator().manual_seed(zlib.crc32(prompt.encode()))
        rows.append(torch.randn(5 + len(prompt) % 6, tiny.JOINT, generator=generator))
    longest = max(len(row) for row in rows)
    embeds = torch.stack([torch.cat([row, row.new_zeros(longest - len(row), tiny.JOINT)]) for row in rows])
    mask = torch.tensor([[i < len(row) for i in range(longest)] for row in rows])
    return embeds.to(dtype), None if mask.all() else mask


def desk(release="qwen-image", vae=None, vl_area=AREA, **rest) -> Desk:
    spec = get_spec(release)
    spec = replace(spec, defaults=replace(spec.defaults, vae_area=AREA, vl_area=vl_area))
    return Desk(spec, tiny.our_codec(vae or tiny.vae()), **rest)


def request(task, prompt="a cat", size=(96, 64), **rest) -> Request:
    asked = {"negative_prompt": " ", "steps": 4, "guidance_scale": 4.0, "seed": SEED, **rest}
    return Request(prompt=prompt, task=task, size=size, **asked)


def ours(studio: Desk, net, asked: Request) -> tuple[Tensor, list[Image.Image]]:
    canvas = TASKS[asked.task](studio, asked)
    *_, last = denoise(tiny.our_transformer(net), canvas)
    return last.latents, list(canvas.finish(last.latents))


def theirs(kind, asked: Request, parts: dict, sized=True, **rest) -> tuple[Tensor, list[Image.Image]]:
    """One run of the pipeline; the last step's latents and the pictures."""
    prompts = [asked.prompt] if isinstance(asked.prompt, str) else list(asked.prompt)
    prompts = [prompt for prompt in prompts for _ in range(asked.count)]
    dtype = parts["transformer"].dtype
    embeds, mask = states(prompts, dtype)
    negative, negative_mask = states([asked.negative_prompt] * len(prompts), dtype)
    caught = []

    def catch(pipe, index, timestep, values):
        caught.append(values["latents"])
        return {}

    call = dict(
        prompt_embeds=embeds,
        prompt_embeds_mask=mask,
        negative_prompt_embeds=negative,
        negative_prompt_embeds_mask=negative_mask,
        true_cfg_scale=asked.guidance_scale,
        num_inference_steps=asked.steps,
        generator=[torch.Generator().manual_seed(asked.seed + i) for i in range(len(prompts))],
        callback_on_step_end=catch,
        **rest,
    )
    if sized:
        call |= {"width": asked.size[0], "height": asked.size[1]}
    pictures = tiny.pipeline(kind, **parts)(**call).images
    return caught[-1], pictures


def relative(mine: Tensor, reference: Tensor) -> float:
    assert mine.shape == reference.shape
    return ((mine - reference).abs().max() / reference.abs().max()).item()


def grey(mine: list, reference: list) -> int:
    """The largest difference of two lists of pictures in grey levels, which must not be blank ones."""
    assert [p.size for p in mine] == [p.size for p in reference] and mine[0].mode == reference[0].mode
    pairs = [[np.asarray(p).astype(int) for p in pair] for pair in zip(mine, reference, strict=True)]
    assert min(one.std() for _, one in pairs) > 5
    return max(abs(a - b).max() for a, b in pairs)


def same(mine, reference) -> None:
    assert relative(mine[0], reference[0]) <= LATENTS
    assert grey(mine[1], reference[1]) <= GREY


@pytest.fixture(autouse=True)
def comparable(monkeypatch):
    tiny.patch_reference(monkeypatch, AREA)


def plain(release="qwen-image", **rest) -> dict:
    return {"transformer": tiny.transformer(release), "vae": tiny.vae(), **rest}


# ---------------------------------------------------------------- schedule
@pytest.mark.parametrize(
    "config", [tiny.SCHEDULE, tiny.LIGHTNING, {"shift": 3.0}, {**tiny.SCHEDULE, "time_shift_type": "linear"}]
)
@pytest.mark.parametrize("custom", [None, [1.0, 0.9, 0.25], [0.8]])
def test_sigmas_are_equal_to_the_last_bit(config, custom):
    reference, schedule = tiny.scheduler(config), Schedule.from_config(config)
    for steps in (2, 3, 7, 20, 50, 99) if custom is None else (len(custom),):
        for tokens in (24, 1600, 4096, 6889):
            line = np.linspace(1, 1 / steps, steps) if custom is None else custom
            reference.set_timesteps(sigmas=line, mu=schedule.mu(tokens))
            assert torch.equal(schedule.sigmas(steps, tokens, custom=custom), reference.sigmas)


def test_one_step_is_drawn_where_the_reference_divides_by_zero():
    reference = tiny.scheduler()
    with pytest.warns(RuntimeWarning):
        reference.set_timesteps(sigmas=[1.0], mu=0.7)
    assert reference.sigmas.isnan().any()
    parts, wish = plain(), request("text_to_image", steps=1)
    latents, _ = ours(desk(vae=parts["vae"]), parts["transformer"], wish)
    assert latents.isfinite().all()


# ---------------------------------------------------------------- from words
@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"size": (80, 112)},  # 5 x 7 tokens: odd rows and columns
        {"size": (48, 208), "steps": 7},
        {"prompt": ("a cat", "a red door at night")},  # 10 and 6 tokens, so one is padded
        {"prompt": ("a cat", "a red door at night"), "count": 2, "seed": 11},
        {"guidance_scale": 1.0},
        {"negative_prompt": "ugly, blurred", "guidance_scale": 2.5},
    ],
)
def test_text_to_image(asked):
    parts, wish = plain(), request("text_to_image", **asked)
    same(ours(desk(vae=parts["vae"]), parts["transformer"], wish), theirs("text_to_image", wish, parts))


@pytest.mark.parametrize("prompt", ["a cat", ("a cat", "a red door at night")])
def test_batched_guidance_equals_two_calls(prompt):
    """The padded call of twice the batch against the reference's two calls."""
    parts = plain()
    wish = request("text_to_image", prompt, options={"batched_guidance": True})
    same(ours(desk(vae=parts["vae"]), parts["transformer"], wish), theirs("text_to_image", wish, parts))


@pytest.mark.parametrize("steps", [4, 8])
def test_lightning(steps):
    parts = plain(scheduler=tiny.scheduler(tiny.LIGHTNING))
    wish = request("text_to_image", steps=steps, guidance_scale=1.0)
    studio = desk(vae=parts["vae"], schedule=Schedule.from_config(tiny.LIGHTNING))
    same(ours(studio, parts["transformer"], wish), theirs("text_to_image", wish, parts))


def test_own_sigmas():
    sigmas = [1.0, 0.8, 0.35]
    parts, wish = plain(), request("text_to_image", steps=3, options={"sigmas": sigmas})
    reference = theirs("text_to_image", wish, parts, sigmas=sigmas)
    same(ours(desk(vae=parts["vae"]), parts["transformer"], wish), reference)


def test_the_reference_mixes_up_the_masks_of_several_pictures_per_prompt():
    """Why `theirs` repeats prompts itself: diffusers repeats states row by row but masks as a block."""
    embeds, mask = states(["a cat", "a red door at night"])
    assert mask is not None
    given = {"prompt_embeds": embeds, "prompt_embeds_mask": mask, "num_images_per_prompt": 2}
    repeated, masks = tiny.pipeline("text_to_image", **plain()).encode_prompt(prompt=None, **given)
    assert (repeated == embeds.repeat_interleave(2, 0)).all()
    assert (masks == mask.repeat(2, 1)).all() and (masks != mask.repeat_interleave(2, 0)).any()
    assert (Conditioning(embeds, mask).repeat(2).mask == mask.repeat_interleave(2, 0)).all()


# ---------------------------------------------------------------- from a picture
@pytest.mark.parametrize(
    ("asked", "shape"),
    [
        ({"strength": 0.6}, (96, 64)),
        ({"strength": 0.3, "steps": 7, "size": (80, 112)}, (123, 77)),
        ({"strength": 1.0}, (96, 64)),
        ({"strength": 0.6, "prompt": ("a cat", "a red door at night"), "count": 2}, (40, 200)),
    ],
)
def test_image_to_image(asked, shape):
    parts, source = plain(), tiny.picture(*shape)
    wish = request("image_to_image", images=(source,), **asked)
    reference = theirs("image_to_image", wish, parts, image=source, strength=wish.strength)
    same(ours(desk(vae=parts["vae"]), parts["transformer"], wish), reference)


@pytest.mark.parametrize("mode", ["L", "RGBA"])
def test_pictures_of_other_modes_are_converted(mode):
    """diffusers hands them to the VAE as they are and fails; it gets the picture as seen on white paper."""
    parts, source = plain(), tiny.picture(96, 64, mode)
    seen = source.convert("RGB")
    if mode == "RGBA":
        seen = Image.alpha_composite(Image.new("RGBA", source.size, "white"), source).convert("RGB")
    wish = request("image_to_image", images=(source,), strength=0.6)
    reference = theirs("image_to_image", wish, parts, image=seen, strength=0.6)
    same(ours(desk(vae=parts["vae"]), parts["transformer"], wish), reference)


@pytest.mark.parametrize(
    ("asked", "shape", "hole"),
    [
        ({"strength": 0.6}, (96, 64), (30, 10, 70, 50)),
        ({"strength": 1.0, "size": (80, 112)}, (123, 77), (0, 20, 41, 77)),
        ({"strength": 0.8, "prompt": ("a cat", "a red door at night")}, (96, 64), (30, 10, 70, 50)),
    ],
)
def test_inpaint(asked, shape, hole):
    parts, source, hole = plain(), tiny.picture(*shape), tiny.mask(*shape, hole)
    wish = request("inpaint", images=(source,), mask=hole, **asked)
    reference = theirs("inpaint", wish, parts, image=source, mask_image=hole, strength=wish.strength)
    same(ours(desk(vae=parts["vae"]), parts["transformer"], wish), reference)


@pytest.mark.parametrize(
    ("padding", "size", "hole"),
    [
        (8, (96, 64), (60, 40, 100, 70)),
        (0, (80, 112), (60, 40, 100, 70)),
        (32, (96, 64), (2, 90, 30, 119)),  # at the border, where the box must be moved in
        (16, (64, 64), (0, 0, 150, 119)),  # wider than the picture can follow: the cut-out gets bars
    ],
)
def test_inpaint_large_and_paste_back(padding, size, hole):
    parts, source, hole = plain(), tiny.picture(150, 120), tiny.mask(150, 120, hole)
    options = {"padding_mask_crop": padding}
    wish = request("inpaint", size=size, images=(source,), mask=hole, strength=0.8, options=options)
    call = {"image": source, "mask_image": hole, "strength": 0.8, "padding_mask_crop": padding}
    mine = ours(desk(vae=parts["vae"]), parts["transformer"], wish)
    same(mine, theirs("inpaint", wish, parts, **call))
    assert mine[1][0].size == source.size
    kept, still = np.asarray(hole) == 0, np.asarray(mine[1][0])
    assert (still[kept] == np.asarray(source)[kept]).all()


# ---------------------------------------------------------------- editing
@pytest.mark.parametrize(
    ("asked", "shape"),
    [
        ({"size": (96, 64)}, (120, 80)),
        ({"size": (80, 112)}, (77, 123)),  # a target unlike its reference
        ({"size": (96, 64), "prompt": ("a cat", "a red door at night")}, (120, 80)),
        ({"size": (96, 64), "guidance_scale": 1.0}, (120, 80)),
    ],
)
def test_edit(asked, shape):
    parts, source = plain("qwen-image-edit"), tiny.picture(*shape)
    wish = request("edit", images=(source,), **asked)
    studio = desk("qwen-image-edit", parts["vae"])
    same(ours(studio, parts["transformer"], wish), theirs("edit", wish, parts, image=source))
    # every prompt is shown the picture, the negative one included
    assert studio.shown == [[fit_area(AREA, shape[0] / shape[1])]] * len(studio.shown)


SHAPES = ((120, 80), (64, 64), (50, 130))


@pytest.mark.parametrize("release", ["qwen-image-edit-2509", "qwen-image-edit-2511"])
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("batched", [False, True])
def test_edit_plus(release, count, batched):
    parts = plain(release)
    sources = [tiny.picture(*shape, seed=i) for i, shape in enumerate(SHAPES[:count])]
    options = {"batched_guidance": batched}
    wish = request("edit", size=(80, 112), images=tuple(sources), options=options)
    studio = desk(release, parts["vae"], vl_area=48 * 48)
    same(ours(studio, parts["transformer"], wish), theirs("edit_plus", wish, parts, image=sources))
    assert studio.shown[0] == [fit_area(48 * 48, w / h) for w, h in SHAPES[:count]]


def test_edit_plus_in_batches():
    """diffusers refuses; each row of ours equals its single run. The prompts have different lengths."""
    parts, sources = plain("qwen-image-edit-2511"), [tiny.picture(*shape) for shape in SHAPES[:2]]
    prompts = ("a cat", "a red door at night")
    wish = request("edit", prompts, images=tuple(sources))
    latents, pictures = ours(desk("qwen-image-edit-2511", parts["vae"]), parts["transformer"], wish)
    with pytest.raises(ValueError, match="batch_size=1"):
        theirs("edit_plus", wish, parts, image=sources)
    for i, prompt in enumerate(prompts):
        single = replace(wish, prompt=prompt, seed=SEED + i)
        same((latents[i : i + 1], pictures[i : i + 1]), theirs("edit_plus", single, parts, image=sources))


@pytest.mark.parametrize("prompt", ["a cat", ("a cat", "a red door at night")])
def test_edit_inpaint(prompt):
    parts, source = plain("qwen-image-edit"), tiny.picture(120, 80)
    hole, size = tiny.mask(120, 80, (30, 10, 70, 50)), fit_area(AREA, 120 / 80)  # the only size diffusers draws
    wish = request("edit_inpaint", prompt, size, images=(source,), mask=hole, strength=0.8)
    call = {"image": source, "mask_image": hole, "strength": 0.8}
    studio = desk("qwen-image-edit", parts["vae"])
    same(ours(studio, parts["transformer"], wish), theirs("edit_inpaint", wish, parts, **call))
    assert studio.shown == [[size], [size]]


def test_edit_inpaint_large_and_paste_back():
    """diffusers finds the box in the mask but cuts it out of the resized picture, so the two agree only where
    the picture has the drawn size already; ours cuts both at their own size."""
    size = fit_area(AREA, 96 / 64)
    parts, source, hole = plain("qwen-image-edit"), tiny.picture(*size), tiny.mask(*size, (30, 10, 60, 40))
    options = {"padding_mask_crop": 4}
    wish = request("edit_inpaint", size=size, images=(source,), mask=hole, strength=0.8, options=options)
    call = {"image": source, "mask_image": hole, "strength": 0.8, "padding_mask_crop": 4}
    mine = ours(desk("qwen-image-edit", parts["vae"]), parts["transformer"], wish)
    same(mine, theirs("edit_inpaint", wish, parts, **call))


# ---------------------------------------------------------------- layers
def layered_parts() -> dict:
    return {"transformer": tiny.transformer("qwen-image-layered"), "vae": tiny.vae(4)}


def layered_wish(size=(120, 80), **rest) -> tuple[Image.Image, Request]:
    source = tiny.picture(*size, "RGBA")
    rest.setdefault("options", {"layers": 3})
    return source, request("layered", size=fit_area(AREA, size[0] / size[1]), images=(source,), **rest)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("layers", [1, 3])
def test_layered(normalize, layers):
    parts = layered_parts()
    source, wish = layered_wish(options={"layers": layers})
    studio = desk("qwen-image-layered", parts["vae"])
    studio.release = replace(studio.release, renormalize=normalize)
    call = {"image": source, "layers": layers, "cfg_normalize": normalize, "prompt": "x"}
    latents, pictures = theirs("layered", wish, parts, sized=False, **call)
    mine = ours(studio, parts["transformer"], wish)
    same(mine, (latents, pictures[0]))
    assert [p.mode for p in mine[1]] == ["RGBA"] * layers
    assert studio.shown == [[], []]  # the picture isn't shown to the text encoder


def test_layered_in_batches():
    """diffusers' own batches are cut at the wrong places (layers + 1 instead of layers) or fail."""
    parts = layered_parts()
    source, wish = layered_wish(count=2)
    latents, pictures = ours(desk("qwen-image-layered", parts["vae"]), parts["transformer"], wish)
    for i in range(2):
        single = replace(wish, count=1, seed=SEED + i)
        studio = desk("qwen-image-layered", parts["vae"])
        call = {"image": source, "layers": 3, "prompt": "x", "cfg_normalize": studio.release.renormalize}
        reference = theirs("layered", single, parts, sized=False, **call)
        same((latents[i : i + 1], pictures[3 * i : 3 * i + 3]), (reference[0], reference[1][0]))


# ---------------------------------------------------------------- ControlNet
@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"size": (80, 112), "control_scale": 0.6},
        {"control_start": 0.25, "control_end": 0.75},
        {"prompt": ("a cat", "a red door at night"), "batched_guidance": True},
        {"control_end": 0.1},  # never active
    ],
)
def test_controlnet(asked):
    asked = dict(asked)
    parts, hint = plain(controlnet=tiny.controlnet(layers=2)), tiny.picture(96, 64)
    defaults = {"control_scale": 1.0, "control_start": 0.0, "control_end": 1.0}
    options = {key: asked.pop(key) for key in (*defaults, "batched_guidance") if key in asked}
    control = defaults | options
    wish = request("controlnet", images=(hint,), options=options, **asked)
    call = {
        "control_image": hint,
        "controlnet_conditioning_scale": control["control_scale"],
        "control_guidance_start": control["control_start"],
        "control_guidance_end": control["control_end"],
    }
    studio = desk(vae=parts["vae"], guides=[Guide(tiny.our_controlnet(parts["controlnet"]))])
    same(ours(studio, parts["transformer"], wish), theirs("controlnet", wish, parts, **call))


def control_call(hints, options):
    """The pictures and options as diffusers calls them."""
    return {
        "control_image": list(hints),
        "controlnet_conditioning_scale": options["control_scale"],
        "control_guidance_start": options["control_start"],
        "control_guidance_end": options["control_end"],
    }


def test_several_control_pictures():
    net = tiny.controlnet()
    parts = plain(controlnet=QwenImageMultiControlNetModel([net]))
    hints = (tiny.picture(96, 64), tiny.picture(50, 80, seed=1))
    options = {"control_scale": [0.7, 1.3], "control_start": [0.0, 0.5], "control_end": [0.5, 1.0]}
    wish = request("controlnet", images=hints, options=options)
    call = control_call(hints, options)
    studio = desk(vae=parts["vae"], guides=[Guide(tiny.our_controlnet(net))])
    same(ours(studio, parts["transformer"], wish), theirs("controlnet", wish, parts, **call))


class Several(QwenImageMultiControlNetModel):
    """diffusers' refuses more than one net. What several say is added up at each block, as its nets do elsewhere."""

    def forward(self, controlnet_cond, conditioning_scale, **rest):
        asked = zip(self.nets, controlnet_cond, conditioning_scale, strict=True)
        found = [net(controlnet_cond=image, conditioning_scale=scale, **rest) for net, image, scale in asked]
        most = max(map(len, found))
        found = [[one for one in side for _ in range(most // len(side))] for side in found]
        return [sum(each[1:], start=each[0]) for each in zip(*found, strict=True)]


@pytest.mark.parametrize("layers", [1, 2])
def test_several_controlnets(layers):
    nets = [tiny.controlnet(layers=2), tiny.randomise(tiny.controlnet(layers=layers), 0.1)]
    hints = (tiny.picture(96, 64), tiny.picture(50, 80, seed=1))
    parts = plain(controlnet=Several(nets))
    options = {"control_scale": [0.7, 1.3], "control_start": [0.0, 0.5], "control_end": [0.5, 1.0]}
    wish = request("controlnet", images=hints, options=options)
    call = control_call(hints, options)
    studio = desk(vae=parts["vae"], guides=[Guide(tiny.our_controlnet(net)) for net in nets])
    same(ours(studio, parts["transformer"], wish), theirs("controlnet", wish, parts, **call))


@pytest.mark.parametrize("prompt", ["a cat", ("a cat", "a red door at night")])
def test_controlnet_inpaint(prompt):
    """diffusers encodes with the global generator here, so that it never gives one picture twice; see the
    mode above."""
    parts = plain(controlnet=tiny.controlnet(extra=4, layers=2))
    source, hole = tiny.picture(123, 77), tiny.mask(123, 77, (30, 10, 70, 50))
    wish = request("controlnet_inpaint", prompt, images=(source,), mask=hole, options={"control_scale": 0.9})
    call = {"control_image": source, "control_mask": hole, "controlnet_conditioning_scale": 0.9}
    studio = desk(vae=parts["vae"], guides=[Guide(tiny.our_controlnet(parts["controlnet"]), masked=True)])
    same(ours(studio, parts["transformer"], wish), theirs("controlnet_inpaint", wish, parts, **call))


# ---------------------------------------------------------------- bfloat16
@pytest.mark.parametrize("task", ["text_to_image", "inpaint", "edit"])
def test_bfloat16_stays_close(task):
    """bfloat16 has 8 bits, 4 guided steps amplify, and we round in fewer places on purpose (float32
    statistics of the latents). Tolerance: the mean error against diffusers in bfloat16 is below that of
    diffusers in bfloat16 against itself in float32, and below 2 % of the latents' spread; pictures on average
    within 3 grey levels."""
    release = "qwen-image-edit" if task == "edit" else "qwen-image"
    source, hole = tiny.picture(96, 64), tiny.mask(96, 64, (30, 10, 70, 50))
    images = () if task == "text_to_image" else (source,)
    wish = request(task, images=images, mask=hole if task == "inpaint" else None, strength=0.8)
    call: dict[str, Any] = {"image": source} if images else {}
    call |= {"mask_image": hole, "strength": 0.8} if task == "inpaint" else {}
    exact, _ = theirs(task, wish, plain(release), **call)
    parts = {key: module.bfloat16() for key, module in plain(release).items()}
    reference, seen = theirs(task, wish, parts, **call)
    mine, drawn = ours(desk(release, parts["vae"], dtype=torch.bfloat16), parts["transformer"], wish)
    assert mine.dtype == reference.dtype == torch.bfloat16
    off = (mine.float() - reference.float()).abs().mean()
    assert off <= (reference.float() - exact).abs().mean()
    assert off <= 0.02 * exact.std()
    levels = [np.asarray(p).astype(float) for p in (drawn[0], seen[0])]
    assert abs(levels[0] - levels[1]).mean() <= 3
