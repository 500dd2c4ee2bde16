"""The training recipe: its arithmetic, its checkpoints, and a whole run in miniature that ends as a model folder."""

from __future__ import annotations

import json
import random
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lanting import Engine, Request
from lanting.core.errors import ModelError, OutputError, RequestError
from lanting.core.lang import Phrase
from lanting.nn.mmdit import Attend
from lanting.nn.qwen_language import Attend as CausalAttend
from lanting.train.course import Budget
from lanting.train.design import WIDE
from lanting.train.designs import DesignMaker
from lanting.train.draw import INK
from lanting.train.export import export_nano
from lanting.train.journal import Journal, Meter, clock, entries, in_words
from lanting.train.kept import alone, write_checkpoint, write_tensors
from lanting.train.labels import SCENE, SHAPE, WHAT, WHERE
from lanting.train.loop import Trainer, make_smaller
from lanting.train.losses import judged
from lanting.train.model import NanoConfig, NanoNet, PlainAttend, PlainCausalAttend, matrices, start
from lanting.train.nano import courses, curriculum, main, train_transformer
from lanting.train.nano_run import NanoRun, cost, settled
from lanting.train.optim import Muon, orthogonalize
from lanting.train.progress import Watch
from lanting.train.replay import Reader, Replay
from lanting.train.vae import load_vae
from training import WIDTH, a_batch, begun, lighten, small_net, small_run, small_tokenizer, small_vae

TESTS = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run that took a step and was exported, and the model's folder."""
    folder = begun(tmp_path_factory.mktemp("run") / "nano")
    return folder, main(small_run(folder))


def test_newton_schulz_makes_all_singular_values_near_one():
    matrix = torch.randn(3, 24, 10, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalize(matrix, 5))
    assert float(values.min()) > 0.6 and float(values.max()) < 1.3
    flipped = orthogonalize(matrix.mT.contiguous(), 5).mT
    assert torch.allclose(flipped, orthogonalize(matrix, 5), atol=0.05)


def test_muon_descends_on_matrices_of_several_shapes():
    torch.manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(shape)) for shape in ((8, 5), (8, 5), (4, 2, 3, 3))]
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
    q, k, v = (x.bfloat16().float() for x in (q, k, v))  # so that 16 bits hold them
    for m in (None, mask):
        wanted = Attend()(q, k, v, m)
        assert torch.allclose(PlainAttend()(q, k, v, m), wanted, atol=1e-5)
        assert torch.allclose(PlainAttend()(q, k, v.bfloat16(), m).float(), wanted, atol=0.02)  # as under autocast
    q, k, v = torch.randn(2, 3, 4, 8), torch.randn(2, 3, 9, 8), torch.randn(2, 3, 9, 8)
    assert torch.allclose(PlainCausalAttend()(q, k, v), CausalAttend()(q, k, v), atol=1e-5)


def test_a_fresh_network_predicts_no_change_and_every_matrix_has_one_optimizer():
    net = small_net()
    muon, adam = matrices(net)
    assert {id(p) for p in muon}.isdisjoint({id(p) for p in adam})
    assert len(muon) + len(adam) == len(list(net.parameters()))
    with torch.no_grad():
        batch = a_batch()
        velocity, said = net(batch.latents, torch.rand(2), torch.ones(1, 4, dtype=torch.long), batch)
    assert velocity.abs().max() == 0
    assert [logits.shape for logits in said.what] == [(2, 6, classes) for classes in WHAT]
    assert [logits.shape for logits in said.where] == [(2, 5, classes) for classes in WHERE]
    assert said.ink.shape == (2, 6, INK * INK) and said.read.shape == said.text.shape == (2, 5, SHAPE)


def test_the_learning_rate_warms_up_stays_and_decays():
    budget = Budget(minutes=10, lr=1.0, warmup_steps=10, decay_share=0.5)
    assert budget.rate(0, 0) == pytest.approx(0.1)
    assert budget.rate(50, 0) == budget.rate(50, 299) == pytest.approx(1.0)
    assert budget.rate(50, 600) == pytest.approx(0.02)


