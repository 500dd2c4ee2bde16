"""Training multiplies in bfloat16 where the machine does so itself, in float32 elsewhere, and learns alike in both."""

from __future__ import annotations

import pytest
import torch

from lanting.train import precision
from lanting.train.course import Budget
from lanting.train.loop import Trainer
from lanting.train.nano import prepared
from lanting.train.optim import orthogonalize
from lanting.train.precision import native_on_cpu, product_dtype
from lanting.train.progress import sample
from lanting.train.vae import VAERecipe, VAETrainer
from lanting.train.walks import in_fast_numbers
from training import a_batch, begun, flat, lighten, small_net, small_run, small_vae

CPU = torch.device("cpu")


def say(monkeypatch: pytest.MonkeyPatch, native: bool) -> torch.dtype:
    """Let the CPU be one with or without bfloat16; what training then multiplies in."""
    monkeypatch.setattr(precision, "native_on_cpu", lambda: native)
    return torch.bfloat16 if native else torch.float32


@pytest.fixture(params=[False, True], ids=["float32", "bfloat16"])
def dtype(request, monkeypatch) -> torch.dtype:
    return say(monkeypatch, request.param)


@pytest.mark.parametrize(
    ("machine", "bf16", "amx", "arm", "native"),
    [
        ("x86_64", False, False, True, False),  # oneDNN says yes to mere AVX-512
        ("AMD64", True, False, False, True),
        ("x86_64", False, True, False, True),
        ("aarch64", True, True, False, False),
        ("ARM64", False, False, True, True),
    ],
)
def test_the_machine_is_asked_what_it_has(monkeypatch, machine, bf16, amx, arm, native):
    monkeypatch.setattr("platform.machine", lambda: machine)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bf16, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx, raising=False)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: arm, raising=False)
    assert native_on_cpu.__wrapped__() is native


@pytest.mark.parametrize("machine", ["x86_64", "arm64"])
def test_a_torch_that_cannot_tell_counts_as_no(monkeypatch, machine):
    monkeypatch.setattr("platform.machine", lambda: machine)
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.delattr(torch.cpu, name, raising=False)
    monkeypatch.setattr(torch.ops, "mkldnn", object())
    assert native_on_cpu.__wrapped__() is False


def test_only_a_cpu_is_asked(monkeypatch):
    say(monkeypatch, False)
    assert product_dtype(torch.device("cuda")) == torch.bfloat16
    assert product_dtype(CPU) == torch.float32


def test_steps_lower_the_loss(dtype, tmp_path):
    trainer = Trainer(small_net(), Budget(lr=0.01, warmup_steps=1), tmp_path)
    seen: set[torch.dtype] = set()
    trainer.net.transformer.img_in.register_forward_hook(lambda module, given, out: seen.add(out.dtype))
    batch, losses = a_batch(), []
    t, noise = trainer.noised(batch, torch.Generator().manual_seed(0))
    for _ in range(8):
        total, _ = trainer.loss(batch, [5, 6, 7], t, noise)
        total.backward()
        trainer.update()
        losses.append(float(total.detach()))
    assert seen == {dtype}
    assert losses[-1] < 0.9 * losses[0]


def test_gradients_are_the_same_up_to_rounding(monkeypatch, tmp_path):
    found = []
    for native in (False, True):
        say(monkeypatch, native)
        trainer = Trainer(small_net(), Budget(), tmp_path)
        batch = a_batch()
        t, noise = trainer.noised(batch, torch.Generator().manual_seed(0))
        trainer.passes("wide", batch, [5, 6, 7], t, noise)
        found.append(flat(trainer))
    full, half = found
    assert 0 < (full - half).norm() < 0.02 * full.norm()


def test_muon_updates_are_the_same_up_to_rounding(monkeypatch):
    matrix = torch.randn(3, 24, 10, generator=torch.Generator().manual_seed(0))
    say(monkeypatch, False)
    full = orthogonalize(matrix)
    one_by_one = torch.stack([orthogonalize(each[None])[0] for each in matrix])
    assert torch.allclose(full, one_by_one, atol=1e-5)
    say(monkeypatch, True)
    assert 0 < float((orthogonalize(matrix) - full).abs().max()) < 0.05


def test_the_autoencoder_learns(dtype):
    torch.manual_seed(0)
    trainer = VAETrainer(small_vae(), VAERecipe(batch=2, processes=1, warmup_steps=1), 1.0, "all")
    seen: set[torch.dtype] = set()
    trainer.vae.encoder.conv_in.register_forward_hook(lambda module, given, out: seen.add(out.dtype))
    picture = torch.full((2, 3, 32, 32), 0.7)
    losses = [trainer.train_step(picture).item() for _ in range(6)]
    assert seen == {dtype} and losses[-1] < 0.9 * losses[0]


def test_designs_are_encoded_in_it(dtype, monkeypatch, tmp_path):
    lighten(monkeypatch)
    run = small_run(begun(tmp_path / "run"))
    _, vae, _ = prepared(run, run.preset(1), 1, 0, "cpu")
    assert next(vae.parameters()).dtype == dtype


def test_walks_and_sheets_are_drawn_in_it(dtype):
    layer, seen = torch.nn.Linear(64, 64), set()
    layer.register_forward_hook(lambda module, given, out: seen.add(out.dtype))
    answer = in_fast_numbers(layer, CPU)(torch.ones(1, 64))  # pyright: ignore[reportCallIssue]
    drawn = sample(lambda x, t, prefix, batch: (layer(x), None), a_batch(), [5], [1.0, 0.5, 0.0])
    assert seen == {dtype} and answer.dtype == drawn.dtype == torch.float32
