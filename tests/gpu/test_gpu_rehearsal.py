"""The measurements of a GPU, rehearsed on the CPU with a tiny network: every part runs and is written down."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PARTS = ("1024", "single", "edit", "picture", "decode", "512", "1328", "2048", "nano", "compiled", "controls", "forms")


def test_every_part_is_measured_and_drawn(tmp_path):
    out, plot = tmp_path / "found.json", tmp_path / "steps.png"
    words = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--dry-run", "--out", str(out), "--plot", str(plot)]
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}  # minutes, for nothing new
    env["CUDA_VISIBLE_DEVICES"] = ""
    done = subprocess.run([*words, "--seconds", "540"], capture_output=True, text=True, timeout=540, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(out.read_text())
    assert found["left out"] == [] and found["products that torch refused"] == []
    for name in PARTS:
        assert set(found[name]) - {"seconds of this part"} and not {"failed", "cut"} & set(found[name]), name
    assert plot.stat().st_size > 5_000
