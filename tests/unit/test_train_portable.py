"""A run that travels: small files, complete or not, and a run that goes on from them elsewhere."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lanting.core.errors import ModelError
from lanting.train.course import Budget
from lanting.train.export import export_nano
from lanting.train.journal import entries
from lanting.train.loop import Trainer
from lanting.train.model import NanoConfig, NanoNet
from lanting.train.nano import decoder_recipe, main, vae_recipe
from lanting.train.nano_run import settled
from lanting.train.portable import EMA, STATE, VAE, pack, read_parts, slim, unpack, write_parts
from lanting.train.presets import on_gpu
from lanting.train.vae import CHECKPOINT, DECODER, FROZEN, UNTUNED, VAERecipe, load_vae, train_vae
from training import begun, gradients, imported, lighten, small_net, small_run

HEADS = {"what", "where", "ink", "drawn", "read", "scene", "named"}  # that only help training


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run whose optimizers have moved once."""
    folder = begun(tmp_path_factory.mktemp("run") / "nano")
    trainer = Trainer(small_net(), Budget(lr=0.01, warmup_steps=1), folder)
    gradients(trainer, slice(0, 2))
    trainer.update()
    trainer.clock.step, trainer.clock.seen, trainer.clock.seconds = 7, 99, 12.5
    trainer.save()
    (folder / "log.jsonl").write_text('{"note": "begun"}\n')
    return folder


def moved_to(folder, packed) -> Trainer:
    assert unpack(packed, folder)
    trainer = Trainer(small_net(seed=9), Budget(), folder)
    assert trainer.resume()
    return trainer


def test_files_are_cut_to_size_and_read_back(tmp_path):
    tensors = {f"part{i}": torch.randn(10, 10) for i in range(7)}
    paths = write_parts(tmp_path, "x", tensors, limit=1000)
    assert len(paths) == 4 and all(path.stat().st_size < 1400 for path in paths)
    back = read_parts(tmp_path, "x")
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)
    write_parts(tmp_path, "x", {"only": torch.zeros(3)})
    assert set(read_parts(tmp_path, "x")) == {"only"}
    write_parts(tmp_path, "x", tensors, limit=1000)[1].unlink()
    with pytest.raises(ModelError, match="lacks"):
        read_parts(tmp_path, "x")