def test_the_heads_learn_what_they_are_asked(tmp_path):
    trainer = Trainer(small_net(), Budget(lr=0.01, warmup_steps=1), tmp_path)
    batch, generator = a_batch(), torch.Generator().manual_seed(0)
    losses, placed = [], 0.0
    for _ in range(12):
        total, report = trainer.loss(batch, [5, 6, 7], *trainer.noised(batch, generator))
        total.backward()
        trainer.update()
        trainer.clock.step += 1
        losses.append(float(total.detach()))
        placed = float(report["placed"])
    assert losses[-1] < 0.8 * losses[0] and placed == 1.0


def test_a_share_of_edits_is_all_noise(tmp_path):
    plain = a_batch(12)
    edits = replace(plain, references=plain.latents)
    trainer = Trainer(small_net(), Budget(starts=0.25), tmp_path)
    times, noise = trainer.noised(plain, torch.Generator().manual_seed(0))
    ours, same = trainer.noised(edits, torch.Generator().manual_seed(0))
    assert (times < 1).all() and torch.equal(noise, same)
    assert (ours[:3] == 1).all() and torch.equal(ours[3:], times[3:])


def test_places_of_edits_are_told_from_all_noise_alone():
    """Later the noisy target shows where its words stand; a network that only copies them must not look good."""
    batch = a_batch(4)
    batch = replace(batch, references=batch.latents, where=torch.zeros(4, 5, 3, dtype=torch.long))
    right_late = [torch.zeros(4, 5, size) for size in WHERE]
    for logits in right_late:
        logits[:2, :, 1] = 9.0  # at t = 1 something else
        logits[2:, :, 0] = 9.0
    said = small_net()(batch.latents, torch.ones(4), torch.tensor([[5, 6, 7]]), replace(batch, references=None))[1]
    said = replace(said, where=tuple(right_late))
    tables = torch.zeros(1024, SHAPE, dtype=torch.uint8), torch.zeros(1, SCENE)
    error = torch.tensor(0.0)
    for starts, placed in ((0.5, 0.0), (0.0, 0.5)):
        _, report = judged(error, said, batch, tables, Budget(starts=starts))
        assert report["placed"] == placed


def test_shares_are_left_out_where_nothing_was_asked(tmp_path):
    trainer = Trainer(small_net(), Budget(), tmp_path)
    batch = replace(a_batch(), where=torch.full((2, 5, 3), -1))
    total, report = trainer.loss(batch, [5, 6, 7], *trainer.noised(batch, None))
    meter = Meter(trainer)
    meter.recent = [{f"wide {key}": value for key, value in report.items()}] * 2
    entry = meter.entry()
    assert torch.isfinite(total) and "wide placed" not in entry and entry["wide read"] >= 0 and entry["wide loss"] > 0


def test_a_prompt_is_cut_exactly_behind_the_constant_prefix():
    reader = Reader(small_tokenizer())
    assert len(reader.prefix) == 34
    rows = [ids for ids, _ in reader.read(['a red sign "hi"', " "])]
    ids, mask = reader.padded(rows)
    assert mask is not None and mask.sum(1).tolist() == [len(row) for row in rows]
    assert reader.tokenizer.decode(ids[0].tolist()).startswith('a red sign "hi"')


def test_a_batch_is_what_was_encoded():
    reader = Reader(small_tokenizer())
    replay = Replay(small_vae(), reader, DesignMaker(0), WIDE, capacity=8)
    replay.add(10, random.Random(0))  # more than fit: the oldest two make room
    assert len(replay.items) == 8 and replay.next == 2
    tokens = WIDE[0] // 16 * (WIDE[1] // 16)
    batch = replay.draw(16, random.Random(1), silence=0.0)
    assert batch.latents.shape == (16, tokens, 64) and batch.what.shape == (16, tokens, 2) and batch.mask is None
    assert 0.1 < float(batch.latents.std()) < 5
    silent = replay.draw(16, random.Random(1), silence=1.0)
    assert (silent.what == -1).all() and silent.ids.shape[1] == len(replay.silent.ids)


