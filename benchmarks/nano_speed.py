"""nano from words to picture on a CPU, ours against diffusers with the same weights, side by side in one process.

    python benchmarks/nano_speed.py [--size 256] [--reps 5] [--threads 1] [--out FILE]

256 x 256, the model's own steps and guidance. Processor time, variants in turn, medians; every prompt is new, so that
nothing is remembered. diffusers runs in bfloat16 and in float32; ours as `lanting generate` would (`auto`)
and in what else one may ask for. Cold: a new process from its start to the PNG, by the clock.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from block_cpu import medians
from lanting import Engine, Request
from lanting.kernels import library
from lanting.specs.model_spec import get_spec
from lanting.weights.find import embedded_nano

NUMBERS = itertools.count(1)


def prompt() -> str:
    return f'A blue sign that says "OPEN {next(NUMBERS)}"'


def ours(size: int, together: bool = False, **options: Any) -> Callable[[], Any]:
    """`together`: both sides of the guidance in one call, as the option `batched_guidance` asks."""
    engine = Engine.open("nano", device="cpu", **options)
    given = {"batched_guidance": True} if together else {}
    return lambda: engine.run(Request(prompt=prompt(), size=(size, size), seed=7, options=given))


def theirs(size: int, dtype: torch.dtype) -> Callable[[], Any]:
    from diffusers import QwenImagePipeline

    defaults = get_spec("nano").defaults
    pipe: Any = QwenImagePipeline.from_pretrained(embedded_nano(), torch_dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    given = {
        "negative_prompt": " ",
        "num_inference_steps": defaults.steps,
        "true_cfg_scale": defaults.guidance_scale,
        "width": size,
        "height": size,
    }
    return lambda: pipe(prompt(), **given, generator=torch.Generator().manual_seed(7))


def cold(times: int = 3) -> float:
    """Seconds from starting a process to its PNG, the best of a few."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "lanting", "generate", prompt(), "--size", "256x256", "--force"]
        best = float("inf")
        for _ in range(times):
            began = time.monotonic()
            subprocess.run([*command, "-o", f"{folder}/cold.png"], check=True, capture_output=True)
            best = min(best, time.monotonic() - began)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--reps", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    library.use_threads(asked.threads)
    cases = {
        "diffusers bfloat16": theirs(asked.size, torch.bfloat16),
        "diffusers float32": theirs(asked.size, torch.float32),
        "ours auto": ours(asked.size),
        "ours float32": ours(asked.size, dtype="float32"),
        "ours bfloat16": ours(asked.size, dtype="bfloat16"),
        "ours int8": ours(asked.size, quant="int8"),
        "ours int4": ours(asked.size, quant="int4"),
        "ours auto, guidance in one call": ours(asked.size, together=True),
        "ours int8, guidance in one call": ours(asked.size, together=True, quant="int8"),
    }
    seconds = medians(cases, asked.reps, warm=2)
    bf16, fp32 = seconds["diffusers bfloat16"], seconds["diffusers float32"]
    report: dict[str, Any] = {"size": asked.size, "threads": asked.threads, "kernels": library.instruction_set()}
    report["rows"] = {n: {"seconds": s, "of bfloat16": bf16 / s, "of float32": fp32 / s} for n, s in seconds.items()}
    for name, row in report["rows"].items():
        print(f"{name:32s} {row['of bfloat16']:6.2f} x diffusers bf16  {row['of float32']:6.2f} x its float32")
    report["cold"] = cold()
    print(f"cold, from start to PNG: {report['cold']:.1f} s")
    if asked.out:
        asked.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