def test_a_run_goes_on_elsewhere_with_its_clock_and_momenta(run, tmp_path):
    files = pack(run, tmp_path / "packed")
    assert len(files) <= 8 and all(file.stat().st_size < 16e6 for file in files)
    trainer = moved_to(tmp_path / "elsewhere", tmp_path / "packed")
    assert (trainer.clock.step, trainer.clock.seen, trainer.agreed) == (7, 99, 12.5) and trainer.warm_from == 0
    before = torch.load(run / "checkpoint.pt", weights_only=True)
    for kept, now in ((before["net"], trainer.net.state_dict()), (before["average"], trainer.average)):
        assert all(torch.equal(kept[name].bfloat16().float(), now[name]) for name in kept)
    old = before["optimizers"][0]["state"]
    new = trainer.optimizers[0].state_dict()["state"]
    assert set(old) == set(new)
    assert all(torch.allclose(old[i]["momentum"], new[i]["momentum"], rtol=0.01, atol=1e-6) for i in old)
    gradients(trainer, slice(0, 2))
    trainer.update()  # AdamW takes its states back too
    assert entries(tmp_path / "elsewhere" / "log.jsonl") == [{"note": "begun"}]
    ours, theirs = (load_vae(folder / "vae").state_dict() for folder in (run, tmp_path / "elsewhere"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_weights_begin_a_new_schedule(run, tmp_path):
    pack(run, tmp_path / "packed")
    folder = tmp_path / "anew"
    assert unpack(tmp_path / "packed", folder, anew=True, vae_anew=True)
    trainer = Trainer(small_net(seed=9), Budget(), folder)
    assert trainer.resume() and (trainer.clock.step, trainer.clock.seen, trainer.agreed) == (0, 99, 0.0)
    assert not (folder / "vae" / FROZEN).exists()
    begun_with = load_vae(run / "vae").state_dict()
    quick = VAERecipe(processes=1, measured=2, judged=1, warmup_steps=1, lr=0.0)
    trained = train_vae(folder / "vae", 0.0, recipe=quick, log=lambda words: None)
    assert all(torch.equal(tensor, begun_with[name]) for name, tensor in trained.state_dict().items())


def test_a_run_goes_on_from_the_shipped_model_and_what_only_helps_training(run, tmp_path, monkeypatch):
    packed, slimmed = tmp_path / "packed", tmp_path / "slim"
    pack(run, packed)
    model = export_nano(run, tmp_path / "model")
    slim(packed, slimmed)
    assert not list(slimmed.glob("ema*")) and sum(f.stat().st_size for f in slimmed.iterdir()) < 1e6
    monkeypatch.setattr("lanting.train.portable.embedded_nano", lambda: model)
    for source, folder in ((packed, "whole"), (slimmed, "mended")):
        assert unpack(source, tmp_path / folder)
    whole, mended = (torch.load(tmp_path / name / "checkpoint.pt", weights_only=True) for name in ("whole", "mended"))
    assert set(whole["average"]) == set(mended["average"]) and whole["clock"] == mended["clock"]
    assert all(torch.equal(tensor, mended["average"][name]) for name, tensor in whole["average"].items())
    ours, theirs = (load_vae(tmp_path / name / "vae").state_dict() for name in ("whole", "mended"))
    assert all(torch.equal(ours[name].bfloat16(), theirs[name].bfloat16()) for name in ours)


def test_what_is_in_the_repository_fits_the_shipped_model(tmp_path):
    assert unpack(Path(__file__).parents[2] / "checkpoints" / "nano", tmp_path / "run")
    kept = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    trainer = Trainer(NanoNet(NanoConfig.from_dict(kept["config"])), Budget(), tmp_path / "run")
    assert trainer.resume()


def test_what_does_not_fit_stays_behind(run, tmp_path):
    """The average always travels; without the rest a run goes on from it and warms up again."""
    everything = sum(f.stat().st_size for f in pack(run, tmp_path / "all"))
    net = sum(t.numel() * 2 for t in read_parts(tmp_path / "all" / EMA, EMA).values())
    pack(run, tmp_path / "some", most=everything - 100_000)
    assert not any(name.startswith("optimizer.") for name in read_parts(tmp_path / "some" / STATE, STATE))
    files = pack(run, tmp_path / "least", most=net)
    assert not (tmp_path / "least" / STATE).exists() and len(files) == 4
    for packed in ("some", "least"):
        trainer = moved_to(tmp_path / f"from {packed}", tmp_path / packed)
        assert trainer.warm_from == 7 and trainer.clock.seconds == 12.5
        assert trainer.budget.rate(7 - trainer.warm_from, 12.5) < trainer.budget.lr / 50
    net_state = trainer.net.state_dict()
    assert all(torch.equal(net_state[name], value) for name, value in trainer.average.items())


def test_a_run_with_a_checkpoint_of_its_own_keeps_it(run, tmp_path):
    pack(run, tmp_path / "packed")
    begun(tmp_path / "own", seconds=77.0)
    assert not unpack(tmp_path / "packed", tmp_path / "own")
    assert torch.load(tmp_path / "own" / "checkpoint.pt", weights_only=True)["clock"]["seconds"] == 77.0


def test_nothing_to_pack_or_unpack_is_a_sentence(tmp_path):
    with pytest.raises(ModelError, match="no checkpoint"):
        pack(tmp_path, tmp_path / "out")
    with pytest.raises(ModelError, match="no packed run"):
        unpack(tmp_path, tmp_path / "out")


def halved(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def told(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def lose_a_row(path: Path) -> None:
    tensors = load_file(path)
    name = next(name for name, tensor in tensors.items() if tensor.ndim)
    save_file(tensors | {name: tensors[name][:-1].clone()}, path)


DAMAGE = {
    "ema/ema-00001-of-00001.safetensors": (halved, lose_a_row, Path.unlink),
    "state/state-00001-of-00001.safetensors": (lose_a_row,),
    "run.json": (halved, lambda path: path.write_bytes(b"\xff"), lambda path: path.write_text("[1]")),
    "vae.safetensors": (halved, Path.unlink),
    "train.pt": (lambda path: path.write_bytes(b"PK\x03\x04"),),
}
DAMAGE["run.json"] += tuple(partial(told, **{key: {"x": 1}}) for key in ("clock", "config"))


def test_what_was_damaged_on_its_way_is_refused_before_anything_is_written(run, tmp_path):
    """It became this run's checkpoint, and failed at its first step; next time it was the run's own."""
    pack(run, tmp_path / "packed")
    for name, ways in DAMAGE.items():
        for way in ways:
            shutil.copytree(tmp_path / "packed", tmp_path / "here")
            way(tmp_path / "here" / name)
            with pytest.raises(ModelError, match=r"damaged or no part of a packed run|is missing"):
                main(small_run(tmp_path / "elsewhere", resume_from=str(tmp_path / "here")))
            assert not (tmp_path / "elsewhere").exists(), (name, way)
            shutil.rmtree(tmp_path / "here")
    for shape in ({"layers": 2}, {"width": 32 * 3, "layers": 2}):
        with pytest.raises(ModelError, match="packed holds a network of another shape"):
            main(small_run(tmp_path / "elsewhere", resume_from=str(tmp_path / "packed"), **shape))
    assert not (tmp_path / "elsewhere").exists()


def test_the_average_can_be_opened_by_anyone(run, tmp_path):
    pack(run, tmp_path)
    (file,) = (tmp_path / EMA).glob("*.safetensors")
    tensors = load_file(str(file))
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}
    assert {name.split(".")[0] for name in tensors} == {"language", "visual", "transformer", *HEADS}


def test_the_command_takes_up_a_slice_from_another_machine(run, tmp_path, monkeypatch):
    lighten(monkeypatch)
    pack(run, tmp_path / "packed")
    here = small_run(tmp_path / "here", resume_from=str(tmp_path / "packed"), minutes=0.0, slice_minutes=5.0)
    model = main(replace(here, quiet=True))
    assert (model / "model_index.json").is_file()
    assert torch.load(tmp_path / "here" / "checkpoint.pt", weights_only=True)["clock"]["step"] == 7
    assert (tmp_path / "here" / "portable" / "run.json").is_file()


def test_a_slice_may_end_in_the_autoencoder(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("lanting.train.nano.vae_recipe", lambda run: replace(vae_recipe(run), processes=1))
    quick = VAERecipe(batch=2, crop=32, canvas_share=0.0, processes=1, judged=1, until=time.monotonic())
    train_vae(tmp_path / "vae", 60.0, recipe=quick, log=lambda line: None)
    assert (tmp_path / "vae" / CHECKPOINT).exists() and not (tmp_path / "vae" / FROZEN).exists()
    shutil.copytree(tmp_path / "vae", tmp_path / "run" / "vae")
    run = small_run(tmp_path / "run", vae_minutes=60.0, slice_minutes=1.0, until=time.monotonic())
    assert main(run) == tmp_path / "run"
    assert "autoencoder is not finished" in capsys.readouterr().err
    elsewhere = tmp_path / "elsewhere"
    assert unpack(run.portable, elsewhere) and not unpack(run.portable, elsewhere)
    brought, here = (torch.load(f / "vae" / CHECKPOINT, weights_only=True) for f in (elsewhere, tmp_path / "run"))
    assert brought["clock"] == here["clock"] and (run.portable / CHECKPOINT).stat().st_size < 16e6


def test_a_slice_may_end_in_the_autoencoder_of_weights_that_begin_anew(run, tmp_path):
    """What it brings back is all that is needed, the transformer that waits too."""
    first, second = tmp_path / "first", tmp_path / "second"
    pack(run, first)
    assert unpack(first, second, vae_anew=True)
    quick = VAERecipe(batch=2, crop=32, canvas_share=0.0, processes=1, judged=1, until=0.0)
    train_vae(second / "vae", 60.0, recipe=quick, log=lambda line: None)
    shutil.copytree(first, tmp_path / "back")
    pack(second, tmp_path / "back")
    assert not (tmp_path / "back" / VAE).exists()  # that of the slice before
    third = moved_to(tmp_path / "third", tmp_path / "back")
    assert third.clock.step == 7 and not (tmp_path / "third" / "vae" / FROZEN).exists()
    assert torch.load(tmp_path / "third" / "vae" / CHECKPOINT, weights_only=True)["clock"][0] == 1


def test_a_slice_may_end_while_the_decoder_is_sharpened(run, tmp_path, capsys):
    shutil.copytree(run / "vae", tmp_path / "run" / "vae")
    asked = {"decoder_minutes": 60.0, "slice_minutes": 1.0, "until": 0.0, "seed": 5}
    here = small_run(tmp_path / "run", **asked)
    recipe = decoder_recipe(settled(here))
    assert (recipe.until, recipe.seed, recipe.device, recipe.processes, recipe.lr) == (0.0, 6, "cpu", 1, 1e-3)
    assert main(here) == here.folder and "autoencoder is not finished" in capsys.readouterr().err
    assert unpack(here.portable, tmp_path / "elsewhere")
    names = {path.name for path in (tmp_path / "elsewhere" / "vae").iterdir()}
    assert {UNTUNED, FROZEN} <= names and DECODER not in names


def test_the_autoencoder_takes_large_batches_on_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr("lanting.train.nano_run.preset", lambda *_: on_gpu(79, 16))
    small, large = (vae_recipe(replace(settled(small_run(tmp_path)), device=device)) for device in ("cpu", "cuda"))
    assert (small.processes, small.feeders, small.batch) == (2, 0, VAERecipe().batch)
    assert (large.processes, large.feeders, large.device) == (1, 14, "cuda") and large.batch > 40 * small.batch


def test_the_autoencoder_fed_by_other_processes(tmp_path, monkeypatch):
    imported(monkeypatch)
    quick = VAERecipe(batch=4, crop=32, processes=1, judged=1, measured=2, feeders=1, canvas_batch=1, log_every=0.0)
    told: list[str] = []
    train_vae(tmp_path, 1e-4, recipe=quick, log=told.append)
    assert (tmp_path / FROZEN).exists() and "dB" in told[-1]
