"""One update of a LoRA on the full geometry, on a small machine: peak memory, resident and streamed, and the forecast.

    python benchmarks/full_size.py --kind int4 --only resident --steps 1 --dir DIR --keep
    python benchmarks/lora_full_size.py --model DIR/... --out build/lora-full

The model's weights are random (benchmarks/full_size.py), its Linears packed in 4 bits; activations are float32 on
processors without bfloat16. One picture of 128 x 128; each placement runs in a process of its own, whose high-water
mark is told, mapped pages included. What the forecast leaves out, Python and its libraries, is measured beside it.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch
from PIL import Image

from lanting.core.lang import explain
from lanting.train.lora.cache import prepare
from lanting.train.lora.dataset import DatasetOptions, read_folder
from lanting.train.lora.job import LoraJob, LoraTraining
from lanting.train.lora.memory import need, tokens_of
from lanting.train.lora.run import LoraRun, Trainer
from lanting.weights.find import locate


def peak() -> int:
    """Bytes of this process's high-water mark."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def training(own: argparse.Namespace) -> LoraTraining:
    folder = own.out / "set"
    folder.mkdir(parents=True, exist_ok=True)
    Image.linear_gradient("L").resize((own.side, own.side)).convert("RGB").save(folder / "one.png")
    found = locate(str(own.model))
    examples = read_folder(folder, DatasetOptions(caption="a picture"), found.spec.defaults)
    job = LoraJob(found, examples, own.out / "lora.safetensors", LoraRun(rank=own.rank), device="cpu", quant="none")
    return LoraTraining(job)


def one(own: argparse.Namespace) -> dict[str, float]:
    """What one placement takes."""
    made = training(own)
    job, models = made.job, made.models
    files = prepare(models, job.examples, own.out / "cache", lambda done, count: None)
    if own.stage == "prepare":
        return {"peak": peak()}
    models.close()
    tokens = max(tokens_of(example, models.spec.defaults) for example in job.examples)
    made.need = need(models, "none", tokens, job.run, None if own.stage == "resident" else own.stay)
    before, began, spent = peak(), time.monotonic(), time.process_time()
    placed = made.placed()
    trainer = Trainer(placed, models.schedule, files, job.run)
    report = trainer.learn()
    return {
        "peak": peak(),
        "before": before,
        "predicted": made.need.total,
        "seconds": round(time.monotonic() - began, 1),
        "processor_seconds": round(time.process_time() - spent, 1),
        "loss": report.loss,
        "learnt": sum(p.numel() for p in trainer.net.parameters),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("build/lora-full"))
    parser.add_argument("--side", type=int, default=128)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--stay", type=int, default=0, help="blocks that stay when streamed")
    parser.add_argument("--stage", choices=("prepare", "resident", "streamed"))
    own = parser.parse_args()
    if own.stage:
        try:
            print(json.dumps(one(own)))
        except Exception as error:
            sys.exit(explain(error) if hasattr(error, "sentence") else repr(error))
        return
    found = {}
    for stage in ("prepare", "resident", "streamed"):
        command = [sys.executable, __file__, *sys.argv[1:], "--stage", stage]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(done.stderr)
        found[stage] = json.loads(done.stdout.splitlines()[-1])
        print(stage, found[stage], flush=True)
    result = {"machine": f"torch {torch.__version__}, {torch.get_num_threads()} threads", **found}
    (own.out / "result.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
