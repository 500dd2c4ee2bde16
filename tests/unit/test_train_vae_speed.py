"""The autoencoder's training on a GPU, rehearsed without one: the same numbers in another order of work."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lanting.train.graphs import Recorder
from lanting.train.vae import VAERecipe, VAETrainer
from lanting.train.vae_speed import Compiled, RecordedSteps, fuse, normed
from training import small_vae


class Again(Recorder):
    """Records by doing the same once more."""

    def __init__(self):
        super().__init__()
        self.recorded = 0

    def ready(self) -> bool:
        return True

    def aside(self, work: Any) -> Any:
        return work()

    def record(self, work: Any) -> Any:
        self.recorded += 1
        return work


def pictures(count: int, size: tuple[int, int] = (32, 32)) -> torch.Tensor:
    generator = torch.Generator().manual_seed(count)
    noise = torch.rand(count, 3, *size, generator=generator) * 2 - 1
    return noise.to(memory_format=torch.channels_last)


@pytest.mark.parametrize("part", ["all", "decoder"])
def test_recorded_steps_are_the_same_steps(part):
    recipe = VAERecipe(processes=1, warmup_steps=1)
    plain, recorded = (VAETrainer(small_vae(), recipe, 1.0, part) for _ in range(2))
    recorder = Again()
    recorded.fast = RecordedSteps(recorded, recorder)
    for trainer in (plain, recorded):
        torch.manual_seed(0)
        losses = [float(trainer.train_step(pictures(count))) for count in (2, 2, 1, 2, 1)]
        assert losses[-1] != losses[0]
    assert recorder.recorded == 3  # two shapes and the optimizer's work
    for one, other in zip(plain.vae.parameters(), recorded.vae.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-5)


def test_fused_norms_change_nothing(monkeypatch):
    monkeypatch.setattr("torch.compile", lambda function, **_: function)
    plain, fused = small_vae(), fuse(small_vae())
    assert set(plain.state_dict()) == set(fused.state_dict())
    found = []
    for vae in (plain, fused):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            mean, _ = vae.encode(pictures(2))
            drawn = vae.reconstruct(mean.float()).float()
        found.append([drawn, *torch.autograd.grad(drawn.square().mean(), list(vae.decoder.parameters()))])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_norms_are_compiled_once_for_each_number_of_channels(monkeypatch):
    seen, compile_as_usual = [], torch.compile

    def counting(graph: Any, _: Any) -> Any:
        seen.append(graph)
        return graph.forward

    monkeypatch.setattr("torch.compile", lambda function, **how: compile_as_usual(function, backend=counting, **how))
    torch.compiler.reset()
    norm = Compiled(normed)
    for channels in (16, 8):
        gamma = torch.nn.Parameter(torch.rand(channels, 1, 1))
        for size in ((2, channels, 6, 6), (3, channels, 4, 10), (2, channels, 16, 16)):
            x = torch.randn(size).to(torch.bfloat16, memory_format=torch.channels_last)
            assert torch.equal(norm(x, gamma, 4.0), normed(x, gamma, 4.0))
    assert len(seen) == 2 and not norm.failed
    assert norm(torch.randn(1, 8, 2, 2), gamma, 4.0).dtype == torch.float32 and len(seen) == 2


def test_where_compiling_fails_norms_are_as_they_were(monkeypatch, capsys):
    def broken(*_: Any, **__: Any) -> Any:
        def fail(*_: Any) -> Any:
            raise RuntimeError("no compiler")

        return fail

    monkeypatch.setattr("torch.compile", broken)
    norm, x, gamma = Compiled(normed), torch.randn(1, 8, 2, 2).bfloat16(), torch.ones(8, 1, 1)
    for _ in range(2):
        assert torch.equal(norm(x, gamma, 2.0), normed(x, gamma, 2.0))
    assert capsys.readouterr().err.count("not compiled") == 1
