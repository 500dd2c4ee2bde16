"""Teaching a LoRA: seeds that count, lists and pictures as people have them, and whatever Linears are named."""

from __future__ import annotations

import torch

from lanting.train.lora.run import LoraRun


def test_another_seed_is_another_noise():
    draw = lambda seed, number: torch.Generator().manual_seed(LoraRun(seed=seed).seed_of(number))  # noqa: E731
    seen = {tuple(torch.randn(3, generator=draw(seed, number)).tolist()) for seed in (0, 1, 2) for number in range(9)}
    assert len(seen) == 27
    assert [LoraRun().seed_of(number) for number in range(3)] == [0, 1, 2]
    assert 0 <= LoraRun(seed=-(10**15)).seed_of(7) < 2**32
