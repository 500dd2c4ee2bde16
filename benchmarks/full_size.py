"""The full geometry on a small machine: peak memory and time, resident with the table and streamed from disk.

    python benchmarks/full_size.py [--dir DIR] [--kind int4|fp8|q4_k_m] [--steps 4] [--rounds 1] [--cold] [--keep]
    python benchmarks/full_size.py --release qwen-image-2.1 [--references 1]
    python benchmarks/full_size.py --layers 3 --reader-layers 2        # the same at full width with few layers

Writes a checkpoint of a release's shape with random weights (Qwen-Image: 20,430,401,088 in the transformer,
Qwen2.5-VL-7B with its vision tower, the VAE; Qwen-Image-2.1: 7,115,124,736, Qwen3-VL-8B, its VAE), packed on the
way, by the project's own writers; then draws 256 x 256 end to end, once per placement, each in a process of its own.
Peak memory is that process's high-water mark, mapped pages included. The pictures are noise: sizes and times are real,
contents are not.

Some rows of each width and kind are drawn and packed once, by the same quantizers that `lanting quantize` uses, and
every matrix is made of them, beginning with another one: packing 20 billion different weights as q4_k_m takes one core
half an hour, and the file would have the same size. `--cold` drops the files from the page cache before a run; while
it runs the system may keep what fits, so on a machine with much memory "streamed" is a test of memory and not of the
disk. A step's time is the median of all rounds, in which the placements take turns. Processor time is told beside it:
it leaves out waiting, for a disk and for other programs alike, so on a busy machine it is the better of the two.
Without `--keep` the checkpoint is removed at the end; one that was kept is used again.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
from PIL import Image
from torch import Tensor

import lanting
from full_size_nets import RELEASES, Nets
from lanting import Engine, Request
from lanting.attach.quant import chooser
from lanting.core.types import Progress
from lanting.plan import Plan
from lanting.weights.checkpoint import LAYER_NOTES
from lanting.weights.gguf_mix import tensor_bytes, tensor_types
from lanting.weights.gguf_write import encode, write_transformer
from lanting.weights.quantize import FORMATS, Source, write_safetensors
from lanting.weights.stored import pack

LAYERS, READER_LAYERS = RELEASES["qwen-image"].layers, RELEASES["qwen-image"].reader_layers
LIMITS = {"resident": 11e9, "streamed": 4e9}  # bytes of peak memory, int4
ROWS = 512  # different rows of a width; what is packed is the same for all matrices of it
BYTES = {torch.float8_e4m3fn: torch.uint8}  # 8-bit floats can't be gathered
SLOWER = 1.3  # streamed over resident
NANO = Path(lanting.__file__).with_name("nano")


@dataclass
class Pool:
    """Random rows, some for each width and form; a matrix is made of them, beginning with another one each time."""

    made: dict[Any, list[Tensor]] = field(default_factory=dict)
    uses: int = 0

    def take(self, source: Source) -> list[Tensor]:
        """The stored tensors of one weight."""
        shape, form = source.shape, source.form
        if len(shape) < 2:
            return [random_values(source.name, shape).to(torch.bfloat16)]
        key = (shape[1:], form and (form.kind, form.group))
        if key not in self.made:
            values = random_values(source.name, (ROWS, *shape[1:]))
            if form is None:
                self.made[key] = [values.to(torch.bfloat16)]
            else:
                packed = pack(form, values).state_dict()
                self.made[key] = [packed["weight"], packed["weight_scale"]]
        return [each if each.ndim == 0 else self.turned(each, shape[0]) for each in self.made[key]]

    def take_blocks(self, name: str, shape: tuple[int, ...], kind: str) -> Tensor:
        """The bytes of one weight in a type of GGUF."""
        if len(shape) < 2:
            return encode(random_values(name, shape), kind)
        key = (shape[1:], kind)
        if key not in self.made:
            self.made[key] = [encode(random_values(name, (ROWS, *shape[1:])), kind).view(ROWS, -1)]
        return self.turned(self.made[key][0], shape[0])

    def turned(self, rows: Tensor, count: int) -> Tensor:
        """`count` rows of these, over and over, beginning with another one than last time."""
        self.uses += 1
        return rows.view(BYTES.get(rows.dtype, rows.dtype))[(torch.arange(count) + self.uses) % ROWS]


def random_values(name: str, shape: tuple[int, ...]) -> Tensor:
    """Float32 values that keep activations in range: products of variance below 1, small biases, norms near 1."""
    generator = torch.Generator().manual_seed(len(name) + sum(shape))
    if len(shape) < 2 or shape[1:] == (1, 1):  # the VAE's norms have two more axes
        centre = 0.0 if name.endswith("bias") else 1.0
        return centre + 0.02 * torch.randn(shape, generator=generator)
    return torch.randn(shape, generator=generator) * (0.5 / torch.Size(shape[1:]).numel() ** 0.5)


def write_component(out: Path, component: str, shapes: Mapping[str, tuple[int, ...]], kind: str, pool: Pool) -> None:
    """One component as a packed safetensors file."""
    choose = chooser(component, kind)

    def form(name: str, shape: tuple[int, ...]) -> Any:
        matrix = choose is not None and len(shape) == 2 and name.endswith(".weight")
        return choose(name.removesuffix(".weight"), (shape[0], shape[1])) if matrix and choose else None

    sources = [Source(name, shape, form(name, shape)) for name, shape in shapes.items()]
    entries = [entry for source in sources for entry in source.entries("BF16")]
    layers = {
        source.name.removesuffix(".weight"): {"format": FORMATS[source.form.kind], "group_size": source.form.group}
        for source in sources
        if source.form is not None
    }
    notes = {"format": "pt", LAYER_NOTES: json.dumps({"format_version": "1.0", "layers": layers})}
    parts: Iterator[Tensor] = (tensor for source in sources for tensor in pool.take(source))
    write_safetensors(out, entries, parts, notes)


def make_model(folder: Path, wish: argparse.Namespace) -> dict[str, Any]:
    """The whole checkpoint in diffusers' layout (a GGUF transformer beside it). Returns counts, sizes and seconds."""
    told, began = folder / "made.json", time.perf_counter()
    if told.exists():
        return json.loads(told.read_text(encoding="utf-8"))
    release = RELEASES[wish.release]
    nets = release.make(wish.layers, wish.reader_layers)
    body, text, vae = nets.transformer, nets.text_encoder, nets.vae
    count = sum(torch.Size(shape).numel() for shape in body.values())
    if wish.layers == release.layers and count != release.parameters:
        raise SystemExit(f"the transformer has {count} parameters, and {wish.release} has {release.parameters}")
    check_disk(folder, wish, (body, text))
    write_configs(folder, nets)
    pool = Pool()
    if wish.kind in ("int4", "fp8"):
        write_component(folder / "transformer" / "model.safetensors", "transformer", body, wish.kind, pool)
    else:
        types = tensor_types(body, wish.kind)
        read = lambda name: pool.take_blocks(name, body[name], types[name])  # noqa: E731
        write_transformer(folder / "transformer.gguf", body, read, wish.kind, {"config": nets.configs["transformer"]})
    pool.made.clear()
    write_component(folder / "text_encoder" / "model.safetensors", "text_encoder", text, "int4", pool)
    pool.made.clear()
    write_component(folder / "vae" / "diffusion_pytorch_model.safetensors", "vae", vae, "none", pool)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    made = {"parameters": count, "bytes": size, "seconds": time.perf_counter() - began}
    told.write_text(json.dumps(made), encoding="utf-8")
    return made


