"""The training recipe: its arithmetic, its checkpoints, and a whole run in miniature that ends as a model folder."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from lanting import Engine, Request
from lanting.core.errors import RequestError
from lanting.nn.mmdit import Attend
from lanting.nn.qwen_language import Attend as CausalAttend
from lanting.train.export import export_nano
from lanting.train.loop import Budget, Trainer
from lanting.train.model import NanoConfig, NanoNet, PlainAttend, PlainCausalAttend, matrices, start
from lanting.train.nano import NanoRun, cost, main, train_transformer
from lanting.train.optim import Muon, orthogonalize
from lanting.train.replay import Reader, Replay
from lanting.train.signs import SIZES, SignMaker
from lanting.train.vae import load_vae, train_vae
from lanting.train.vocabulary import build_tokenizer, make_tokenizer


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A run whose autoencoder was trained for a moment."""
    folder = tmp_path_factory.mktemp("run")
    train_vae(folder / "vae", 0.001, log=lambda line: None)
    return folder


def small_run(folder, **changes):
    return NanoRun(
        folder, **{"vae_minutes": 0, "decoder_minutes": 0, "minutes": 0.02, "workers": 1, "capacity": 24, **changes}
    )


def test_newton_schulz_makes_all_singular_values_near_one():
    matrix = torch.randn(3, 24, 10, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalize(matrix, 5))
    assert float(values.min()) > 0.6 and float(values.max()) < 1.3
    flipped = orthogonalize(matrix.mT.contiguous(), 5).mT
    assert torch.allclose(flipped, orthogonalize(matrix, 5), atol=0.05)


def test_muon_descends_on_matrices_of_several_shapes():
    torch.manual_seed(0)
    weights = [
        torch.nn.Parameter(torch.randn(8, 5)),
        torch.nn.Parameter(torch.randn(8, 5)),
        torch.nn.Parameter(torch.randn(4, 2, 3, 3)),
    ]
    optimizer = Muon(weights, lr=0.05, weight_decay=0.0)
    before = sum(float(w.detach().square().sum()) for w in weights)
    for _ in range(250):
        optimizer.zero_grad()
        torch.stack([w.square().sum() for w in weights]).sum().backward()
        optimizer.step()
    assert sum(float(w.detach().square().sum()) for w in weights) < 0.1 * before


def test_attention_for_training_equals_the_one_for_drawing():
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 9, 3, 8) for _ in range(3))
    mask = torch.tensor([[True, True, True, True], [True, True, False, False]])
    for m in (None, mask):
        assert torch.allclose(PlainAttend()(q, k, v, m), Attend()(q, k, v, m), atol=1e-5)
    q, k, v = torch.randn(2, 3, 4, 8), torch.randn(2, 3, 9, 8), torch.randn(2, 3, 9, 8)
    assert torch.allclose(PlainCausalAttend()(q, k, v), CausalAttend()(q, k, v), atol=1e-5)


def test_a_fresh_network_predicts_no_change_and_every_matrix_has_one_optimizer():
    net = start(NanoNet(NanoConfig()))
    muon, adam = matrices(net)
    assert {id(p) for p in muon}.isdisjoint({id(p) for p in adam})
    assert len(muon) + len(adam) == len(list(net.parameters()))
    with torch.no_grad():
        noisy, times, prefix = torch.randn(2, 6, 64), torch.rand(2), torch.ones(1, 4, dtype=torch.long)
        ids, mask = torch.ones(2, 5, dtype=torch.long), torch.ones(2, 5, dtype=torch.bool)
        velocity, logits = net(noisy, times, prefix, ids, mask, [(1, 2, 3)])
    assert velocity.abs().max() == 0 and logits.shape == (2, 6, 128)


def test_the_learning_rate_warms_up_stays_and_decays():
    budget = Budget(minutes=10, lr=1.0, warmup_steps=10, decay_share=0.5)
    assert budget.rate(0, 0) == pytest.approx(0.1)
    assert budget.rate(50, 0) == budget.rate(50, 299) == pytest.approx(1.0)
    assert budget.rate(50, 600) == pytest.approx(0.02)


def test_a_prompt_is_cut_exactly_behind_the_constant_prefix():
    reader = Reader(make_tokenizer())
    assert len(reader.prefix) == 34
    ids, mask = reader.padded(reader.ids(['a red sign "hi"', " "]))
    assert ids.shape == mask.shape and mask.sum(1).tolist() == [len(r) for r in reader.ids(['a red sign "hi"', " "])]
    assert reader.tokenizer.decode(ids[0].tolist()).startswith('a red sign "hi"')


def test_a_batch_is_what_was_encoded(run_folder):
    reader, vae = Reader(make_tokenizer()), load_vae(run_folder / "vae")
    replay = Replay(vae, reader, SignMaker(0), SIZES[0], capacity=8)
    replay.add(12, random.Random(0))  # more than fit: the oldest four make room
    assert len(replay.rows) == 8 and replay.next == 4
    batch = replay.draw(16, random.Random(1), silence=0.5)
    tokens = SIZES[0][0] // 16 * (SIZES[0][1] // 16)
    assert batch.latents.shape == (16, tokens, 64) and batch.labels.shape == (16, tokens)
    silent = (batch.labels < 0).all(1)
    assert 0 < int(silent.sum()) < 16
    assert (batch.mask.sum(1)[silent] == len(replay.silent)).all()
    assert abs(float(batch.latents.mean())) < 1 and 0.2 < float(batch.latents.std()) < 5


