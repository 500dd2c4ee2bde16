"""The full-size autoencoder on a CPU, ours against diffusers', side by side: processor time and memory.

    python benchmarks/vae_cpu.py [--sizes 256 512] [--large] [--ops decode encode] [--reps 3] [--threads 1] [--out FILE]
    python benchmarks/vae_cpu.py --release qwen-image-2.1 --sizes 256 --variants 'diffusers float32' 'ours float32'

Random weights, the same for all. Every variant is a process of its own, as people run it: diffusers as it comes, in
float32 (its default) and bfloat16; ours as the engine runs it, and without its kernels. They take turns, one picture
each, and medians are of what each process used of the processor. Memory is what the process's peak is above what it
held before, once for every size; a small picture warms up first, so that copies of weights count as held, and how much
those are is said by itself. Errors are rms against diffusers in float32. `--large` adds 1024 x 1024, where diffusers
wants 9 GB and minutes.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import statistics
import time
from collections.abc import Callable
from datetime import date
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

RESULTS = Path(__file__).parent / "results"
VARIANTS = ("diffusers float32", "diffusers bfloat16", "ours float32", "ours bfloat16", "ours bfloat16, no kernels")
FIRST, WARM = VARIANTS[0], 64
Op = Callable[[Tensor], Tensor]


def dtype_of(variant: str) -> torch.dtype:
    return torch.float32 if "float32" in variant else torch.bfloat16


def ours(variant: str, second: bool) -> dict[str, Op]:
    from lanting.attach.vae import attach_vae
    from lanting.engine.allocator import return_memory

    return_memory()
    vae = plain(second).to(dtype=dtype_of(variant), memory_format=torch.channels_last)
    if "no kernels" not in variant and not attach_vae(vae):
        raise SystemExit("the kernels are not built: python src/lanting/kernels/build.py")
    return {"decode": vae.decode, "encode": lambda x: vae.encode(x)[0]}


def plain(second: bool) -> Any:
    """Ours (`second`: of Qwen-Image-2.1) with random weights that bfloat16 holds exactly, as the official ones are."""
    from lanting.nn.vae import AutoencoderKLQwenImage, VAEConfig
    from lanting.nn.vae21 import AutoencoderKLQwenImage21, VAE21Config

    torch.manual_seed(0)
    made = AutoencoderKLQwenImage21(VAE21Config()) if second else AutoencoderKLQwenImage(VAEConfig())
    return rounded(made.eval().requires_grad_(False))


def rounded(net: nn.Module) -> nn.Module:
    for each in net.parameters():
        each.copy_(each.bfloat16())
    return net


def theirs(variant: str, second: bool) -> dict[str, Op]:
    from diffusers import AutoencoderKLQwenImage, AutoencoderKLQwenImage21

    from lanting.nn.vae import to_video_weights
    from lanting.nn.vae21 import to_official_weights

    same = plain(second)
    vae = (AutoencoderKLQwenImage21 if second else AutoencoderKLQwenImage)().eval().requires_grad_(False)
    vae.load_state_dict((to_official_weights if second else to_video_weights)(same.state_dict(), same.config))
    vae = vae.to(dtype_of(variant))
    return {
        "decode": lambda z: vae.decode(z[:, :, None], return_dict=False)[0][:, :, 0],
        "encode": lambda x: vae.encode(x[:, :, None]).latent_dist.mode()[:, :, 0],
    }


def given(op: str, size: int, second: bool) -> Tensor:
    generator = torch.Generator().manual_seed(size)
    channels, stride, colours = (64, 16, 4) if second else (16, 8, 3)
    if op == "decode":
        return torch.randn(1, channels, size // stride, size // stride, generator=generator) * 2
    return torch.rand(1, colours, size, size, generator=generator) * 2 - 1


def memory(key: str) -> int:
    """A line of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def weigh(run: Callable[[], Tensor]) -> tuple[int, Tensor]:
    """How far the peak of memory was above what was held before."""
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak starts anew
    made = run()
    return memory("VmHWM") - before, made


