"""The script for a rented GPU, rehearsed on the CPU, and the plot of what a run logged."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image

from lanting.train import nano, vae_speed
from training import imported, lighten

ROOT = Path(__file__).parents[2]


def script(name: str) -> ModuleType:
    """A script of the folder benchmarks as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


plot_training, train_on_gpu = script("plot_training"), script("train_on_gpu")


def slice_of(tmp_path: Path, name: str, *words: str) -> list[str]:
    """The words that ask for the rehearsal of one slice."""
    return ["--dry-run", *words, "--folder", str(tmp_path / f"run {name}"), "--out", str(tmp_path / name)]


def report(tmp_path: Path, name: str) -> dict:
    return json.loads((tmp_path / name / "report.json").read_text())


def test_a_slice_comes_back_and_another_machine_goes_on(tmp_path, monkeypatch):
    """The first from the shell, with all kinds of batches; the second here, with one."""
    words = slice_of(tmp_path, "first", "--minutes", "10", "--profile")
    command = [sys.executable, str(ROOT / "benchmarks" / "train_on_gpu.py"), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr
    first = report(tmp_path, "first")
    assert first["speed"]["steps"] >= 1 and "ink english" in first["scores"][0]
    files = [path for path in (tmp_path / "first").rglob("*") if path.is_file()]
    assert len(files) <= 8 and all(path.stat().st_size < 16e6 for path in files)
    assert {"run.json", "log.jsonl", "sheet.png", "vae.safetensors"} <= {path.name for path in files}
    told = (tmp_path / "first" / "profile.txt").read_text()
    assert "forward and backward" in told and "Self CPU" in told and "no profile" not in told

    imported(monkeypatch)
    lighten(monkeypatch)
    monkeypatch.setattr(nano, "seed_embeddings", nano.seed_embeddings)  # the script changes these two for good
    monkeypatch.setattr(vae_speed, "COMPILED", vae_speed.COMPILED)
    kept = ["--resume-from", str(tmp_path / "first"), "--atlas", str(tmp_path / "run first" / "atlas.npz")]
    words = slice_of(tmp_path, "second", "--minutes", "60", *kept)
    monkeypatch.setattr("sys.argv", ["train_on_gpu", *words])
    train_on_gpu.main()
    second = report(tmp_path, "second")
    assert second["speed"]["steps"] > first["speed"]["steps"]


def test_rates_leave_the_warming_up_out():
    log = [
        {"left": 9, "step": 10 * i, "seen": 100 * i, "seconds": i, "per_second": rate, "queue": 0.5, "missed": 5.0}
        for i, rate in enumerate((1.0, 100.0, 120.0))
    ]
    told = train_on_gpu.speed([{"note": "begun"}, *log])
    assert (told.mean_rate, told.best_rate, told.steps, told.queue, told.missed) == (110.0, 120.0, 20, 0.5, 0.5)
    assert train_on_gpu.speed([]).steps == 0


def test_the_last_sheet_of_every_set_is_kept(tmp_path):
    for name in ("english-000100", "english-000020", "square-000100"):
        Image.new("RGB", (8, 4), "red").save(tmp_path / f"{name}.png")
    latest = train_on_gpu.latest_sheets(tmp_path)
    assert [path.stem for path in latest] == ["english-000100", "square-000100"]
    assert train_on_gpu.one_sheet(latest).size == (8, 8)


@pytest.mark.parametrize("count", [0, 1, 2])
def test_a_log_is_drawn(tmp_path, monkeypatch, count):
    lines = [
        {"step": i, "seen": 1000 * i, "left": 5, "per_second": 40.0, "wide loss": 1 / (i + 1), "wide read": i / 9}
        for i in range(8)
    ]
    lines.append({"note": "x", "step": 8, "seen": 8000, "ink english": 0.5})
    for number in range(max(1, count)):
        (tmp_path / str(number)).mkdir()
        text = "".join(json.dumps(line) + "\n" for line in lines) if count else "only words\n"
        (tmp_path / str(number) / "log.jsonl").write_text(text)
    logs = [str(path) for path in sorted(tmp_path.glob("*/log.jsonl"))]
    monkeypatch.setattr("sys.argv", ["plot", *logs, "-o", str(tmp_path / "plot.png")])
    if not count:
        with pytest.raises(SystemExit):
            plot_training.main()
        return
    plot_training.main()
    assert Image.open(tmp_path / "plot.png").size == (2 * plot_training.WIDTH, 3 * plot_training.HEIGHT)