def test_a_resumed_run_goes_on_where_it_was(run_folder, tmp_path):
    net = start(NanoNet(NanoConfig()))
    first = Trainer(net, Budget(batch=(4, 2), fresh=(1, 1)), tmp_path)
    reader, vae = Reader(make_tokenizer()), load_vae(run_folder / "vae")
    replays = [Replay(vae, reader, SignMaker(0), size, capacity=16) for size in SIZES]
    rng, generator = random.Random(0), torch.Generator().manual_seed(0)
    for replay in replays:
        replay.add(8, rng)
    losses = [first.step(replays, rng, generator)["loss224"] for _ in range(3)]
    assert all(0 < loss < 10 for loss in losses)
    first.save()
    second = Trainer(start(NanoNet(NanoConfig())), first.budget, tmp_path)
    assert second.resume() and second.clock == first.clock
    for (name, a), b in zip(first.net.state_dict().items(), second.net.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert all(torch.equal(first.average[k], second.average[k]) for k in first.average)
    assert not list(tmp_path.glob("*.part"))


def test_a_whole_run_in_miniature_ends_as_a_folder_that_draws(run_folder):
    folder = main(small_run(run_folder))
    names = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    assert {"model_index.json", "transformer/config.json", "vae/config.json", "text_encoder/config.json"} <= names
    image = (
        Engine.open(str(folder), device="cpu").run(Request(prompt="a sign", size=(224, 96), steps=1, seed=0)).images[0]
    )
    assert image.size == (224, 96)
    log = [json.loads(line) for line in (run_folder / "log.jsonl").read_text().splitlines() if line.startswith("{")]
    assert all(entry["seen"] > 0 for entry in log)
    again = export_nano(run_folder, run_folder / "again")
    assert (again / "transformer/diffusion_pytorch_model.safetensors").stat().st_size > 7e6


def test_two_processes_walk_together_and_stop_together(run_folder, tmp_path):
    """A process that stopped one step before the other would leave it waiting for gradients, and the run would fail."""
    os.symlink(run_folder / "vae", tmp_path / "vae")
    build_tokenizer(tmp_path / "tokenizer")
    train_transformer(small_run(tmp_path, workers=2, minutes=0.1))
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert state["clock"]["step"] >= 2 and state["clock"]["seen"] == state["clock"]["step"] * 2 * sum(Budget().batch)


def test_processes_go_by_the_time_they_agreed_on(tmp_path, monkeypatch):
    """Rates and the end must not depend on a process's own clock."""
    trainer = Trainer(start(NanoNet(NanoConfig())), Budget(), tmp_path, world=2, rank=0)
    for parameter in trainer.net.parameters():
        parameter.grad = torch.ones_like(parameter)
    trainer.clock.seconds = 10.0
    monkeypatch.setattr("torch.distributed.all_reduce", lambda flat: flat.mul_(2).add_(2.0))  # the other is later
    trainer.exchange()
    assert trainer.agreed == pytest.approx(11.0) and trainer.clock.seconds == trainer.agreed
    assert all(torch.allclose(p.grad, torch.full_like(p, 2.0)) for p in trainer.net.parameters())


def test_a_killed_run_leaves_a_whole_checkpoint(run_folder, tmp_path):
    os.symlink(run_folder / "vae", tmp_path / "vae")
    script = (
        "from pathlib import Path; import lanting.train.nano as n\n"
        f"run = n.NanoRun(Path({str(tmp_path)!r}), minutes=5, workers=1, capacity=24)\n"
        "n.build_tokenizer(run.tokenizer)\n"
        "budget = n.Budget\n"
        "n.Budget = lambda minutes: budget(minutes=minutes, save_every=0.0, batch=(2, 1), fresh=(1, 1))\n"
        "n.train_transformer(run)\n"
    )
    worker = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.DEVNULL)
    checkpoint, deadline = tmp_path / "checkpoint.pt", time.monotonic() + 90
    while not checkpoint.exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    time.sleep(1.5)
    worker.send_signal(signal.SIGKILL)
    worker.wait(30)
    trainer = Trainer(start(NanoNet(NanoConfig())), Budget(), tmp_path)
    assert trainer.resume() and trainer.clock.step >= 1


def test_cost_is_said_and_nonsense_refused(tmp_path):
    said = cost(NanoRun(tmp_path, workers=2))
    assert "111 minutes" in said and "2 cores" in said and "GB" in said
    with pytest.raises(RequestError):
        main(NanoRun(tmp_path, minutes=-1))


def test_the_recipe_needs_nothing_from_outside_the_package():
    """Fonts, words and licences ship with it."""
    from lanting.train import signs

    fonts = Path(signs.__file__).parent / "fonts"
    assert len(list(fonts.glob("*.[ot]tf"))) == 3 and list(fonts.glob("*LICENSE*")) + list(fonts.glob("*icen*"))
