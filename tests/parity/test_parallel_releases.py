"""Every kind of model and task drawn by several devices: with sides of the guidance shared out, to the last bit.

Followers are threads here, which load their own weights and are talked to over pipes as processes are
(tests/unit/test_parallel.py has those).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import tiny
import tiny21

from following import ThreadPeer
from lanting import Engine, Request
from lanting.attach.parallel import Shared
from lanting.engine.parallel_follower import Follower
from lanting.nn.single_stream import QwenImage21Transformer
from lanting.specs.sizes import fit_area
from loras import over_attention
from plans import plan

AREA, SIDE = 64 * 96, 96
WORDS = 'a red sign that says "HI"'
LONGER = "a much longer prompt, about a blue sign with white letters"


@pytest.fixture(autouse=True)
def threads(monkeypatch):
    monkeypatch.setattr("lanting.engine.parallel.Peer", ThreadPeer)
    monkeypatch.setattr("lanting.engine.parallel_split.WORTH", 1)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root, names = tmp_path_factory.mktemp("models"), ("qwen-image", "qwen-image-edit-2511", "qwen-image-layered")
    made = {name: tiny.save_folder(root / name, name) for name in names}
    return made | {"two-one": tiny21.save_folder(root / "two-one")}


@pytest.fixture
def calls(monkeypatch):
    """What followers were asked for: branches."""
    asked, step = [], Follower.step
    monkeypatch.setattr(Follower, "step", lambda self, **given: asked.append(given["branch"]) or step(self, **given))
    return asked


@contextmanager
def opened(folder, device, **options) -> Iterator[Engine]:
    with Engine.open(str(folder), device=device, dtype="float32", **options) as engine:
        small = replace(engine.spec.defaults, vl_area=AREA, vae_area=AREA)
        engine.models.spec = replace(engine.spec, defaults=small)
        yield engine


def request(**values):
    common = {"prompt": WORDS, "negative_prompt": "blurry", "steps": 3, "guidance_scale": 4.0, "seed": 7}
    return Request(**{"size": (96, 64), **common, **values})


def drawn(folder, asked, device, **options):
    """Pictures, recipes, and what was told."""
    with opened(folder, device, **options) as engine:
        events: list[Any] = list(engine.stream(asked))
    result = events.pop()
    told = [notice.sentence.format(**notice.values) for event in events for notice in event.notices]
    return np.stack([np.asarray(image, np.int16) for image in result.images]), result.recipes, told


def same(folder, asked, device="cpu,cpu", **options):
    alone, recipes, _ = drawn(folder, asked, "cpu", **options)
    found, theirs, told = drawn(folder, asked, device, **options)
    assert alone.std() > 10
    return np.array_equal(found, alone) and recipes == theirs and told == []


def test_prompts_of_different_length_in_a_batch(folders, calls):
    assert same(folders["qwen-image"], request(prompt=(WORDS, LONGER), count=2))
    assert calls == ["negative"] * 3


def test_a_repainted_picture(folders):
    mask = tiny.mask(96, 64, (30, 10, 80, 50))
    asked = request(images=(tiny.picture(96, 64),), mask=mask, strength=0.9, steps=4)
    assert same(folders["qwen-image"], asked)


def test_references_at_time_zero(folders, calls):
    pictures = tuple(tiny.picture(96 + 32 * i, 64, seed=i) for i in range(2))
    assert same(folders["qwen-image-edit-2511"], request(prompt="make it green", images=pictures, size=None))
    assert calls == ["negative"] * 3


def test_layers(folders, monkeypatch):
    small = lambda area, ratio: fit_area(96 * 96, ratio)  # noqa: E731
    monkeypatch.setattr(sys.modules["lanting.specs.settle"], "fit_area", small)
    source = tiny.picture(96, 64, mode="RGBA")
    assert same(folders["qwen-image-layered"], request(images=(source,), options={"layers": 2}, size=None))


def test_control(folders, tmp_path, calls):
    """Residuals are the leader's, and travel: all of them, or each device's part."""
    net = str(tiny.save_controlnet(tmp_path / "union"))
    asked = request(task="controlnet", images=(tiny.picture(96, 64),), options={"control_scale": 0.8})
    assert same(folders["qwen-image"], asked, controlnet=net)
    assert calls == ["negative"] * 3
    near(folders["qwen-image"], replace(asked, guidance_scale=1.0), "cpu,cpu", "2", controlnet=net)


@pytest.mark.parametrize("kept", [True, False])
def test_two_one_reads_its_words_once_on_every_device(folders, monkeypatch, kept):
    """Leader and follower keep a prefix each, or neither."""
    counted, whole = [], QwenImage21Transformer.prefix
    monkeypatch.setattr(QwenImage21Transformer, "prefix", lambda self, *x: counted.append(1) or whole(self, *x))
    asked = request(prompt="make it green", images=(tiny.picture(96, 64, seed=1),), size=None)
    given = plan(blocks=2, prefix_kept=kept)
    assert same(folders["two-one"], asked, plan=given)
    assert len(counted) == (4 if kept else 12)
    if kept:
        without = replace(asked, guidance_scale=1.0)
        found, _, told = drawn(folders["two-one"], without, "cpu,cpu", plan=given)
        assert np.array_equal(found, drawn(folders["two-one"], without, "cpu", plan=given)[0])
        assert told == ["nothing in this picture can be shared out: cpu draws it alone"]


def test_packed_streamed_and_with_a_lora(folders, tmp_path, calls):
    folder, ink = folders["qwen-image"], over_attention(tmp_path / "ink.safetensors", folders["qwen-image"], 1)
    streamed = plan(resident_blocks=1, streamed="disk", modulation_table=True, encoder="unload")
    options = {"loras": (f"{ink}:0.7",), "quant": "int8", "plan": streamed}
    assert same(folder, request(), **options)
    assert calls == ["negative"] * 3
    pictures = []
    for device in ("cpu", "cpu,cpu"):
        with opened(folder, device, **options) as engine:
            engine.run(request())
            engine.set_strengths(-0.4)
            pictures.append(np.asarray(engine.run(request()).images[0]))
    assert np.array_equal(*pictures)


def test_one_call_for_both_sides_stays_one(folders, calls):
    asked = request(options={"batched_guidance": True})
    near(folders["qwen-image"], asked, "cpu,cpu", "2")
    assert calls == ["both"] * 3


@pytest.mark.parametrize(
    ("device", "guided", "branches"),
    [
        ("cpu,cpu", False, {"positive": 3}),
        ("cpu,cpu,cpu,cpu", True, {"positive": 3, "negative": 6}),  # two sides of two
    ],
)
def test_tokens_are_shared_out(folders, calls, monkeypatch, device, guided, branches):
    """Within a grey level, and the recipe says so."""
    seen, call = [], Shared.__call__
    monkeypatch.setattr(Shared, "__call__", lambda self, *x, **y: seen.append(self.seat.rank) or call(self, *x, **y))
    asked = request(
        prompt="make it green", images=(tiny.picture(96, 64),), size=None, guidance_scale=4.0 if guided else 1
    )
    near(folders["qwen-image-edit-2511"], asked, device, str(len(device.split(","))))
    assert {branch: calls.count(branch) for branch in calls} == branches
    assert len(seen) == 3 * len(device.split(","))


def near(folder, asked, device, devices, **options):
    alone, (recipe, *_), _ = drawn(folder, asked, "cpu", **options)
    found, (other, *_), told = drawn(folder, asked, device, **options)
    assert told == [] and np.abs(found - alone).max() <= 1 and alone.std() > 10
    assert other.versions == {**recipe.versions, "devices": devices} and other.request == recipe.request
