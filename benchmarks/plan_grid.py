"""Does the plan keep its word? Predicted against measured peaks of memory, each case in a fresh process.

    python benchmarks/plan_grid.py [--work FOLDER] [--only WORDS] [--json FILE]

Measured is the largest sum of anonymous and file-backed resident pages of a process that opens a model and draws one
picture by a plan, sampled every 2 ms; predicted is the plan's `peak_ram`. Models have random weights: nano's own, and
a middle-sized one (0.3 B parameters, the published VAE) whose weights are no longer small beside Python and torch.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

STEPS = 2
PROMPT = "a blue sign that says hello"


@dataclass(frozen=True)
class Case:
    """One drawing. `way` overrides parts of the plan: kind, reader, resident, streamed, table, encoder, tile."""

    name: str
    model: str = "mid"
    size: tuple[int, int] = (256, 256)
    dtype: str = "bfloat16"
    count: int = 1
    references: int = 0
    guidance: float = 1.0
    way: tuple[tuple[str, Any], ...] = ()


def case(name: str, model: str = "mid", size: int | tuple[int, int] = 256, **more: Any) -> Case:
    known = {key: more.pop(key) for key in ("dtype", "count", "references", "guidance") if key in more}
    return Case(name, model, (size, size) if isinstance(size, int) else size, way=tuple(more.items()), **known)


CASES = (
    case("nano", "nano", (224, 96), dtype="float32"),
    case("nano, 512", "nano", 512, dtype="float32"),
    case("nano, 1024", "nano", 1024, dtype="float32"),
    case("nano, 1024 in tiles", "nano", 1024, dtype="float32", tile=256),
    case("nano, 8 pictures", "nano", 384, dtype="float32", count=8),
    case("nano, bf16, 768", "nano", 768),
    case("256"),
    case("512", size=512),
    case("768", size=768),
    case("768 in tiles", size=768, tile=256),
    case("wide", size=(1024, 384), tile=256),
    case("guided", size=512, guidance=4.0),
    case("4 pictures", size=256, count=4, tile=256),
    case("float32", dtype="float32"),
    case("float32, 512 in tiles", size=512, dtype="float32", tile=256),
    case("int8", kind="int8"),
    case("int8, 512 in tiles", size=512, kind="int8", tile=256),
    case("fp8", kind="fp8"),
    case("int4", kind="int4"),
    case("int4 and table", kind="int4", table=True),
    case("table", table=True),
    case("streamed from disk", streamed="disk", resident=0),
    case("half streamed", streamed="disk", resident=4, size=512, tile=256),
    case("streamed, table", streamed="disk", resident=0, table=True),
    case("takes turns", encoder="unload"),
    case("streamed, takes turns", streamed="disk", resident=0, encoder="unload", table=True),
    case("1 reference", "mid-edit", references=1, size=384, tile=256),
    case("2 references", "mid-edit", references=2, size=384, tile=256),
    case("2 references, streamed", "mid-edit", references=2, size=384, tile=256, streamed="disk", resident=0),
)


def build(folder: Path) -> Path:
    """The middle-sized model in diffusers' layout: nano's tokenizer, random weights, the published VAE."""
    import torch
    from safetensors.torch import save_file

    from lanting.plan.geometry import Geometry
    from lanting.plan.sizes import language_tensors, transformer_tensors, vae_tensors, vision_tensors
    from lanting.weights.home import embedded_nano

    nano = embedded_nano()
    shutil.copytree(nano, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    configs = {part: json.loads((nano / part / "config.json").read_text()) for part in ("transformer", "vae")}
    reader = json.loads((nano / "text_encoder" / "config.json").read_text())
    configs["transformer"] |= {"num_layers": 8, "num_attention_heads": 8, "attention_head_dim": 128}
    configs["transformer"] |= {"joint_attention_dim": 1024, "axes_dims_rope": [16, 56, 56]}
    vae = configs["vae"] | {"base_dim": 96, "num_res_blocks": 2, "temperal_downsample": [False, True, True]}
    reader["text_config"] |= {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 6}
    reader["text_config"] |= {"num_attention_heads": 16, "num_key_value_heads": 4}
    reader["vision_config"] |= {"out_hidden_size": 1024, "hidden_size": 320, "num_heads": 4, "intermediate_size": 864}
    reader["vision_config"] |= {"depth": 4, "fullatt_block_indexes": [3]}
    configs |= {"vae": vae, "text_encoder": reader}
    edits = folder.name.endswith("edit")
    index = {"_class_name": "QwenImageEditPlusPipeline" if edits else "QwenImagePipeline"}
    (folder / "model_index.json").write_text(json.dumps(index))
    net = Geometry.from_configs(configs)
    parts = {
        "transformer": transformer_tensors(net.transformer),
        "vae": vae_tensors(net.vae),
        "text_encoder": [*language_tensors(net.language, False), *vision_tensors(net.vision)],
    }
    for part, tensors in parts.items():
        (folder / part / "config.json").write_text(json.dumps(configs[part]))
        state = {name: torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02) for name, shape in tensors}
        stem = "model" if part == "text_encoder" else "diffusion_pytorch_model"
        save_file(state, folder / part / f"{stem}.safetensors")
        del state
    return folder


class Watch(threading.Thread):
    """Samples this process's resident pages; `peak` in bytes, with what they were."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak, self.parts, self.going = 0, {}, True
        self.lately, self.phases = 0, []

    def run(self) -> None:
        while self.going:
            self.look()
            time.sleep(0.002)

    def look(self) -> int:
        """Now, from the kernel's own exact sums."""
        found = {}
        with open("/proc/self/status", encoding="ascii") as file:
            for line in file:
                if line.startswith("Rss"):
                    key, value = line.split(":")
                    found[key] = int(value.split()[0]) * 1024
        total = sum(found.values())
        self.lately = max(self.lately, total)
        if total > self.peak:
            self.peak, self.parts = total, found
        return total

    def since(self) -> int:
        """The largest sum since this was asked last."""
        most, self.lately = self.lately, 0
        return most


