"""A budget of GPU memory reaches CUDA's allocator, without a GPU."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from lanting.core.errors import RequestError
from lanting.engine.fit import hold
from lanting.engine.phases import sentences
from lanting.plan.costs import DRIVER


@pytest.mark.parametrize(("name", "number"), [("cuda", 1), ("cuda:0", 0)])
def test_a_budget_is_a_share_of_one_numbered_device(monkeypatch, name, number):
    told = []

    def fraction(share: float, device: object) -> None:
        assert isinstance(device, int), "torch wants a number here: a device without one is refused"
        told.append((share, device))

    total = 24 * 10**9
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=total))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", fraction)
    hold(torch.device(name), "12G")
    assert told == [(pytest.approx((12 * 10**9 - DRIVER) / total, rel=0.08), number)]
    hold(torch.device(name), None)
    hold(torch.device("cpu"), "12G")
    assert len(told) == 1


@pytest.mark.parametrize(
    "error",
    [
        torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("MPS backend out of memory (MPS allocated: 17.02 GB, max allowed: 18.13 GB)."),
    ],
)
def test_too_little_memory_is_a_sentence_on_every_device(error):
    with pytest.raises(RequestError, match="mps has too little memory"), sentences(torch.device("mps")):
        raise error
    with pytest.raises(RuntimeError, match="something else"), sentences(torch.device("mps")):
        raise RuntimeError("something else")