def check_disk(folder: Path, wish: argparse.Namespace, parts: tuple[Mapping[str, tuple[int, ...]], ...]) -> None:
    """Say what it will take, and stop where there is not that much."""
    bits = {"int4": 4.25, "fp8": 8.0}.get(wish.kind)
    body, text = ({name: torch.Size(shape).numel() for name, shape in each.items()} for each in parts)
    if bits is not None:
        need = sum(body.values()) * bits / 8
    else:
        types = tensor_types(parts[0], wish.kind)
        need = sum(tensor_bytes(parts[0][name], types[name]) for name in body)
    need += sum(count * (4.25 / 8 if ".layers." in name else 2) for name, count in text.items()) + 0.3e9
    free = shutil.disk_usage(folder).free
    print(f"disk: about {need / 1e9:.1f} GB in {folder}, where {free / 1e9:.1f} GB are free")
    if free < 1.05 * need:
        raise SystemExit("too little room: choose another place with --dir")


def write_configs(folder: Path, nets: Nets) -> None:
    """Configs of a model folder; the tokenizer is nano's, whose words are among the real one's numbers."""
    scheduler = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 0.9, "max_image_seq_len": 8192}
    configs = {
        "model_index.json": {"_class_name": nets.pipeline},
        **{f"{component}/config.json": config for component, config in nets.configs.items()},
        "scheduler/scheduler_config.json": {**scheduler, "base_image_seq_len": 256, "shift_terminal": 0.02},
    }
    for name, config in configs.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(config), encoding="utf-8")
    shutil.copytree(NANO / "tokenizer", folder / nets.tokenizer, dirs_exist_ok=True)


def plan_for(wish: argparse.Namespace) -> Plan:
    """Everything resident but taking turns, or nothing resident; modulation tabulated where blocks have one."""
    streamed, layers, kind = wish.placement == "streamed", wish.layers, wish.kind
    return Plan(
        model="full size",
        device="cpu",
        dtype="bfloat16",
        transformer=kind,
        text_encoder="int4",
        blocks=layers,
        resident_blocks=0 if streamed else layers,
        streamed="disk" if streamed else "none",
        modulation_table=wish.release == "qwen-image",
        encoder="unload",
        parked="disk",
        vae_tile=0,
        peak_vram=0,
        peak_ram=0,
        disk=0,
    )