@torch.no_grad()
def serve(variant: str, second: bool, threads: int, pipe: Connection) -> None:
    """A process of one variant: answers (op, size) with seconds, bytes and the result."""
    from lanting.kernels import library

    torch.set_num_threads(threads)
    library.use_threads(threads)
    ops = (theirs if "diffusers" in variant else ours)(variant, second)
    while (asked := pipe.recv()) is not None:
        op, size = asked
        x = given(op, size, second).to(dtype_of(variant))
        began = time.process_time()
        more, made = weigh(lambda op=op, x=x: ops[op](x))
        pipe.send((time.process_time() - began, more, made.float().numpy()))


class Worker:
    """One variant's process."""

    def __init__(self, variant: str, second: bool, threads: int):
        context = multiprocessing.get_context("spawn")
        self.pipe, far = context.Pipe()
        self.process = context.Process(target=serve, args=(variant, second, threads, far), daemon=True)
        self.process.start()

    def __call__(self, op: str, size: int) -> tuple[float, int, Tensor]:
        self.pipe.send((op, size))
        seconds, more, made = self.pipe.recv()
        return seconds, more, torch.from_numpy(made)


def measure(workers: dict[str, Worker], op: str, size: int, reps: int) -> dict[str, dict[str, float]]:
    seen: dict[str, list[tuple[float, int]]] = {name: [] for name in workers}
    results: dict[str, Tensor] = {}
    for _ in range(reps):
        for name, worker in workers.items():
            seconds, more, results[name] = worker(op, size)
            seen[name].append((seconds, more))
    rows = {}
    for name, each in seen.items():
        error = (results[name] - results[FIRST]).square().mean().sqrt().item() if FIRST in results else float("nan")
        seconds, peaks = (list(column) for column in zip(*each, strict=True))
        rows[name] = {"seconds": statistics.median(seconds), "peak": statistics.median(peaks), "error": error}
    return rows


def show(op: str, size: int, rows: dict[str, dict[str, float]]) -> None:
    print(f"{op} {size} x {size}")
    first = rows.get(FIRST)
    for name, row in rows.items():
        line = f"  {name:26s} {row['seconds']:8.3f} s {row['peak'] / 1e6:7.0f} MB  rms {row['error']:.1e}"
        if first:
            faster, less = first["seconds"] / row["seconds"], first["peak"] / max(1, row["peak"])
            line += f"  {faster:5.1f} x faster {less:5.1f} x less"
        print(line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--release", choices=("qwen-image", "qwen-image-2.1"), default="qwen-image")
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 512])
    parser.add_argument("--large", action="store_true")
    parser.add_argument("--ops", nargs="+", default=["decode", "encode"], choices=["decode", "encode"])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--reps", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS / f"vae-cpu-{date.today()}.json")
    asked = parser.parse_args()
    from lanting.kernels import library

    second = asked.release != "qwen-image"
    workers = {name: Worker(name, second, asked.threads) for name in asked.variants}
    held = {}
    for name, worker in workers.items():
        held[name] = {op: dict(zip(("seconds", "bytes"), worker(op, WARM)[:2], strict=True)) for op in asked.ops}
    report: dict[str, Any] = {"processor": processor(), "kernels": library.instruction_set(), "threads": asked.threads}
    report |= {"release": asked.release, "torch": torch.__version__, "warm up": held, "cases": []}
    for size in [*asked.sizes, *([1024] if asked.large else [])]:
        for op in asked.ops:
            rows = measure(workers, op, size, asked.reps)
            show(op, size, rows)
            report["cases"].append({"op": op, "size": size, "reps": asked.reps, "rows": rows})
            asked.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    for worker in workers.values():
        worker.pipe.send(None)


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


if __name__ == "__main__":
    main()
