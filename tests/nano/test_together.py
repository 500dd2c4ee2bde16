"""Drawings that share their steps are the drawings they are alone, whoever comes, goes or fails beside them.

Bit by bit where rows are computed one like the other, which our kernels do; where torch's own products are used, in
another order for another number of rows, up to grey levels, and nothing is shared without being asked for.
"""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from lanting import Progress, Request, RequestError, Result
from lanting.attach.sentinel import HIGHEST
from lanting.core.checkpoint import Checkpoint
from lanting.engine import together as module
from lanting.engine.room import room
from lanting.engine.together import Seat, Together
from lanting.plan.activations import Job
from lanting.plan.kinds import KINDS, plain
from lanting.plan.model import Model
from lanting.plan.room import seats
from lanting.specs import get_spec, settle

SHORT, LONG = "a sign", 'a blue sign with white text "Fresh Bread and Coffee" and a red border'
CHINESE = "绿色招牌“茶馆”，白色的字"
WISHES = [
    Request(SHORT, seed=1, steps=5),
    Request(LONG, seed=2, steps=5),
    Request(CHINESE, seed=3, steps=5, guidance_scale=1.0),
    Request('a red sign that says "STAY"', seed=4, steps=5, count=2, guidance_scale=3.5, negative_prompt="a long word"),
]


@pytest.fixture(scope="module")
def alone(as_usual):
    """What each wish is by itself."""
    return [as_usual.run(wish) for wish in WISHES]


@pytest.fixture(scope="module")
def most(as_usual):
    """Grey levels by which pictures may differ on this machine."""
    with closing(as_usual.together()) as crew:
        for wish in WISHES[:2]:
            crew.join(wish)
        drawn(crew, {})
        return 8 if crew.apart else 0


@pytest.fixture(scope="module")
def sharing(as_usual, most):
    return lambda: closing(as_usual.together(forced=most > 0))


def same(ours: Result, theirs: Result, most: int) -> bool:
    pairs = [(np.asarray(a, int), np.asarray(b, int)) for a, b in zip(ours.images, theirs.images, strict=True)]
    return all(np.abs(a - b).max() <= most for a, b in pairs) and ours.recipes == theirs.recipes


def drawn(crew: Together, found: dict[Seat, list]) -> None:
    """To the end, or until they part."""
    while crew.seats and not crew.apart:
        for seat, event in crew.round():
            found.setdefault(seat, []).append(event)


def test_together_is_alone(as_usual, sharing, most, alone):
    found: dict[Seat, list] = {}
    with sharing() as crew:
        chairs = [crew.join(wish, previews=True, every=2) for wish in WISHES]
        drawn(crew, found)
    for chair, whole in zip(chairs, alone, strict=True):
        *events, result = found[chair]
        assert same(result, whole, most)
        steps = [one.step for one in events if isinstance(one, Progress) and one.phase == "denoise"]
        assert steps == [1, 2, 3, 4, 5] and [one.step for one in events if isinstance(one, Checkpoint)] == [2, 4]
        assert all(one.preview for one in events if isinstance(one, Progress) and one.phase == "denoise")
        assert chair.work > 0
    assert same(as_usual.run(WISHES[0]), alone[0], 0)  # nothing stays on the networks


def test_coming_and_going_between_steps(as_usual, sharing, most, alone):
    found: dict[Seat, list] = {}
    with sharing() as crew:
        chairs = []
        for wish in WISHES:
            chairs.append(crew.join(wish))
            if len(chairs) == 3:
                crew.leave(chairs[1])
            for seat, event in crew.round():
                found.setdefault(seat, []).append(event)
        drawn(crew, found)
    for number in (0, 2, 3):
        assert same(found[chairs[number]][-1], alone[number], most)
    assert not any(isinstance(one, Result) for one in found[chairs[1]])


def test_other_sizes_schedules_and_tasks_beside(as_usual, sharing, most):
    picture = Image.new("RGB", (224, 96), "navy")
    others = [
        Request(SHORT, seed=5, steps=3, size=(128, 64)),
        Request(LONG, seed=6, steps=4),
        Request((SHORT, LONG), seed=7, steps=3),  # padded by itself
        Request("make it red", seed=8, steps=3, images=(picture,)),
        Request("a red sign", task="image_to_image", seed=9, steps=4, images=(picture,), strength=0.8),
    ]
    found: dict[Seat, list] = {}
    with sharing() as crew:
        chairs = [crew.join(wish) for wish in others]
        drawn(crew, found)
    for chair, wish in zip(chairs, others, strict=True):
        assert same(found[chair][-1], as_usual.run(wish), most)


