"""Blocks behind torch.compile: an option that changes rounding at most, and is never needed."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounter

import nets
from lanting.attach.compiled import attach_compiled, backend_of, detach_compiled
from lanting.attach.modulation import ModulationTable
from lanting.attach.safe import kernels
from lanting.core.errors import RequestError
from lanting.core.lang import chinese
from lanting.engine.compute import speed_up

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def anew(monkeypatch):
    monkeypatch.delenv("LANTING_COMPILE", raising=False)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def ask(net, text=7, branch="positive", references=0):
    torch.manual_seed(0)
    grids = [(1, 3, 4)] * (1 + references)
    latents, prompt = torch.randn(1, 12 * len(grids), 16), torch.randn(1, text, 48)
    with torch.no_grad():
        return net(latents, torch.tensor([0.5]), prompt, None, grids, 12, branch=branch)


def test_all_blocks_are_one_function():
    net, plain, counter = nets.transformer(num_layers=2), nets.transformer(num_layers=2), CompileCounter()
    for each in (net, plain):
        ModulationTable(each).prepare(torch.tensor([0.5]))
    compiler = attach_compiled(net, counter)  # type: ignore[arg-type]
    for branch in ("positive", "negative", "positive"):
        assert torch.allclose(ask(net, branch=branch), ask(plain), atol=1e-6)
    assert counter.frame_count == 1 and not compiler.failed
    for text in (5, 9):
        assert torch.allclose(ask(net, text), ask(plain, text), atol=1e-6)
    assert counter.frame_count <= 3  # lengths are left open once they have changed
    assert len(kernels(net)) == len(net.transformer_blocks)
    detach_compiled(net)
    assert torch.equal(ask(net), ask(plain)) and not kernels(net)


def test_where_compiling_fails_blocks_run_as_they_come(capsys):
    def broken(graph, inputs):
        raise RuntimeError("no compiler\nat all")

    net, plain = nets.transformer(), nets.transformer()
    compiler = attach_compiled(net, broken)  # type: ignore[arg-type]
    for _ in range(2):
        assert torch.equal(ask(net), ask(plain))
    assert "no compiler" in compiler.failed and capsys.readouterr().err.count("blocks are not compiled") == 1
    assert "blocks are not compiled: {reason}" in chinese()


def test_what_is_no_fault_of_the_compiler_s_is_raised(capsys):
    net = nets.transformer()
    compiler = attach_compiled(net, "eager")
    net.transformer_blocks[0].attn.to_q.weight = torch.nn.Parameter(torch.ones(2, 3), requires_grad=False)
    with pytest.raises(RuntimeError):
        ask(net)
    assert not compiler.failed and not capsys.readouterr().err


@pytest.mark.parametrize(
    ("asked", "wanted"), [("", None), ("off", None), ("on", "inductor"), ("aot_eager", "aot_eager")]
)
def test_what_is_asked_for(asked, wanted):
    assert backend_of(asked) == wanted


def test_a_backend_that_is_none(monkeypatch):
    monkeypatch.setenv("LANTING_COMPILE", "gcc")
    with pytest.raises(RequestError, match="gcc"):
        speed_up(nets.transformer(), CPU)


def test_the_engine_compiles_when_asked(monkeypatch):
    net, plain = nets.transformer(zero_cond_t=True), nets.transformer(zero_cond_t=True)
    monkeypatch.setenv("LANTING_COMPILE", "aot_eager")
    speed_up(net, CPU)
    assert len(kernels(net)) == len(net.transformer_blocks)  # and none of ours below
    assert torch.allclose(ask(net, references=1), ask(plain, references=1), atol=1e-5)
