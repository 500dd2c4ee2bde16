"""The embedded model end to end: it writes, the engine keeps its promises, and diffusers draws the same."""

from __future__ import annotations

import threading
import time
from contextlib import closing
from itertools import islice

import numpy as np
import pytest
import torch

from lanting import Engine, Progress, Request, Result, read_recipe, save_picture
from lanting.core.errors import LantingError, ModelError, RequestError
from lanting.core.readings import hits
from lanting.core.recipe import restore_request
from lanting.reading.reader import read_lines
from lanting.weights.find import embedded_nano
from processor import processor_seconds

HELLO = 'A blue sign that says "HELLO"'


def pixels(image):
    return np.asarray(image, dtype=np.int16)


@pytest.mark.parametrize(
    ("prompt", "lines"),
    [
        (HELLO, ["HELLO"]),
        ('a red sign with white text "Fresh Bread" and a frame', ["Fresh", "Bread"]),
        ('yellow sign, black letters, "TAXI"', ["TAXI"]),
    ],
)
def test_it_writes_what_was_asked(nano, prompt, lines):
    image = nano.run(Request(prompt=prompt, seed=7)).images[0]
    assert all(hits(lines, read_lines(image))), read_lines(image)


def test_ground_and_letters_have_the_asked_colours(nano):
    image = pixels(nano.run(Request(prompt='a yellow sign with black letters that says "OPEN"', seed=3)).images[0])
    corner, darkest = image[:8, :8].reshape(-1, 3).mean(0), image.reshape(-1, 3).min(0)
    assert corner[0] > 200 and corner[1] > 170 and corner[2] < 110
    assert darkest.max() < 70


def test_the_seed_decides_and_a_batch_is_its_pictures_one_by_one(nano):
    batch = nano.run(Request(prompt=HELLO, seed=5, count=2)).images
    alone = [nano.run(Request(prompt=HELLO, seed=seed)).images[0] for seed in (5, 6)]
    for a, b in zip(batch, alone, strict=True):
        assert np.abs(pixels(a) - pixels(b)).max() <= 1  # batched products round differently in the last bit
    assert np.abs(pixels(alone[0]) - pixels(alone[1])).max() > 0


def test_progress_previews_and_the_result_come_in_order(nano):
    events = list(nano.stream(Request(prompt=HELLO, seed=1, steps=4), previews=True))
    assert isinstance(events[-1], Result) and all(isinstance(e, Progress) for e in events[:-1])
    steps = [e for e in events[:-1] if e.phase == "denoise"]
    assert [e.step for e in steps] == [1, 2, 3, 4]
    assert all(e.preview is not None and e.preview.size == (28, 12) for e in steps)
    blue = pixels(steps[-1].preview).reshape(-1, 3).mean(0)
    assert blue[2] > blue[0] + 40, "the projection should already show a blue sign"
    assert set(events[-1].seconds) == {"load", "encode", "denoise", "decode"}


def test_closing_the_stream_cancels_and_frees_the_engine(nano):
    stream = nano.stream(Request(prompt=HELLO, seed=1, steps=500))
    began = time.perf_counter()
    assert len(list(islice(stream, 4))) == 4
    stream.close()
    nano.run(Request(prompt=HELLO, seed=1, steps=1))
    assert time.perf_counter() - began < 20


def test_a_thread_is_not_left_to_wait_for_itself():
    """While a drawing of its own is unfinished, on an engine of its own, as a thread that waits holds it for ever."""
    engine, asked, heard = Engine.open("nano", device="cpu"), Request(prompt=HELLO, seed=1, steps=1), []

    def begun():
        next(stream := engine.stream(asked))
        return stream

    def draw():
        for begin in (begun, engine.together):
            with closing(begin()):
                for other in (lambda: engine.run(asked), engine.set_strengths, engine.together, engine.close):
                    try:
                        other()
                    except LantingError as error:
                        heard.append(str(error))
        heard.append(engine.run(asked).images[0].size)

    thread = threading.Thread(target=draw, daemon=True)
    thread.start()
    thread.join(60)
    assert len(heard) == 9 and all("finish or close" in one for one in heard[:-1]), heard


def test_a_stream_may_go_on_in_another_thread_for_which_its_first_one_waits(nano):
    stream, rest = nano.stream(Request(prompt=HELLO, seed=1, steps=2)), []
    next(stream)
    going, gone_on = threading.Event(), threading.Event()

    def go_on():
        rest.append(next(stream))
        going.set()
        time.sleep(0.2)
        rest.extend(stream)
        gone_on.set()

    threading.Thread(target=go_on, daemon=True).start()
    assert going.wait(60)
    nano.run(Request(prompt=HELLO, seed=1, steps=1))
    assert gone_on.is_set() and isinstance(rest[-1], Result)


