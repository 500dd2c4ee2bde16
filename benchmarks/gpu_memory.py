"""Does a full-size model keep to a budget of GPU memory? One picture under each, with the allocator holding the line.

    python benchmarks/gpu_memory.py --dir DIR --out results.json [--budgets 24 16 12 8] [--size 1024]
    python benchmarks/gpu_memory.py --dir DIR --out results.json --dry-run    # few layers on the CPU

Writes the checkpoint of `full_size.py` in int4 (17 GB) unless it is there, then draws with `Engine.open(vram=...)`,
each budget in a process of its own. CUDA's allocator is told the budget less what the driver takes: going over it is
an error, however large the card is. Seconds of loading are from a warm page cache.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch

import full_size
from lanting import Engine, Request
from lanting.core.types import Progress


def draw(folder: Path, asked: argparse.Namespace) -> dict[str, Any]:
    """One picture in this process: seconds by phase, a step's seconds, and bytes of GPU memory at most."""
    device = "cpu" if asked.dry_run else "cuda"
    size = (256, 256) if asked.dry_run else (asked.size, asked.size)
    request = Request(
        prompt="a tea house", size=size, steps=asked.steps, guidance_scale=4.0, negative_prompt=" ", seed=1
    )
    budget = {"ram" if asked.dry_run else "vram": f"{asked.budget}G"}
    began, times = time.perf_counter(), []
    found: dict[str, Any] = {"budget": asked.budget}
    with Engine.open(str(folder), device=device, **budget) as engine:  # pyright: ignore[reportArgumentType]
        found["plan"] = engine.plan.sentence() if engine.plan else ""
        for event in engine.stream(request):
            if isinstance(event, Progress):
                if event.phase == "denoise":
                    times.append(time.perf_counter())
            else:
                found["seconds"] = dict(event.seconds)
    found["whole"] = time.perf_counter() - began
    found["step"] = median([b - a for a, b in pairwise(times)] or [0.0])
    if device == "cuda":
        found["allocated"], found["reserved"] = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    return found


def child(folder: Path, asked: argparse.Namespace, budget: int) -> dict[str, Any]:
    """`draw` in a process of its own; its last words where it fails."""
    command = [sys.executable, __file__, "--dir", str(folder), "--out", str(asked.out), "--budget", str(budget)]
    command += ["--steps", str(asked.steps), "--size", str(asked.size), *(["--dry-run"] if asked.dry_run else [])]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=asked.seconds)
    except subprocess.TimeoutExpired:
        return {"budget": budget, "failed": f"not done after {asked.seconds} s"}
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        return {"budget": budget, "failed": done.stderr.strip().splitlines()[-3:]}
    return json.loads(lines[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--budgets", type=int, nargs="*", default=[24, 8, 12, 16])
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=120.0, help="for one budget, at most")
    parser.add_argument("--write-only", action="store_true", help="the checkpoint and no picture")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--budget", type=int, help=argparse.SUPPRESS)  # in the process that draws
    asked = parser.parse_args()
    if asked.budget:
        print(json.dumps(draw(asked.dir, asked)))
        return
    layers, readers = (2, 2) if asked.dry_run else (full_size.LAYERS, full_size.READER_LAYERS)
    asked.dir.mkdir(parents=True, exist_ok=True)
    wish = argparse.Namespace(release="qwen-image", kind="int4", layers=layers, reader_layers=readers)
    found: dict[str, Any] = {"model": full_size.make_model(asked.dir, wish), "runs": []}
    for budget in [] if asked.write_only else asked.budgets:
        found["runs"].append(child(asked.dir, asked, budget))
        print(json.dumps(found["runs"][-1]), flush=True)
        asked.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
