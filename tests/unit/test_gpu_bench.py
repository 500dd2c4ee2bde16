"""The GPU benchmark's frame, without a GPU: a run that is cut keeps what it has."""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import time
import weakref
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import full_size
import gpu
import gpu_lora
import gpu_memory
import gpu_single
from gpu_bench import Bench
from gpu_plot import plot
from lanting.core.quality import check_words


@pytest.fixture
def bench(tmp_path, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # the kernels' own tests ask for it: minutes, for nothing new
    return Bench(argparse.Namespace(out=tmp_path / "found.json", seconds=60.0, dry_run=True))


def test_a_part_that_takes_too_long_or_fails_leaves_what_it_found(bench):
    def slow(found):
        found["first"] = 1
        for _ in range(1000):
            try:
                time.sleep(0.01)
            except Exception:  # as whoever tries several ways would
                continue

    def fails(found):
        found["first"] = 2
        raise RuntimeError("no")

    bench.part("slow", slow, 1, 0.05)
    bench.part("fails", fails, 1, 5)
    bench.part("late", fails, 100, 5)
    told = json.loads(bench.asked.out.read_text())
    assert told["slow"]["first"] == 1 and told["slow"]["cut"]
    assert told["fails"]["failed"] == "RuntimeError: no" and told["fails"]["first"] == 2
    assert bench.found["left out"] == ["late"] and "late" not in told
    time.sleep(0.06)  # no alarm is left


def test_all_parts_fit_into_one_call():
    assert sum(need for need, _ in gpu.PARTS.values()) < 520 - 200
    assert set(gpu.PARTS) >= {"512", "1024", "1328", "2048", "edit", "decode", "picture", "compiled", "memory"}
    assert check_words(gpu.BALANCED.split(), gpu.STEPS)


def test_what_was_found_is_drawn(tmp_path):
    row = lambda ms: {"ms": ms}  # noqa: E731
    found = {
        "limits": {"gpu": "a GPU"},
        "1024": {"diffusers": row(300.0), "bf16": row(200.0), "fp8": "RuntimeError"},
        "512": {"bf16": row(10.0)},
        "compiled": {"1024": 250.0},
    }
    plot(found, tmp_path / "steps.png")
    plot({}, tmp_path / "none.png")
    assert (tmp_path / "steps.png").stat().st_size > 1000


def test_without_diffusers_or_with_another_ours_is_measured(bench, monkeypatch):
    def broken(*_):
        raise RuntimeError("Failed to import diffusers.models because of the following error")

    monkeypatch.setattr(gpu, "diffusers_network", broken)
    monkeypatch.setattr(gpu_single, "diffusers_network", broken)
    bench.asked.parts = ["512", "single"]
    gpu.run(bench)
    assert "Failed to import" in bench.found["diffusers"] and bench.found["512"]["bf16"]["ms"] > 0
    assert "Failed to import" in bench.found["single"]["diffusers"] and bench.found["single"]["1024"]["bf16"]["ms"] > 0

    monkeypatch.setattr(gpu, "diffusers_network", lambda *_: broken)  # takes other arguments
    bench.asked.parts = ["512"]
    gpu.run(bench)
    assert "TypeError" in bench.found["512"]["diffusers"] and bench.found["512"]["bf16"]["ms"] > 0


def test_a_program_that_takes_too_long_ends_with_what_it_began(tmp_path):
    inner = f"import time; time.sleep(3); open({str(tmp_path / 'alive')!r}, 'w')"
    outer = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {inner!r}], capture_output=True)"
    with pytest.raises(subprocess.TimeoutExpired):
        gpu.last_words([sys.executable, "-c", outer], 1.5)
    time.sleep(3.5)
    assert not (tmp_path / "alive").exists()
    assert gpu.last_words([sys.executable, "-c", "import sys; sys.exit('no')"], 30) == ["no"]
    assert gpu.last_words([sys.executable, "-c", "print(1)"], 30) == []


def test_budgets_have_a_checkpoint_to_draw_with(tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(full_size, "write_component", lambda path, name, *_: written.append(name))
    monkeypatch.setattr(full_size, "check_disk", lambda *_: None)
    told = ["--dir", str(tmp_path), "--out", str(tmp_path / "found.json"), "--write-only", "--dry-run"]
    monkeypatch.setattr(sys, "argv", ["gpu_memory.py", *told])
    gpu_memory.main()
    assert written == ["transformer", "text_encoder", "vae"] and (tmp_path / "made.json").exists()


def test_networks_are_gone_before_the_next_is_made(bench, monkeypatch):
    """Of 41 GB each, two are more than a GPU has."""
    made, alive = [], []

    def watched(make):
        def network(*given):
            alive.append(sum(one() is not None for one in made))
            made.append(weakref.ref(found := make(*given)))
            return found

        return network

    monkeypatch.setattr(gpu, "network", watched(gpu.network))
    monkeypatch.setattr(gpu_lora, "network", watched(gpu_lora.network))
    bench.asked.parts = ["512", "lora"]
    gc.disable()
    try:
        gpu.run(bench)
    finally:
        gc.enable()
    assert alive == [0] * 4 and {"bf16", "int8", "int4"} <= set(bench.found["lora"])
