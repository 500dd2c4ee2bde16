"""What a picture gains from several devices: seconds of a step on one and on all of them, in turn, again and again.

    python benchmarks/parallel.py [--devices cpu,cpu] [--pairs 5] [--model FOLDER --size 1024x1024] [--out FILE.json]

"sides": guidance, one side on each device (devices of a side share its tokens where there are more than two). "tokens":
no guidance, all devices share one side's tokens. On CPUs every process has one thread, and nano and two blocks of the
full width (random weights) are measured; elsewhere the model that is named. A number above 1 is how many times less a
step takes; of several devices it is at most as many. Medians of all pairs; where others use the machine, too, "of the
shortest" divides the shortest steps, and "by the busiest processor" compares processor time of the process that took
most, which leaves out what it waits for.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported; a GPU's host needs no more

import numpy as np
import torch
from safetensors.torch import save_file

from lanting import Engine, Progress, Request, Result
from lanting.engine import parallel_split
from lanting.nn.mmdit import QwenImageTransformer, TransformerConfig
from lanting.weights.home import embedded_nano
from lanting.weights.stored import construct

RESULTS = Path(__file__).parent / "results"
sys.path.insert(0, str(Path(__file__).parent))

from serve_load import machine  # noqa: E402

WORDS = 'a red sign with white text "Fresh Bread"'
WIDE = {"num_layers": 2, "num_attention_heads": 24, "attention_head_dim": 128, "axes_dims_rope": [16, 56, 56]}


@dataclass(frozen=True)
class Case:
    """One model and size. `steps` are timed behind a first one."""

    name: str
    model: str
    size: tuple[int, int]
    steps: int
    dtype: str | None = None


def wide(folder: Path) -> str:
    """A model folder: nano's, but for two blocks of the full width with random weights, in bfloat16."""
    nano = embedded_nano()
    shutil.copytree(nano, folder, ignore=shutil.ignore_patterns("transformer", "lora"))
    config = json.loads((nano / "transformer" / "config.json").read_text()) | WIDE
    (folder / "transformer").mkdir()
    (folder / "transformer" / "config.json").write_text(json.dumps(config))
    shapes = construct(lambda: QwenImageTransformer(TransformerConfig.from_dict(config)), "benchmark").state_dict()
    torch.manual_seed(0)
    tensors = {name: drawn(name, tuple(tensor.shape)) for name, tensor in shapes.items()}
    save_file(tensors, str(folder / "transformer" / "diffusion_pytorch_model.safetensors"))
    return str(folder)


def drawn(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Weights that keep a velocity's length possible."""
    if len(shape) == 1:
        return torch.full(shape, float(".norm_" in name or name.startswith("txt_norm")), dtype=torch.bfloat16)
    scale = shape[-1] ** -0.5 if name == "proj_out.weight" or "mod" not in name else 0.1 * shape[-1] ** -0.5
    return torch.randn(shape, dtype=torch.bfloat16).mul_(scale)


@dataclass(frozen=True)
class Turn:
    """One drawing; of one step, the first left out."""

    wall: float
    busy: float  # seconds of the processor, of the process that took most
    result: Result


def drawing(engine: Engine, request: Request) -> Turn:
    walls: list[float] = []
    busy: list[list[float]] = []
    for event in engine.stream(request):
        if isinstance(event, Result):
            steps = len(walls) - 1
            most = max(last - first for first, last in zip(busy[0], busy[-1], strict=True))
            return Turn((walls[-1] - walls[0]) / steps, most / steps, event)
        if isinstance(event, Progress) and event.phase == "denoise":
            walls.append(event.seconds)
            crew = engine.models.crew
            followers = [peer.process.pid for peer in crew.peers] if crew is not None else []
            busy.append([time.process_time(), *map(processor_seconds, followers)])
        assert not event.notices, event.notices
    raise RuntimeError("no result")


def processor_seconds(process: int) -> float:
    """Of another process so far; 0 where the system does not tell."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextmanager
def engines(case: Case, devices: str) -> Iterator[list[Engine]]:
    """On the first device alone, and on all of them."""
    with ExitStack() as stack:
        words = [devices.split(",")[0], devices]
        yield [stack.enter_context(Engine.open(case.model, device=one, dtype=case.dtype)) for one in words]


def measured(case: Case, devices: str, pairs: int) -> dict[str, Any]:
    row: dict[str, Any] = {"size": "x".join(map(str, case.size)), "steps": case.steps}
    with engines(case, devices) as (alone, several):
        for what, scale in (("sides", 4.0), ("tokens", 1.0)):
            request = Request(WORDS, size=case.size, steps=case.steps + 1, guidance_scale=scale, seed=1)
            for engine in (alone, several):
                engine.run(replace(request, steps=1))
            turns = [(drawing(alone, request), drawing(several, request)) for _ in range(pairs)]
            ratios = [one.wall / other.wall for one, other in turns]
            (*_, (one, other)) = turns
            row[what] = {
                "devices": other.result.recipes[0].versions.get("devices", "2, a side each"),
                "seconds of a step alone": round(median(one.wall for one, _ in turns), 4),
                "seconds of a step on all": round(median(other.wall for _, other in turns), 4),
                "times": round(median(ratios), 3),
                "times, of the shortest": round(min(a.wall for a, _ in turns) / min(b.wall for _, b in turns), 3),
                "times, by the busiest processor": round(median(a.busy / b.busy for a, b in turns), 3),
                "grey levels apart": apart(one.result, other.result),
            }
            print(case.name, what, json.dumps(row[what]), flush=True)
    return row


def apart(one: Result, other: Result) -> int:
    first, second = (np.asarray(each.images[0], np.int16) for each in (one, other))
    return int(np.abs(first - second).max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", default="cpu,cpu")
    parser.add_argument("--model", help="a folder or a release; CPUs: nano and two blocks of the full width")
    parser.add_argument("--size", default="256x256")
    parser.add_argument("--steps", type=int, default=4, help="timed ones of a drawing")
    parser.add_argument("--only", choices=("nano", "wide"), help="one of the two that are measured on CPUs")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS / "parallel.json")
    given = parser.parse_args()
    parallel_split.WORTH = 1  # also where an exchange gains nothing
    width, height = map(int, given.size.split("x"))
    size, cpus = (width, height), given.devices.startswith("cpu")
    if cpus:
        torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        cases = [Case(given.model, given.model, size, given.steps)] if given.model else []
        if not given.model and given.only != "wide":
            cases.append(Case("nano", "nano", size, 2 * given.steps))
        if not given.model and given.only != "nano":
            cases.append(Case("two full-width blocks", wide(Path(folder) / "wide"), size, given.steps, "bfloat16"))
        table: dict[str, Any] = {"machine": machine(), "devices": given.devices, "pairs": given.pairs}
        if not cpus:
            table["gpus"] = [torch.cuda.get_device_name(one) for one in range(torch.cuda.device_count())]
        table["date"] = datetime.now(UTC).date().isoformat()
        table |= {case.name: {"load": machine(), **measured(case, given.devices, given.pairs)} for case in cases}
    before = json.loads(given.out.read_text()) if given.only and given.out.exists() else {}
    given.out.write_text(json.dumps(before | table, indent=1) + "\n")


if __name__ == "__main__":
    main()