def test_an_error_in_one_is_its_own(as_usual, sharing, most, alone, monkeypatch):
    finish = as_usual._finish

    def broken(canvas, last):
        if canvas.guidance_scale == 1.0:
            raise RequestError("the picture can't be finished: try another")
        return finish(canvas, last)

    monkeypatch.setattr(as_usual, "_finish", broken)
    found: dict[Seat, list] = {}
    with sharing() as crew:
        chairs = [crew.join(wish) for wish in WISHES]
        drawn(crew, found)
    assert isinstance(found[chairs[2]][-1], RequestError)
    for number in (0, 1, 3):
        assert same(found[chairs[number]][-1], alone[number], most)


@pytest.mark.parametrize("trouble", ["raises", "not finite", "not possible", "no memory"])
def test_trouble_in_a_common_step_leaves_everybody_where_he_is(as_usual, sharing, most, alone, monkeypatch, trouble):
    plain, calls = module.velocities, []

    def broken(model, asked, most):
        calls.append(len(asked))
        found = plain(model, asked, most)
        if len(calls) < 4:
            return found
        if trouble == "raises":
            raise RuntimeError("a kernel broke")
        if trouble == "no memory":
            raise MemoryError
        found[1] = torch.full_like(found[1], torch.nan if trouble == "not finite" else 2 * HIGHEST)
        return found

    monkeypatch.setattr(module, "velocities", broken)
    with sharing() as crew:
        chairs = [crew.join(wish) for wish in WISHES[:2]]
        drawn(crew, {})
        assert crew.apart
        aside = [crew.put_aside(chair) for chair in chairs]
    assert [one.step for one in aside if one] == [3, 3]
    for wish, checkpoint, whole in zip(WISHES, aside, alone, strict=False):
        *_, result = as_usual.stream_resumable(wish, resume=checkpoint)
        assert same(result, whole, most)


def test_a_drawing_goes_on_among_others(as_usual, sharing, most, alone):
    events = as_usual.stream_resumable(WISHES[1], every=2)
    kept = next(event for event in events if isinstance(event, Checkpoint))
    events.close()
    found: dict[Seat, list] = {}
    with sharing() as crew:
        chairs = [crew.join(WISHES[0]), crew.join(WISHES[1], resume=kept)]
        assert crew.put_aside(chairs[1]) == kept
        drawn(crew, found)
    for chair, whole in zip(chairs, alone, strict=False):
        assert same(found[chair][-1], whole, most)


def test_where_bits_differ_nothing_is_shared_unless_asked_for(as_usual, monkeypatch):
    plain = module.velocities
    monkeypatch.setattr(as_usual, "proved", {})
    monkeypatch.setattr(module, "velocities", lambda *asked: [one * 1.01 for one in plain(*asked)])
    assert as_usual.room(WISHES[0]) == 6
    with closing(as_usual.together()) as crew:
        for wish in WISHES[:2]:
            crew.join(wish)
        drawn(crew, {})
        assert "bits" in crew.apart
    assert (as_usual.room(WISHES[0]), as_usual.room(WISHES[0], 3)) == (1, 3)
    found: dict[Seat, list] = {}
    with closing(as_usual.together(forced=True)) as crew:
        crew.join(WISHES[0])
        drawn(crew, found)
    assert any(isinstance(events[-1], Result) for events in found.values())


def test_who_may_share(as_usual, most, monkeypatch):
    def places(asked: int | None = None, **more: object) -> int:
        return as_usual.room(replace(WISHES[0], **more), asked)

    usual = [places(), places(guidance_scale=1.0), places(size=(256, 256))]
    assert usual == ([1, 1, 1] if most else [6, 6, 1])
    assert places(size=(256, 256), asked=3) == 3 and places(asked=1) == 1
    assert places(quality="high") == places(prompt=(SHORT, LONG)) == places(options={"batched_guidance": True}) == 1
    with pytest.raises(RequestError):
        places(steps=0)
    monkeypatch.setattr(as_usual.known(), "ways", {"transformer.proj_out": "plain"})
    assert places() == 1


def test_memory_bounds_it(as_usual, monkeypatch):
    """The planner's arithmetic: full-size, and what nano finds free."""
    spec = get_spec("qwen-image")
    model = Model("x", spec)
    job, how = Job(size=(512, 512), text=100), ("bfloat16", True)
    found = [seats(model, job, KINDS["int4"], how, spare * 10**8, 8) for spare in (0, 2, 4, 8, 16, 64)]
    assert found[0] == 1 and found[-1] == 8 and found == sorted(found) and len(set(found)) > 3
    assert seats(model, replace(job, size=(1024, 1024)), plain("bfloat16"), how, 8 * 10**8, 8) < found[3]
    settled = settle(WISHES[0], as_usual.spec)
    monkeypatch.setattr("lanting.engine.room.free_bytes", lambda device: 0)
    assert room(as_usual.models, settled, 4, None) == 1
