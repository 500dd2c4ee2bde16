"""A drawing that is put aside and gone on with is the drawing that was never interrupted, to the last bit."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from lanting import Progress, Request, RequestError
from lanting.core.checkpoint import Checkpoint

PICTURE = Image.new("RGB", (224, 96), "navy")
MASK = Image.new("L", (224, 96), 0)
MASK.paste(255, (0, 0, 112, 96))
WISHES = {
    "text_to_image": Request('a red sign that says "GO"', seed=3, count=2),
    "image_to_image": Request("a red sign", task="image_to_image", seed=3, images=(PICTURE,), strength=0.9),
    "inpaint": Request("a red sign", task="inpaint", seed=3, images=(PICTURE,), mask=MASK),
    "edit": Request("make it red", seed=3, images=(PICTURE,)),
    "edit_inpaint": Request("make it red", seed=3, images=(PICTURE,), mask=MASK),
}


@pytest.mark.parametrize("task", WISHES)
def test_resumed_is_uninterrupted(as_usual, task):
    whole = as_usual.run(WISHES[task])
    assert whole.recipes[0].task == task
    kept = [event for event in as_usual.stream_resumable(WISHES[task], every=1) if isinstance(event, Checkpoint)]
    assert [one.step for one in kept] == list(range(1, kept[0].steps))
    for checkpoint in (kept[0], kept[-1]):
        *events, result = as_usual.stream_resumable(WISHES[task], resume=Checkpoint.from_bytes(checkpoint.to_bytes()))
        steps = [event.step for event in events if isinstance(event, Progress) and event.phase == "denoise"]
        assert steps == list(range(checkpoint.step + 1, checkpoint.steps + 1))
        for ours, theirs in zip(result.images, whole.images, strict=True):
            assert np.array_equal(np.asarray(ours), np.asarray(theirs))


def test_how_often_and_never(as_usual):
    def steps(every: int) -> list[int]:
        events = as_usual.stream_resumable(replace(WISHES["edit"], steps=7), every=every)
        return [event.step for event in events if isinstance(event, Checkpoint)]

    assert (steps(3), steps(7), steps(0)) == ([3, 6], [], [])


def test_a_checkpoint_of_another_drawing_is_refused(as_usual):
    kept = next(event for event in as_usual.stream_resumable(WISHES["edit"], every=2) if isinstance(event, Checkpoint))
    for other in (replace(WISHES["edit"], seed=4), replace(WISHES["edit"], prompt="x"), WISHES["text_to_image"]):
        with pytest.raises(RequestError, match="another drawing"):
            next(iter(as_usual.stream_resumable(other, resume=kept)))
    for wrong in (replace(kept, step=0), replace(kept, step=99), replace(kept, latents=b"x")):
        with pytest.raises(RequestError, match="another drawing"):
            next(iter(as_usual.stream_resumable(WISHES["edit"], resume=wrong)))


@pytest.mark.parametrize("data", [b"", b"{}", b"{\n", b"[1]\n", b'{"lanting-checkpoint": 99}\n', b"\xff" * 50])
def test_bytes_that_are_no_checkpoint(data):
    with pytest.raises(RequestError, match="no checkpoint"):
        Checkpoint.from_bytes(data)