def test_a_run_ends_as_a_model_that_opens(finished):
    run, model = finished
    names = {str(p.relative_to(model)) for p in model.rglob("*") if p.is_file()}
    assert {"model_index.json", "tokenizer/tokenizer.json", "transformer/config.json", "vae/config.json"} <= names
    assert json.loads((model / "transformer" / "config.json").read_text())["num_attention_heads"] == WIDTH // 32
    request = Request(prompt="a sign", size=(128, 64), steps=1, seed=0)
    assert Engine.open(str(model), device="cpu").run(request).images[0].size == (128, 64)
    log = [entry for entry in entries(run / "log.jsonl") if "step" in entry]
    assert log and all(entry["seen"] > 0 and entry["left"] >= 0 for entry in log)
    assert entries(run / "log.jsonl")[-1] == {"note": "done"}


def test_a_finished_run_is_not_trained_further(finished, monkeypatch):
    lighten(monkeypatch)
    run, _ = finished
    before = torch.load(run / "checkpoint.pt", weights_only=True)["clock"]
    again = main(small_run(run))
    assert torch.load(run / "checkpoint.pt", weights_only=True)["clock"] == before
    assert (again / "transformer" / "diffusion_pytorch_model.safetensors").is_file()


def test_a_slice_ends_early_and_goes_on(tmp_path, monkeypatch):
    lighten(monkeypatch)
    begun(tmp_path / "run")
    until = time.monotonic() + 0.5  # long before the budget: after the first step
    train_transformer(small_run(tmp_path / "run", minutes=60, until=until))
    first = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["clock"]
    assert entries(tmp_path / "run" / "log.jsonl")[-1] == {"note": "slice done"}
    train_transformer(small_run(tmp_path / "run", minutes=60, until=time.monotonic() + 0.5))
    second = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["clock"]
    assert second["step"] >= first["step"] and second["seconds"] >= first["seconds"]


def test_a_killed_run_goes_on_where_it_was(tmp_path):
    """kill -9 at any moment leaves a whole checkpoint; a half-written one beside it does not matter."""
    run = begun(tmp_path / "run", seconds=30.0)
    script = (
        f"import sys; sys.path.insert(0, {str(TESTS)!r})\n"
        "import dataclasses, pathlib, training, lanting.train.nano as n\n"
        "quick = n.Preset.budget\n"
        "n.kinds, n.glyph_shapes = training.strips, training.no_shapes\n"
        "n.Preset.budget = lambda *a: dataclasses.replace(quick(*a), save_every=0.0)\n"
        f"n.train_transformer(training.small_run(pathlib.Path({str(run)!r}), minutes=60))\n"
    )
    checkpoint = run / "checkpoint.pt"
    first = checkpoint.stat().st_mtime_ns
    worker = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while checkpoint.stat().st_mtime_ns == first and time.monotonic() < deadline and worker.poll() is None:
        time.sleep(0.1)
    worker.send_signal(signal.SIGKILL)
    worker.wait(30)
    (run / "checkpoint.pt.part").write_bytes(b"half a checkpoint")
    trainer = Trainer(small_net(seed=5), Budget(), run)
    assert trainer.resume() and trainer.clock.step >= 1 and trainer.clock.seconds > 30.0
    assert trainer.agreed == trainer.clock.seconds and trainer.warm_from == 0
    assert all("momentum" in state for state in trainer.optimizers[0].state_dict()["state"].values())


def test_two_runs_do_not_take_turns_at_one_checkpoint(tmp_path):
    (tmp_path / "run").mkdir()
    with alone(tmp_path / "run"), pytest.raises(ModelError, match="run is being written by another run"):
        main(small_run(tmp_path / "run"))
    assert [path.name for path in tmp_path.rglob("*")] == ["run"]  # and no lock stays


def test_another_network_is_refused(tmp_path):
    begun(tmp_path / "run")
    with pytest.raises(ModelError, match="--width"):
        Trainer(start(NanoNet(NanoConfig())), Budget(), tmp_path / "run").resume()