def test_a_wrong_request_is_refused_before_anything_is_drawn(nano):
    with pytest.raises(RequestError):
        nano.stream(Request(prompt=HELLO, size=(100, 100)))


def test_threads_take_turns_and_get_their_own_pictures(nano):
    alone = {seed: nano.run(Request(prompt=HELLO, seed=seed, steps=3)).images[0] for seed in (1, 2, 3)}
    drawn: dict[int, object] = {}

    def draw(seed):
        drawn[seed] = nano.run(Request(prompt=HELLO, seed=seed, steps=3)).images[0]

    threads = [threading.Thread(target=draw, args=(seed,)) for seed in alone]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed, image in alone.items():
        assert image.tobytes() == drawn[seed].tobytes()


def test_a_picture_repeats_itself_from_its_recipe(nano, tmp_path):
    result = nano.run(Request(prompt=HELLO, seed=11))
    path = save_picture(result.images[0], tmp_path / "sign.png", result.recipes[0])
    recipe = read_recipe(path)
    assert recipe.model == "nano" and recipe.weights == nano.models.fingerprint
    again = nano.run(restore_request(recipe.request))
    assert again.images[0].tobytes() == result.images[0].tobytes()


def test_image_to_image_and_inpaint_keep_what_they_should(nano):
    from PIL import Image

    source = nano.run(Request(prompt='a blue sign that says "OPEN"', seed=1)).images[0]
    mask = Image.new("L", source.size)
    mask.paste(255, (112, 0, 224, 96))
    painted = nano.run(
        Request(prompt='a blue sign that says "OPEN"', images=(source,), mask=mask, seed=2, task="inpaint")
    ).images[0]
    left = np.abs(pixels(painted)[:, :96] - pixels(source)[:, :96])
    assert left.mean() < 6, "the black half of the mask stays"
    near = nano.run(Request(prompt=HELLO, images=(source,), task="image_to_image", strength=0.1, seed=2)).images[0]
    assert np.abs(pixels(near) - pixels(source)).mean() < 12, "a little strength changes little"


def test_guidance_batched_or_not_is_the_same_picture(nano):
    one, two = (
        nano.run(Request(prompt=HELLO, seed=4, steps=4, guidance_scale=2.0, options={"batched_guidance": b})).images[0]
        for b in (False, True)
    )
    assert np.abs(pixels(one) - pixels(two)).max() <= 2


def test_diffusers_draws_the_same_pictures_from_the_same_folder(nano):
    from diffusers import QwenImagePipeline

    pipe = QwenImagePipeline.from_pretrained(embedded_nano(), torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    for prompt, size, guidance in ((HELLO, (224, 96), 1.0), ('a green square sign "Tea"', (192, 192), 2.0)):
        ours = nano.run(Request(prompt=prompt, seed=7, size=size, steps=6, guidance_scale=guidance)).images[0]
        theirs = pipe(
            prompt=prompt,
            negative_prompt=" ",
            true_cfg_scale=guidance,
            width=size[0],
            height=size[1],
            num_inference_steps=6,
            generator=torch.Generator().manual_seed(7),
        ).images[0]
        assert np.abs(pixels(ours) - pixels(theirs)).max() <= 1


def test_bfloat16_draws_the_same_words(nano):
    engine = Engine.open("nano", device="cpu", dtype="bfloat16")
    image = engine.run(Request(prompt=HELLO, seed=7)).images[0]
    assert hits(["HELLO"], read_lines(image)) == [True]


def test_unknown_models_are_one_sentence():
    for name in ("no-such-model", "/no/such/folder", "qwen-image-2512"):
        with pytest.raises(ModelError) as caught:
            Engine.open(name)
        assert "\n" not in str(caught.value)


def test_a_cold_start_to_a_picture_takes_less_than_eight_seconds(tmp_path):
    """On a machine that is slow just now at most three times as long as torch needs to be imported at all."""
    out = tmp_path / "sign.png"
    spent = processor_seconds("-m", "lanting", "generate", HELLO, "--seed", "7", "-o", str(out))
    assert out.exists() and (spent < 8 or spent < 3 * processor_seconds("-c", "import torch"))


def test_the_shipped_files_are_small():
    total = sum(p.stat().st_size for p in embedded_nano().rglob("*") if p.is_file())
    assert total <= 36e6
