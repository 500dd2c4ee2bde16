"""Memory stays flat over requests of mixed sizes and tasks. The long run is benchmarks/steady_memory.py."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "steady_memory.py"


@pytest.mark.parametrize("options", [[], ["--streamed"]], ids=["resident", "streamed"])
def test_no_growth_over_mixed_requests(options, tmp_path):
    out = tmp_path / "memory.json"
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--requests", "36", "--json", str(out), *options],
        capture_output=True,
        text=True,
        timeout=500,
    )
    seen = json.loads(out.read_text(encoding="utf-8")) if out.is_file() else {}
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(seen["bytes"]) == 4 and seen["growth"] <= 0.01