def child(told: dict[str, Any]) -> None:
    """Draw one case and print what it took."""
    watch = Watch()
    from PIL import Image

    from lanting import Engine, Progress, Request
    from lanting.plan import Plan

    plan = Plan(**{**told["plan"], "reasons": ()})
    before = watch.look()
    watch.start()
    engine = Engine.open(told["model"], plan=plan)
    images = tuple(Image.new("RGB", tuple(told["size"]), "white") for _ in range(told["references"]))
    request = Request(
        PROMPT, images=images, size=tuple(told["size"]), seed=1, steps=STEPS,
        guidance_scale=told["guidance"], count=told["count"], task="edit" if images else None,
    )  # fmt: skip
    watch.phases = []
    for event in engine.stream(request):
        if isinstance(event, Progress):
            watch.phases.append((event.phase, watch.since()))
    watch.going = False
    phases = dict(watch.phases)
    words = [len(c.embeds[0]) for c in engine.models.prompts.values()]
    told = {"peak": watch.peak, "before": before, "parts": watch.parts, "text": max(words, default=0)}
    print(json.dumps(told | {"phases": phases}))


def predict(folder: str, one: Case) -> Any:
    """The plan of a case, by its way."""
    from PIL import Image

    from lanting.core.types import Request
    from lanting.plan.costs import Bill, Way, price
    from lanting.plan.kinds import KINDS, plain
    from lanting.plan.machine import Device, Machine
    from lanting.plan.model import job_of
    from lanting.specs import settle
    from lanting.weights.find import locate
    from lanting.weights.sized import planned_model

    located = locate(folder)
    model = replace(planned_model(located), precision=one.dtype)
    images = tuple(Image.new("RGB", one.size) for _ in range(one.references))
    asked = Request(PROMPT, images=images, size=one.size, seed=1, steps=STEPS, count=one.count,
                    guidance_scale=one.guidance, task="edit" if images else None)  # fmt: skip
    job = job_of(settle(asked, located.spec), model)
    way = dict(one.way)
    own = plain(one.dtype)
    chosen = Way(
        KINDS[way.get("kind", own.name)], KINDS[way.get("reader", way.get("kind", own.name))],
        way.get("resident", model.geometry.transformer.num_layers), way.get("streamed", "none"),
        way.get("table", False), way.get("encoder", "keep"), "disk", way.get("tile", 0),
    )  # fmt: skip
    machine = Machine(10**10, 10**10, 1, (Device("cpu", "CPU"),))
    return price(Bill(model, job, machine, machine.devices[0]), chosen)


def measure(folder: str, one: Case) -> dict[str, Any]:
    plan = predict(folder, one)
    told = {"model": folder, "plan": asdict(plan), "size": one.size, "references": one.references,
            "guidance": one.guidance, "count": one.count}  # fmt: skip
    done = subprocess.run(
        [sys.executable, __file__, "--child", json.dumps(told)],
        capture_output=True, text=True, check=False, env=os.environ,
    )  # fmt: skip
    if done.returncode:
        return {"name": one.name, "failed": done.stderr.strip().splitlines()[-1:]}
    seen = json.loads(done.stdout.strip().splitlines()[-1])
    error = plan.peak_ram / seen["peak"] - 1
    return {"name": one.name, "predicted": plan.peak_ram, "measured": seen["peak"], "error": error, **seen}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("plan-grid"))
    parser.add_argument("--only", default="", help="cases whose name holds one of these words, comma-separated")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.child:
        child(json.loads(asked.child))
        return
    rows = []
    for one in CASES:
        if asked.only and not any(word in f"{one.model} {one.name}" for word in asked.only.split(",")):
            continue
        folder = asked.work / one.model
        if one.model != "nano" and not folder.exists():
            build(folder)
        row = measure("nano" if one.model == "nano" else str(folder), one)
        rows.append(row | {"model": one.model})
        if "failed" in row:
            print(f"{one.name:26} failed: {row['failed']}", flush=True)
            continue
        said, seen = (f"{row[key] / 1e6:7.0f} MB" for key in ("predicted", "measured"))
        print(f"{one.model:5}{one.name:26} predicted {said}  measured {seen}  {100 * row['error']:+6.1f} %", flush=True)
        print(json.dumps(row), file=sys.stderr, flush=True)
    good = [row for row in rows if "error" in row]
    worst = max((abs(row["error"]) for row in good), default=0.0)
    print(f"{len(good)} cases, worst {100 * worst:.1f} %")
    if asked.json:
        asked.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