def draw(folder: Path, wish: argparse.Namespace) -> dict[str, Any]:
    """One picture in this process: seconds per phase and step, and the peak of memory."""
    gguf = folder / "transformer.gguf"
    parts = {"transformer": str(gguf)} if gguf.exists() else None
    seen = (Image.effect_noise((256, 256), 60).convert("RGB"),) * wish.references
    request = Request("a tea house", size=(256, 256), steps=wish.steps, guidance_scale=1.0, seed=1, images=seen)
    times: list[tuple[float, float]] = []
    peaks: dict[str, int] = {"start": peak()}
    with Engine.open(str(folder), plan=plan_for(wish), parts=parts) as engine:
        for event in engine.stream(request):
            if isinstance(event, Progress):
                peaks[event.phase] = peak()
                if event.phase == "denoise":
                    times.append((time.perf_counter(), time.process_time()))
            else:
                seconds = dict(event.seconds)
    steps, busy = ([after[i] - before[i] for before, after in pairwise(times)] for i in (0, 1))
    return {"peak": peak(), "peaks": peaks, "seconds": seconds, "steps": steps, "busy": busy}


def peak() -> int:
    """This process's high-water mark in bytes (Linux)."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) * 1024


def drop_cache(folder: Path) -> None:
    """Ask the system to forget what it keeps of these files."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def run(folder: Path, wish: argparse.Namespace, placement: str) -> dict[str, Any]:
    """`draw` in a process of its own."""
    if wish.cold:
        drop_cache(folder)
    command = [sys.executable, __file__, "--dir", str(folder), "--kind", wish.kind, "--placement", placement]
    command += ["--release", wish.release, "--references", str(wish.references)]
    command += ["--steps", str(wish.steps), "--layers", str(wish.layers), "--reader-layers", str(wish.reader_layers)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def measure(folder: Path, wish: argparse.Namespace) -> dict[str, Any]:
    """Every placement once a round; of each the largest peak, the median step, and the seconds of its last run."""
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in LIMITS if wish.only in (None, name)}
    for _ in range(wish.rounds):
        for name, done in runs.items():
            done.append(run(folder, wish, name))
            print(f"{name}: {done[-1]}", file=sys.stderr, flush=True)
    return {
        name: {
            "peak": max(each["peak"] for each in done),
            "peaks": done[-1]["peaks"],
            "seconds": done[-1]["seconds"],
            "steps": [each["steps"] for each in done],
            "step": median([step for each in done for step in each["steps"]] or [0.0]),
            "busy": median([step for each in done for step in each["busy"]] or [0.0]),
        }
        for name, done in runs.items()
    }


def report(found: dict[str, Any], wish: argparse.Namespace) -> int:
    """Print what was measured; 1 where a bar of the full size was missed."""
    made = found["model"]
    print(f"model: {made['parameters']:,} parameters, {made['bytes'] / 1e9:.1f} GB, {made['seconds']:.0f} s to write")
    drawn = {name: found[name] for name in LIMITS if name in found}
    for placement, each in drawn.items():
        phases = ", ".join(f"{name} {value:.1f} s" for name, value in each["seconds"].items())
        print(f"{placement}: peak {each['peak'] / 1e9:.2f} GB, {each['step']:.2f} s a step; {phases}")
    told, ratio = found | {"kind": wish.kind, "threads": torch.get_num_threads()}, 0.0
    if len(drawn) == len(LIMITS):
        ratio, busy = (found["streamed"][key] / max(found["resident"][key], 1e-9) for key in ("step", "busy"))
        print(f"streamed over resident: {ratio:.2f}, in processor time {busy:.2f}")
        told |= {"ratio": ratio, "busy_ratio": busy}
    if wish.json:
        wish.json.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    if wish.release != "qwen-image" or (wish.layers, wish.reader_layers) != (LAYERS, READER_LAYERS):
        return 0
    over = [name for name, each in drawn.items() if wish.kind == "int4" and each["peak"] > LIMITS[name]]
    return int(bool(over) or ratio > SLOWER)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, help="where the checkpoint goes; a temporary folder if not given")
    parser.add_argument("--release", choices=tuple(RELEASES), default="qwen-image")
    parser.add_argument("--references", type=int, default=0, help="pictures of 256 x 256 to edit (2.1)")
    parser.add_argument("--kind", choices=("int4", "fp8", "q4_k_m"), default="int4")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--reader-layers", type=int)
    parser.add_argument("--only", choices=tuple(LIMITS), help="one placement instead of both")
    parser.add_argument("--cold", action="store_true")
    parser.add_argument("--keep", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--placement", choices=tuple(LIMITS), help=argparse.SUPPRESS)  # in the process that draws
    wish = parser.parse_args()
    wish.layers = wish.layers or RELEASES[wish.release].layers
    wish.reader_layers = wish.reader_layers or RELEASES[wish.release].reader_layers
    if wish.placement:
        print(json.dumps(draw(wish.dir, wish)))
        return 0
    folder = wish.dir or Path(tempfile.mkdtemp(prefix="full-size-"))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        return report({"model": make_model(folder, wish)} | measure(folder, wish), wish)
    finally:
        if not wish.keep:
            shutil.rmtree(folder)


if __name__ == "__main__":
    sys.exit(main())
