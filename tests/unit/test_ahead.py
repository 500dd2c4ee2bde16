"""Reading one network beside another: the same picture, and the same sentence when it fails."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

from lanting import Engine, Request
from lanting.core.errors import ModelError
from lanting.engine import models as module
from lanting.engine.ahead import Ahead
from lanting.engine.models import Models

REQUEST = Request('A blue sign that says "HI"', steps=2, seed=3)


def always_ahead(self: Models) -> None:
    """`look_ahead` as on a GPU."""
    self.ahead.begin(lambda: self.placed_transformer)
    _ = self.encoder


def test_work_is_done_once_and_waited_for():
    ahead, seen, gate = Ahead(), [], threading.Event()

    def work() -> None:
        gate.wait(10)
        seen.append(torch.is_grad_enabled())

    ahead.begin(work)
    ahead.begin(work)
    assert not seen
    gate.set()
    ahead.meet()
    ahead.meet()
    assert seen == [False]


def test_what_it_raises_is_raised_where_it_is_met():
    ahead = Ahead()
    ahead.begin(lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        ahead.meet()
    ahead.begin(lambda: 1 / 0)
    ahead.end()
    ahead.meet()


def test_the_picture_is_the_same(monkeypatch):
    with Engine.open("nano", device="cpu") as engine:
        wanted = np.asarray(engine.run(REQUEST).images[0])
    monkeypatch.setattr(Models, "look_ahead", always_ahead)
    with Engine.open("nano", device="cpu") as engine:
        assert np.array_equal(np.asarray(engine.run(REQUEST).images[0]), wanted)
        assert np.array_equal(np.asarray(engine.run(REQUEST).images[0]), wanted)


def test_a_transformer_that_cannot_be_read_is_a_sentence(monkeypatch):
    def broken(*_: object) -> None:
        raise ModelError("The file is damaged; pull it again.")

    monkeypatch.setattr(Models, "look_ahead", always_ahead)
    monkeypatch.setattr(module, "store_transformer", broken)
    with Engine.open("nano", device="cpu") as engine, pytest.raises(ModelError, match="damaged"):
        engine.run(REQUEST)
    assert engine.models.ahead.future is None
