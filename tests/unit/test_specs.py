"""Releases as text files, requests settled from them, folders recognised."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from PIL import Image

from lanting.core.errors import ModelError, RequestError
from lanting.core.lang import explain
from lanting.core.types import TASK_NAMES, Request
from lanting.specs import (
    detect,
    distilled_releases,
    fit_area,
    get_spec,
    parse_size,
    read_spec,
    settle,
    spec_names,
    whole_release,
)
from lanting.specs.detect import SINGLE_STREAM
from lanting.specs.sizes import largest_area, reference_size

QWEN, LAYERED, NANO = get_spec("qwen-image"), get_spec("qwen-image-layered"), get_spec("nano")
EDIT, PLUS = get_spec("qwen-image-edit"), get_spec("qwen-image-edit-2511")


def picture(width: int = 64, height: int = 48, mode: str = "RGB") -> Image.Image:
    return Image.new(mode, (width, height), "white")


def test_every_release_file_reads():
    assert {"nano", "qwen-image", "qwen-image-2512", "qwen-image-edit-2511"} <= set(spec_names())
    for name in spec_names():
        spec = get_spec(name)
        assert spec.name == name
        assert spec.tasks
        assert set(spec.tasks) <= set(TASK_NAMES)
        assert 1 <= spec.defaults.steps <= 50


def test_recommended_values():
    base = get_spec("qwen-image-2512").defaults
    assert (base.steps, base.guidance_scale, base.size) == (50, 4.0, (1328, 1328))
    assert base.negative_prompt.startswith("低分辨率")
    assert base.sizes["16:9"] == (1664, 928)
    assert QWEN.defaults.negative_prompt == " "
    assert (PLUS.defaults.steps, PLUS.defaults.vl_area, PLUS.defaults.vae_area) == (40, 384**2, 1024**2)
    assert (PLUS.template, EDIT.template, QWEN.template) == ("edit-plus", "edit", "text-to-image")
    assert PLUS.shape == {"zero_cond_t": True}
    assert get_spec("qwen-image-edit-2509").shape == {}
    fast = get_spec("qwen-image-lightning-8")
    assert (fast.defaults.steps, fast.defaults.guidance_scale) == (8, 1.0)
    assert fast.schedule["shift_terminal"] is None
    assert fast.schedule["base_shift"] == pytest.approx(1.0986122886681098)


FEW = [name for name in spec_names() if get_spec(name).lora]


def test_every_release_of_the_first_build_has_its_distillations():
    bases = ["qwen-image", "qwen-image-2512", "qwen-image-edit", "qwen-image-edit-2509", "qwen-image-edit-2511"]
    assert sorted(FEW) == sorted(f"{base}-lightning-{steps}" for base in bases for steps in (4, 8))
    for base in bases:
        assert distilled_releases(base) == (f"{base}-lightning-4", f"{base}-lightning-8")
        assert whole_release(base) == base
    assert distilled_releases("nano") == distilled_releases("qwen-image-2.1") == ()


@pytest.mark.parametrize("name", FEW)
def test_a_distilled_release_is_its_base_in_few_steps(name):
    few, base = get_spec(name), get_spec(whole_release(name))
    assert name.startswith(base.name) and few.repo == base.repo and few.shape == base.shape
    assert (few.tasks, few.template, few.edit_template) == (base.tasks, base.template, base.edit_template)
    assert (
        replace(few.defaults, steps=base.defaults.steps, guidance_scale=base.defaults.guidance_scale) == base.defaults
    )
    assert (few.defaults.steps, few.defaults.guidance_scale) == (int(name[-1]), 1.0)
    assert few.schedule == get_spec("qwen-image-lightning-4").schedule
    file = few.lora.rpartition("/")[2]
    assert few.lora.startswith("lightx2v/") and file.endswith(".safetensors") and f"-{name[-1]}steps-" in file
    words = {"qwen-image-edit": "Qwen-Image-Edit-Lightning", "qwen-image": "Qwen-Image-Lightning"}
    assert words.get(base.name, base.repo.rpartition("/")[2]) in file, "the LoRA of another release"


def test_a_persons_own_release_may_extend_ours(tmp_path):
    path = tmp_path / "posters.toml"
    path.write_text('extends = "qwen-image"\nrepo = "me/posters"\n[defaults]\nsteps = 8\nguidance_scale = 1\n')
    spec = read_spec(path)
    assert (spec.name, spec.repo, spec.defaults.steps, spec.defaults.guidance_scale) == (
        "posters",
        "me/posters",
        8,
        1.0,
    )
    assert spec.defaults.sizes == QWEN.defaults.sizes


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ('extends = "qwen-image"\ncolour = 3\n', "colour"),
        ('extends = "qwen-image"\n[defaults]\nstep = 3\n', "defaults.step"),
        ('extends = "qwen-image"\n[defaults]\nsteps = "8"\n', "must be int"),
        ('extends = "qwen-image"\n[defaults]\nsize = [100, 100]\n', "multiples of 16"),
        ('extends = "qwen-image"\ntemplate = "video"\n', "template"),
        ('extends = "nano"\nedit_template = "text-to-image"\n', "edit_template"),
        ('extends = "qwen-image"\ntasks = ["sculpt"]\n', "sculpt"),
        ('extends = "odd"\n', "back to itself"),
        ('extends = "missing"\n', "no such release"),
        ("extends = \n", "TOML"),
    ],
)
def test_wrong_release_files_are_one_sentence(tmp_path, monkeypatch, text, word):
    path = tmp_path / "odd.toml"
    path.write_text(text)
    with pytest.raises(ModelError, match=word) as caught:
        read_spec(path)
    assert "\n" not in str(caught.value).replace("\n(at", "")
    monkeypatch.setenv("LANTING_LANG", "zh")
    assert not re.search(r"\b(must|not|known|names|leads)\b", explain(caught.value)) or word == "TOML"


def test_unknown_release_names_the_nearest():
    with pytest.raises(ModelError, match="qwen-image-2512"):
        get_spec("qwen-image-2521")


def test_settle_fills_every_gap_and_settling_again_changes_nothing():
    settled = settle(Request("a cat"), QWEN)
    assert settled.task == "text_to_image"
    assert (settled.steps, settled.guidance_scale, settled.size) == (50, 4.0, (1328, 1328))
    assert settled.negative_prompt == " "
    assert 0 <= settled.seed < 2**32
    assert settle(settled, QWEN) == settled


@pytest.mark.parametrize(
    ("spec", "request_", "task"),
    [
        (QWEN, Request("a cat"), "text_to_image"),
        (QWEN, Request("a cat", images=(picture(),)), "image_to_image"),
        (QWEN, Request("a cat", images=(picture(),), mask=picture(mode="L")), "inpaint"),
        (EDIT, Request("a cat", images=(picture(),)), "edit"),
        (EDIT, Request("a cat", images=(picture(),), mask=picture(mode="L")), "edit_inpaint"),
        (PLUS, Request("a cat", images=(picture(), picture(), picture())), "edit"),
        (LAYERED, Request(images=(picture(),)), "layered"),
        (NANO, Request("a cat"), "text_to_image"),
        (NANO, Request("a cat", images=(picture(), picture())), "edit"),
        (NANO, Request("a cat", images=(picture(),), strength=0.5), "image_to_image"),  # an edit knows no strength
        (NANO, Request("a cat", images=(picture(),), mask=picture(mode="L"), strength=0.5), "edit_inpaint"),
    ],
)
def test_task_is_inferred(spec, request_, task):
    settled = settle(request_, spec)
    assert settled.task == task
    assert settle(settled, spec) == settled


def test_nanos_edits_are_guided_like_its_other_tasks_unless_told_otherwise():
    nano, picture = get_spec("nano"), Image.new("RGB", (224, 96))
    drawn, edited = settle(Request("a"), nano), settle(Request("a", images=(picture,)), nano)
    assert (drawn.task, edited.task) == ("text_to_image", "edit")
    assert drawn.guidance_scale == edited.guidance_scale == 2.0
    assert settle(Request("a", images=(picture,), guidance_scale=1.0), nano).guidance_scale == 1.0


def test_sizes_follow_the_picture():
    # sizes of the Qwen-Image edit pipelines for these inputs
    assert fit_area(1024**2, 1920 / 1080) == (1376, 768)
    assert fit_area(384**2, 3000 / 2000) == (480, 320)
    assert fit_area(640**2, 800 / 600) == (736, 544)
    assert settle(Request("x", images=(picture(1920, 1080),)), EDIT).size == (1376, 768)
    assert settle(Request("x", images=(picture(640, 480), picture(800, 600))), PLUS).size == (1184, 896)
    assert settle(Request(images=(picture(1920, 1080),)), LAYERED).size == (864, 480)
    wide = replace(Request(images=(picture(1920, 1080),)), options={"resolution": 1024})
    assert settle(wide, LAYERED).size == fit_area(1024**2, 16 / 9)
    assert settle(Request("x", images=(picture(100, 50),)), QWEN).size == (96, 48)
    assert settle(Request("x", images=(picture(4000, 3000),)), QWEN).size == (1536, 1152)


def test_long_pictures_get_a_size_that_can_be_drawn_and_drawn_again():
    """At 16:1 the largest area that a release names is longer than what is drawn: its recipe would be refused."""
    single = get_spec("qwen-image-2.1")
    for spec, task in ((QWEN, "image_to_image"), (QWEN, "controlnet"), (single, "image_to_image"), (NANO, None)):
        for size in ((5296, 331), (331, 5296), (8000, 500), (8000, 1600), (4096, 256), (4000, 300)):
            settled = settle(Request("a", task, images=(picture(*size),)), spec)
            assert settled.size is not None and max(settled.size) <= 4096
            assert settle(settled, spec) == settled
    assert settle(Request("a", "image_to_image", images=(picture(8000, 500),)), QWEN).size == (4096, 256)
    assert settle(Request("a", "image_to_image", images=(picture(4000, 300),)), QWEN).size == (4000, 304)
    assert parse_size("16:1", QWEN) == (4096, 256)
    assert parse_size("1:12", single) == (288, 3552)


def test_a_release_without_a_vae_area_takes_references_as_they_are():
    most = largest_area(NANO.defaults)
    assert NANO.defaults.vae_area == 0 and most == max(w * h for w, h in NANO.defaults.sizes.values())
    for named in NANO.defaults.sizes.values():  # its own pictures are never resized
        assert reference_size(*named, NANO.defaults) == named
    for side in (1, 7, 100, 151, 248, 264, 300, 1000, 4096):
        for other in range(side, min(16 * side, 4096) + 1, 97):
            width, height = reference_size(other, side, NANO.defaults)
            assert width % 16 == height % 16 == 0 and 256 <= width * height <= most
            assert reference_size(width, height, NANO.defaults) == (width, height)
    assert reference_size(100, 50, NANO.defaults) == (96, 48)
    assert reference_size(512, 512, NANO.defaults) == (256, 256)
    assert reference_size(4000, 2000, NANO.defaults) == (352, 176)
    assert reference_size(1920, 1080, EDIT.defaults) == fit_area(1024**2, 16 / 9)
    first, second = picture(192, 192), picture(224, 96)
    assert settle(Request("x", images=(first, second)), NANO).size == (192, 192)
    assert settle(Request("x", images=(second, first)), NANO).size == (224, 96)
    assert settle(Request("x", images=(first,), size=(64, 64)), NANO).size == (64, 64)


def test_size_words():
    assert parse_size("1664x928", QWEN) == parse_size("16:9", QWEN) == (1664, 928)
    assert parse_size("1:1", NANO) == (192, 192)
    width, height = parse_size("21:9", QWEN)
    assert width % 16 == height % 16 == 0
    assert width / height == pytest.approx(21 / 9, rel=0.02)
    assert width * height == pytest.approx(1328**2, rel=0.03)
    with pytest.raises(RequestError, match="Nearest: 1008×1008"):
        parse_size("1000x1001", QWEN)
    for wrong in (
        "",
        "big",
        "12",
        "0x0",
        "17x32",
        "100000x64",
        "-16x32",
        "0:1",
        "99:1",
        "1e3x16",
        "16x16x16",
    ):
        with pytest.raises(RequestError):
            parse_size(wrong, QWEN)


ONE = (picture(),)
WRONG = {
    "empty prompt": (QWEN, Request("  "), "empty"),
    "long prompt": (QWEN, Request("x" * 20_000), "20,000"),
    "long negative": (QWEN, Request("x", negative_prompt="x" * 5000), "5,000"),
    "surrogate": (QWEN, Request("caf\udce9"), "UTF-8"),
    "prompt of bytes": (QWEN, Request(b"cat"), "text"),
    "no prompts": (QWEN, Request(()), "0"),
    "one empty of two": (QWEN, Request(("a", "")), "empty"),
    "no steps": (QWEN, Request("x", steps=0), "steps"),
    "many steps": (QWEN, Request("x", steps=1001), "1000"),
    "steps in words": (QWEN, Request("x", steps="20"), "steps"),
    "steps true": (QWEN, Request("x", steps=True), "steps"),
    "guidance nan": (QWEN, Request("x", guidance_scale=float("nan")), "guidance"),
    "guidance inf": (QWEN, Request("x", guidance_scale=float("inf")), "guidance"),
    "guidance huge": (QWEN, Request("x", guidance_scale=10**400), "guidance"),
    "seed below": (QWEN, Request("x", seed=-1), "seed"),
    "seed above": (QWEN, Request("x", seed=2**63), "seed"),
    "last seed of a batch": (QWEN, Request("x", seed=2**63 - 1, count=2), "seed"),
    "no pictures wanted": (QWEN, Request("x", count=0), "count"),
    "too many wanted": (QWEN, Request("x", count=65), "count"),
    "odd size": (QWEN, Request("x", size=(1000, 1001)), "1008×1008"),
    "no size": (QWEN, Request("x", size=(0, 0)), "16×16"),
    "size of three": (QWEN, Request("x", size=(16, 16, 16)), "two numbers"),
    "size of halves": (QWEN, Request("x", size=(16.5, 16)), "side"),
    "strength above": (QWEN, Request("x", images=ONE, strength=1.5), "strength"),
    "strength none": (QWEN, Request("x", images=ONE, strength=0.0), "strength 0"),
    "strength without picture": (QWEN, Request("x", strength=0.5), "strength"),
    "strength of an edit": (EDIT, Request("x", images=ONE, strength=0.5), "strength"),
    "unknown task": (QWEN, Request("x", task="sculpt"), "sculpt"),
    "task of another release": (QWEN, Request("x", task="edit", images=ONE), "can't do edit"),
    "edit without picture": (EDIT, Request("x"), "at least one"),
    "layers without picture": (LAYERED, Request(), "picture"),
    "too many pictures": (EDIT, Request("x", images=ONE * 2), "at most 1"),
    "picture for text": (QWEN, Request("x", task="text_to_image", images=ONE), "no picture"),
    "narrow picture": (EDIT, Request("x", images=(picture(4000, 10),)), "narrow"),
    "mask without picture": (QWEN, Request("x", mask=picture(mode="L")), "picture"),
    "mask of another size": (QWEN, Request("x", images=ONE, mask=picture(8, 8, "L")), "same size"),
    "black mask": (QWEN, Request("x", images=ONE, mask=Image.new("L", (64, 48))), "black"),
    "dark mask of 16 bits": (QWEN, Request("x", images=ONE, mask=Image.new("I;16", (64, 48), 32_000)), "black"),
    "no prompt": (QWEN, Request(None), "must be text"),
    "a number as prompt": (QWEN, Request(7), "must be text"),
    "inpaint without mask": (QWEN, Request("x", task="inpaint", images=ONE), "mask"),
    "unknown option": (QWEN, Request("x", options={"layers": 3}), "layers"),
    "layers zero": (LAYERED, Request(images=ONE, options={"layers": 0}), "layers"),
    "resolution 700": (LAYERED, Request(images=ONE, options={"resolution": 700}), "640 or 1024"),
    "size of layers": (LAYERED, Request(images=ONE, size=(64, 64)), "ratio"),
    "rising sigmas": (QWEN, Request("x", options={"sigmas": [0.5, 0.9]}), "falling"),
    "sigmas and steps": (QWEN, Request("x", steps=3, options={"sigmas": [1.0, 0.5]}), "2 sigmas"),
    "control backwards": (
        QWEN,
        Request("x", task="controlnet", images=ONE, options={"control_start": 0.8, "control_end": 0.2}),
        "control_start",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_requests_are_one_sentence(case):
    spec, request_, word = WRONG[case]
    with pytest.raises(RequestError) as caught:
        settle(request_, spec)
    assert word in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I", "L", "1"])
def test_a_mask_that_draws_anything_is_taken(mode):
    level = {"1": 1, "L": 128}.get(mode, 32_768)
    assert settle(Request("x", images=ONE, mask=Image.new(mode, (64, 48), level)), QWEN).task == "inpaint"


def test_sigmas_set_the_steps():
    settled = settle(Request("x", options={"sigmas": [1.0, 0.5, 0.25]}), QWEN)
    assert settled.steps == 3
    assert settle(settled, QWEN) == settled


BASE = {"_class_name": "QwenImageTransformer2DModel", "num_layers": 60}
VAE3, VAE4 = {"input_channels": 3}, {"input_channels": 4}


@pytest.mark.parametrize(
    ("index", "transformer", "vae", "hint", "name"),
    [
        ("QwenImagePipeline", {}, VAE3, "Qwen-Image", "qwen-image"),
        ("QwenImagePipeline", {}, {}, "models--Qwen--Qwen-Image-2512", "qwen-image-2512"),
        ("QwenImagePipeline", {}, VAE3, "anything/nano", "nano"),
        ("QwenImagePipeline", {}, VAE3, "nanometre", "qwen-image"),
        ("QwenImageEditPlusPipeline", {}, VAE3, "anything/nano", "nano"),
        ("QwenImageEditPipeline", {}, VAE3, "x", "qwen-image-edit"),
        ("QwenImageEditPlusPipeline", {}, VAE3, "x", "qwen-image-edit-2509"),
        ("QwenImageEditPlusPipeline", {"zero_cond_t": True}, VAE3, "x", "qwen-image-edit-2511"),
        ("QwenImageLayeredPipeline", {"use_layer3d_rope": True}, VAE4, "x", "qwen-image-layered"),
        ("QwenImage21Pipeline", {"_class_name": SINGLE_STREAM}, {}, "x", "qwen-image-2.1"),
        ("QwenImage21Pipeline", {"_class_name": SINGLE_STREAM}, {}, "Qwen-Image-2.1-Turbo", "qwen-image-2.1-turbo"),
    ],
)
def test_detect(index, transformer, vae, hint, name):
    assert detect({"_class_name": index}, BASE | transformer, vae, hint) == name
    assert name in spec_names()


def test_detect_without_an_index():
    assert detect({}, BASE) == "qwen-image"
    assert detect({"processor": ["transformers", "Qwen2VLProcessor"]}, BASE) == "qwen-image-edit-2509"
    assert detect({}, BASE | {"use_layer3d_rope": True}, VAE4) == "qwen-image-layered"


@pytest.mark.parametrize(
    ("index", "transformer", "vae", "word"),
    [
        ("QwenImage21Pipeline", {}, {}, "mixed up"),
        ("QwenImagePipeline", {"_class_name": "QwenImage21Transformer2DModel"}, {}, "mixed up"),
        ("FluxPipeline", {}, {}, "FluxPipeline"),
        ("QwenImagePipeline", {"_class_name": "FluxTransformer2DModel"}, {}, "Flux"),
        ("QwenImageLayeredPipeline", {"use_layer3d_rope": True}, VAE3, "3 channels"),
        ("QwenImageLayeredPipeline", {}, VAE4, "mixed up"),
    ],
)
def test_detect_refuses(index, transformer, vae, word):
    with pytest.raises(ModelError, match=word):
        detect({"_class_name": index}, BASE | transformer, vae)