@pytest.mark.parametrize("left", [0, 1000, -1000])
def test_a_checkpoint_that_is_torn_is_a_sentence(tmp_path, left):
    run = begun(tmp_path / "run")
    whole = (run / "checkpoint.pt").read_bytes()
    (run / "checkpoint.pt").write_bytes(whole[:left])
    for go_on in (Trainer(small_net(), Budget(), run).resume, lambda: export_nano(run, tmp_path / "out")):
        with pytest.raises(ModelError, match="remove it to begin anew"):
            go_on()


def test_files_of_others_are_a_sentence(tmp_path):
    run = begun(tmp_path / "run")
    torch.save({"kind": {}}, run / "checkpoint.pt")
    (run / "vae" / "vae.safetensors").write_bytes(b"torn")
    for go_on in (Trainer(small_net(), Budget(), run).resume, lambda: load_vae(run / "vae")):
        with pytest.raises(ModelError, match="remove it to begin anew"):
            go_on()


@pytest.mark.parametrize("write", [write_checkpoint, write_tensors])
def test_a_disk_that_takes_nothing_more_is_a_sentence(tmp_path, write):
    """torch said "unexpected pos", and nobody knew what to do."""
    (tmp_path / "x").write_bytes(b"as it was")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        with pytest.raises(OutputError, match="out can't be written: File too large"), alone(tmp_path / "out"):
            write(tmp_path / "x", {"a": torch.zeros(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert write is write_tensors or (tmp_path / "x").read_bytes() == b"as it was"
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_wider_networks_are_built_as_asked(tmp_path):
    config = small_run(tmp_path, width=192, layers=2).config().transformer
    assert (config.width, config.num_layers, config.num_attention_heads) == (192, 2, 6)
    for wrong in (
        {"width": 100},
        {"width": 32},
        {"layers": 0},
        {"minutes": -1.0},
        {"lr": -1.0},
        {"watch_minutes": -1.0},
    ):
        with pytest.raises(RequestError):
            settled(small_run(tmp_path, **wrong))


def test_large_canvases_join_on_request(tmp_path):
    begun(tmp_path / "run")
    found = courses(small_run(tmp_path / "run", large=True), load_vae(tmp_path / "run" / "vae"), small_tokenizer(), 0)
    assert found[-1].name == "large" and sum(c.share for c in found) == pytest.approx(1)


def test_the_curriculum_grows(tmp_path):
    begun(tmp_path / "run")
    found = courses(small_run(tmp_path / "run"), load_vae(tmp_path / "run" / "vae"), small_tokenizer(), 0)
    trainer = Trainer(small_net(), Budget(minutes=10), tmp_path)
    for seconds, hanzi in ((0, 1200), (60, 3500), (600, 3500)):
        trainer.agreed = float(seconds)
        curriculum(found, trainer)
        makers = [c.replay.maker for c in found]  # type: ignore[union-attr]
        assert {getattr(m, "designs", m).mix.hanzi for m in makers} == {hanzi}


def test_a_gpu_too_small_gets_smaller_batches(tmp_path):
    trainer = Trainer(small_net(), Budget(), tmp_path)
    make_smaller(trainer)
    assert trainer.scale == 0.5
    trainer.world = 2
    with pytest.raises(ModelError, match="--batch-times"):
        make_smaller(trainer)


def test_cost_is_told_and_nonsense_refused(tmp_path):
    told = cost(NanoRun(tmp_path, workers=2, device="cpu"))
    assert (told.minutes, told.processes, told.device) == (111.0, 2, "cpu") and 4 < told.memory < 12
    assert cost(NanoRun(tmp_path, device="cpu", slice_minutes=9)).minutes == 9
    with pytest.raises(RequestError):
        main(NanoRun(tmp_path, minutes=-1))
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="can't be written"):
        main(NanoRun(tmp_path / "file" / "run", device="cpu"))


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"workers": -1}, "--workers"),  # which ended at once, as if all had been trained
        ({"batch_times": -1}, "--batch-times"),
        ({"feeders": -2}, "--feeders"),
        ({"concepts": 0}, "1 to 1087"),
        ({"concepts": 1088}, "1 to 1087"),
        ({"minutes": float("nan")}, "from 0 on"),
        ({"minutes": float("inf")}, "from 0 on"),
        ({"warm": "/nowhere"}, "/nowhere holds no nano"),
        ({"seed": -1}, "--seed must be a whole number from 0 to 9223372036854775807"),
        ({"seed": 2**63}, "--seed must be"),
    ],
)
def test_values_that_nothing_can_be_trained_with_are_a_sentence(tmp_path, wrong, words):
    with pytest.raises(RequestError, match=words):
        settled(small_run(tmp_path, **wrong))
    assert settled(small_run(tmp_path, concepts=1087, feeders=-1)).concepts == 1087


def test_the_log_is_for_people_and_plots(tmp_path, monkeypatch):
    monkeypatch.setenv("LANTING_LANG", "en")
    said: list[str] = []
    journal = Journal(tmp_path, said.append, lambda: {"queue": 0.5, "waited": 0.0, "feeding": 0.1, "reuse": 8.2})
    entry = {"step": 1200, "seen": 96000, "seconds": 3725, "left": 600, "per_second": 157.2, "lr": 0.002}
    journal(entry | {"wide loss": 0.5, "edit loss": 0.3, "wide read": 0.5})
    journal.note("hello", step=3)
    assert said[0].startswith("1:02:05 of 1:12:05  step 1,200  96,000 designs, 157/s  loss 0.400  read 50%")
    assert "queue 50%" in said[0] and said[1] == "hello"
    with (tmp_path / "log.jsonl").open("ab") as file:
        file.write(b'plain words\n{"step": 3, "note": "' + "兰".encode()[:2])
    assert [e.get("note") for e in entries(tmp_path / "log.jsonl")] == [None, "hello"]
    journal.note("going on")  # a run that goes on does not lose its first entry to half of another
    assert [e.get("note") for e in entries(tmp_path / "log.jsonl")] == [None, "hello", "going on"]
    assert b"\n\n" not in (tmp_path / "log.jsonl").read_bytes()
    assert clock(7) == "0:07" and in_words({"note": "x"}) == "x"
    monkeypatch.setenv("LANTING_LANG", "zh")
    journal(entry | {"wide loss": 0.5})
    journal.note(Phrase("a first stock of designs after {seconds:.0f} s", seconds=3.2), step=4)
    assert said[-2].startswith("1:02:05 / 1:12:05  第 1,200 步") and said[-1] == "3 秒后有了第一批图样"
    assert entries(tmp_path / "log.jsonl")[-1] == {"note": "a first stock of designs after 3 s", "step": 4}


def test_sheets_of_samples_and_their_scores(tmp_path):
    told = []
    trainer = Trainer(small_net(), Budget(), tmp_path)
    watch = Watch(
        tmp_path, Reader(small_tokenizer()), small_vae(), 8.0, lambda *words, **f: told.append(f), lambda p, t: 0.25
    )
    watch.sets = {name: (size, drawn[:4]) for name, (size, drawn) in list(watch.sets.items())[:1]}
    watch(trainer)  # not yet time
    assert not told
    figures = watch.look(trainer)
    assert set(figures) == {"ink english", "lines english"} and figures["lines english"] == 0.25
    assert told == [{"step": 0, "seen": 0, **figures}]
    assert (tmp_path / "sheets" / "english-000000.png").stat().st_size > 1000


def test_an_export_needs_a_checkpoint(tmp_path):
    with pytest.raises(ModelError, match="no trained weights"):
        export_nano(tmp_path, tmp_path / "out")


def test_the_recipe_needs_nothing_from_outside_the_package():
    """Fonts, words and licences ship with it."""
    from lanting.train import atlas

    names = [path.name for path in (Path(atlas.__file__).parent / "fonts").iterdir()]
    assert sum(name.endswith((".ttf", ".otf")) for name in names) >= 8
    assert sum("licen" in name.lower() for name in names) >= 6
