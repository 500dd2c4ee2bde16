"""What a GPU does with the full model: steps, edits, decoding, whole pictures, budgets of memory; beside diffusers.

    python benchmarks/gpu.py --out results.json [--plot steps.png] [--seconds 520] [--parts 1024 512 decode edit ...]
    python benchmarks/gpu.py --out results.json --dry-run     # a tiny network on the CPU, all but `memory`, in a minute
    python benchmarks/gpu.py --from results.json --plot steps.png

Full geometry (20.4 B parameters), random weights, which diffusers' transformer shares: the pictures are noise, times
and memory are real. A step is both sides of the guidance, 128 and 10 tokens of text. Medians after two rounds that
don't count. The percentage of the limit is the time that the step's products need at the rates measured here, over the
time they took. Parts come in the order of what they tell, each with a time of its own; results are written after every
part, and what a part found before it was cut or failed is in them. What does not fit into `--seconds` is left out and
named. The part `memory` is `benchmarks/gpu_memory.py`, which writes 18 GB to a temporary folder first; `single` is
Qwen-Image-2.1 (`benchmarks/gpu_single.py`), with weights of its own, and `lora` an update of a LoRA
(`benchmarks/gpu_lora.py`); `controls` and `forms` are in `benchmarks/gpu_more.py`.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from torch import Tensor

from gpu_bench import Bench, Step, diffusers_network, limits, network
from gpu_lora import lora
from gpu_more import controls, forms
from gpu_plot import plot
from gpu_single import single
from lanting.attach.caches import residual_cache
from lanting.attach.frozen import frozen_references
from lanting.attach.gpu import attach_gpu, detach_gpu
from lanting.attach.graphs import Graphs, attach_graphs, detach_graphs
from lanting.attach.modulation import ModulationTable
from lanting.core.quality import LEVELS
from lanting.flow.frugal import Frugal
from lanting.flow.loop import Canvas, Conditioning, denoise, velocity
from lanting.flow.schedule import model_timestep
from lanting.nn.mmdit import QwenImageTransformer, TransformerConfig

FIRST = "1024"  # the size at which every way is compared
# name -> seconds without which it is not begun, and after which it is cut
PARTS = {
    FIRST: (20, 110),
    "edit": (15, 60),
    "picture": (20, 70),
    "decode": (8, 25),
    "512": (8, 40),
    "1328": (15, 50),
    "2048": (25, 90),
    "nano": (10, 40),
    "compiled": (60, 150),
    "controls": (10, 40),
    "forms": (5, 25),
    "memory": (60, 200),
    "single": (10, 45),
    "lora": (15, 45),
}
STEPS = 50
# what `--quality balanced` left out of 50 steps of nano; the network here is random, and would choose otherwise
BALANCED = "FF FF FF FF FF P FF Q Q Q FF Q FF P FF Q P " + 6 * "FF Q Q Q " + "FF Q Q F- FF Q Q F- FF"
WAYS = (
    ("bf16", None, True),
    ("fp8", "fp8", True),
    ("int8 rotated", "int8 rotated", True),
    ("bf16, not recorded", None, False),
)


@contextmanager
def attached(
    net: QwenImageTransformer, compute: str | None, table: Any, graphs: bool = True
) -> Iterator[Graphs | None]:
    """A network with our kernels, recorded; off again whatever happens."""
    attach_gpu(net, compute)
    try:
        yield attach_graphs(net, table) if graphs else None
    finally:
        detach_graphs(net)
        detach_gpu(net)


@torch.no_grad()
def size(bench: Bench, net: QwenImageTransformer, theirs: Any, pixels: int, table: dict[str, Any]) -> None:
    """Milliseconds a step, percent of the limit and memory at one size, of every way."""
    step, rates, first = Step(bench, net, pixels), bench.found["limits"], str(pixels) == FIRST

    def tell(name: str, work: Callable[[], Tensor], kind: str) -> None:
        ms, gb = bench.peak(lambda: bench.clock(work))
        share = step.ideal(net.config, rates, kind) / ms if isinstance(rates.get(kind), int | float) else 0.0
        table[name] = {"ms": round(ms, 1), "of limit": round(share, 3), "more gb": round(gb, 2)}

    exact = None
    if theirs is not None:
        try:  # another version than the one this is written for must not cost what is ours
            tell("diffusers", lambda: step.theirs(theirs), "bf16")
            exact = step.theirs(theirs).float() if first else None
        except Exception as error:
            table["diffusers"] = f"{type(error).__name__}: {str(error)[:300]}"
    for name, compute, graphs in WAYS if first else WAYS[:-1]:
        try:
            with attached(net, compute, bench.table, graphs) as recorded:
                step.ours(net)  # copies in 8 bits are made here
                tell(name, lambda: step.ours(net), (compute or "bf16").split()[0])
                if exact is not None:
                    off = (step.ours(net).float() - exact).norm() / exact.norm()
                    table[name]["off diffusers'"] = round(float(off), 4)
                if recorded is not None and recorded.failed:
                    table[name]["not recorded because"] = recorded.failed
        except Exception as error:
            table[name] = f"{type(error).__name__}: {str(error)[:300]}"


class EveryFew:
    """Refreshes references in the first step and then never: what a step beside kept ones costs."""

    def __init__(self) -> None:
        self.beside = False

    def frozen(self, branch: str) -> bool:
        return self.beside

    def refreshed(self, branch: str, error: float) -> None:
        pass


@torch.no_grad()
def edit(bench: Bench, net: QwenImageTransformer, found: dict[str, Any]) -> None:
    """An edit of one 1024 x 1024 picture with one reference as large, in a release that modulates references at time
    zero: computed, and beside frozen references. Milliseconds a step."""
    with torch.device("meta"):
        twin = QwenImageTransformer(TransformerConfig(**{**vars(net.config), "zero_cond_t": True}))
    twin.load_state_dict(net.state_dict(), assign=True)
    table = ModulationTable(twin.eval().requires_grad_(False))
    table.prepare(torch.tensor([0.7], dtype=torch.bfloat16, device=bench.device))
    step = Step(bench, twin, 1024, 1024)
    for name, compute in (("fp8", "fp8"), ("bf16", None)):
        judge = EveryFew()
        with attached(twin, compute, table):
            row = found[name] = {"exact": round(bench.clock(lambda: step.ours(twin)), 1)}
            with frozen_references(twin, judge) as frozen:
                row["refresh"] = round(bench.clock(lambda: step.ours(twin), 2, 3), 1)
                judge.beside = True
                row["beside"] = round(bench.clock(lambda: step.ours(twin)), 1)
                row["recorded"] = len(frozen.pieces.tapes.kept) if frozen.pieces.tapes else 0
            for k in (2, 3, 5):
                row[f"gain if every {k} steps"] = round(
                    row["exact"] / ((row["refresh"] + (k - 1) * row["beside"]) / k), 2
                )


@torch.no_grad()
def decode(bench: Bench, found: dict[str, Any]) -> None:
    """The VAE's decoder at 1024 x 1024, theirs and ours, and ours in tiles; (milliseconds, GB beyond the weights)."""
    from diffusers import AutoencoderKLQwenImage as Theirs

    from lanting.engine.compute import speed_up_vae
    from lanting.nn.vae import AutoencoderKLQwenImage, VAEConfig, to_image_weights

    torch.manual_seed(2)
    theirs = Theirs().eval().requires_grad_(False)
    ours = AutoencoderKLQwenImage(VAEConfig()).eval().requires_grad_(False)
    ours.load_state_dict(to_image_weights(theirs.state_dict()))
    dtype = torch.bfloat16 if bench.device.type == "cuda" else torch.float32  # few CPUs multiply bfloat16
    theirs, ours = (x.to(bench.device, dtype) for x in (theirs, ours))
    side = 8 if bench.asked.dry_run else 128
    latents = torch.randn(1, 16, side, side, device=bench.device, dtype=dtype)
    found["diffusers"] = bench.peak(lambda: bench.clock(lambda: theirs.decode(latents[:, :, None]).sample))
    found["not recorded"] = bench.peak(lambda: bench.clock(lambda: ours.decode(latents)))
    if bench.device.type == "cuda":
        speed_up_vae(ours, bench.device)
    found["ours"] = bench.peak(lambda: bench.clock(lambda: ours.decode(latents)))
    found["ours, in tiles"] = bench.peak(lambda: bench.clock(lambda: ours.decode(latents, tile=True)))
    a, b = theirs.decode(latents[:, :, None]).sample[:, :, 0].float(), ours.decode(latents).float()
    found |= {"gain": found["diffusers"][0] / found["ours"][0], "difference": float((a - b).norm() / a.norm())}


def nano(bench: Bench, found: dict[str, Any]) -> None:
    """The embedded model end to end through the engine, and its picture beside the CPU's."""
    import numpy as np

    from lanting import Engine, Request

    request = Request(prompt='A blue sign that says "HELLO"', seed=7)
    pictures = {}
    for device in {"cpu", bench.device.type}:
        with Engine.open("nano", device=device, dtype="float32" if device == "cpu" else None) as engine:
            seconds = found[device] = []
            for _ in range(1 if bench.asked.dry_run else 3):
                began = time.perf_counter()
                result = engine.run(request)
                seconds.append(round(time.perf_counter() - began, 4))
            pictures[device] = np.asarray(result.images[0], np.float32)
    if len(pictures) == 2:
        off = np.abs(pictures["cpu"] - pictures["cuda"])
        found["grey levels apart"] = {"mean": float(off.mean()), "most": float(off.max())}


@torch.no_grad()
def picture(bench: Bench, net: QwenImageTransformer, found: dict[str, Any]) -> None:
    """All steps of a 1024 x 1024 picture, one after the other, in seconds: exact, and with the choices of the dial."""
    step, steps = Step(bench, net, 1024), 8 if bench.asked.dry_run else STEPS
    sides = [Conditioning(text) for text in step.texts]
    canvas = Canvas(step.latents, tuple(step.grids), torch.linspace(1, 0, steps + 1), sides[0], sides[1])
    words = BALANCED.split()[:steps]
    for name, compute, told in (("fp8", "fp8", False), ("fp8, balanced", "fp8", True), ("bf16", None, False)):
        with attached(net, compute, bench.table) as recorded:
            bench.table.prepare(model_timestep(canvas.sigmas[:-1], torch.bfloat16).to(bench.device))
            for _ in range(2):  # records, and finds out what a shape is best computed by
                step.ours(net)
            bench.wait()
            began = time.perf_counter()
            if told:
                frugal = Frugal(LEVELS["balanced"], canvas, words)
                with residual_cache(net, frugal):
                    all(True for _ in denoise(net, canvas, frugal))
            else:
                all(True for _ in denoise(net, canvas, velocity))
            bench.wait()
            found[name] = round(time.perf_counter() - began, 2)
            if recorded is not None and recorded.failed:
                found[f"{name}, not recorded because"] = recorded.failed


@torch.no_grad()
def compiled(bench: Bench, net: QwenImageTransformer, theirs: Any, found: dict[str, Any]) -> None:
    """diffusers' blocks behind torch.compile, once for all of them: milliseconds a step. Compiling takes a minute."""
    if bench.device.type == "cuda":
        theirs.compile_repeated_blocks(fullgraph=True, dynamic=False)
    for pixels in (1024, 512, 1328, 2048):
        step = Step(bench, net, pixels)
        found[str(pixels)] = round(bench.clock(lambda step=step: step.theirs(theirs)), 1)


def memory(bench: Bench, found: dict[str, Any], seconds: float) -> None:
    """Budgets of 24, 16, 12 and 8 GB, and loading, in processes of their own."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "memory.json"
        command = [sys.executable, str(Path(__file__).with_name("gpu_memory.py")), "--dir", folder, "--out", str(out)]
        command += ["--dry-run", "--budgets", "8"] if bench.asked.dry_run else ["--seconds", "60"]
        try:
            if failed := last_words(command, seconds):
                found["failed"] = failed
        except subprocess.TimeoutExpired:
            found["cut"] = f"after {seconds:.0f} s"
        if out.exists():
            found |= json.loads(out.read_text(encoding="utf-8"))


def last_words(command: list[str], seconds: float) -> list[str]:
    """The last lines on stderr of a program that failed, [] of one that did not. Whatever ends the waiting ends it with
    all that it began: a picture that is drawn on would be in the times of the parts behind."""
    piped: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, start_new_session=True, **piped) as process:
        try:
            told = process.communicate(timeout=seconds)[1]
        except BaseException:  # `Over` is no Exception
            os.killpg(process.pid, signal.SIGKILL)
            raise
    return told.strip().splitlines()[-3:] or [f"exit code {process.returncode}"] if process.returncode else []


def run(bench: Bench) -> None:
    """The parts that were asked for."""
    parts = [name for name in PARTS if name in bench.asked.parts]
    nets: dict[str, Any] = {}
    alone, own = {"nano", "memory", "decode"}, {"single", "lora", "forms"}
    if set(parts) - alone:
        bench.part("limits", lambda found: limits(bench, found), 5, 30)
    if set(parts) - alone - own:
        nets["ours"] = network(bench)
        try:
            nets["theirs"] = diffusers_network(bench, nets["ours"])
        except Exception as error:  # diffusers says RuntimeError where a package of its own can't be imported
            bench.found["diffusers"] = f"{type(error).__name__}: {str(error)[:300]}"
        bench.table = ModulationTable(nets["ours"])
        bench.table.prepare(torch.tensor([0.7], dtype=torch.bfloat16, device=bench.device))
    for name in parts:
        need, most = PARTS[name]
        most *= 3 if bench.asked.dry_run else 1  # a busy CPU
        if name in ("memory", "lora"):  # the others' memory is wanted
            nets.clear()
            bench.table = None
            gc.collect()  # blocks know their network, and Python counts no circles
            torch.cuda.empty_cache() if bench.device.type == "cuda" else None
        bench.part(name, work_of(bench, nets, name), need, most)
    print(json.dumps({"left out": bench.found["left out"], "attention": bench.found.get("attention")}))


def work_of(bench: Bench, nets: dict[str, Any], name: str) -> Callable[[dict[str, Any]], object]:
    """What a part does with its table."""
    ours, theirs = nets.get("ours"), nets.get("theirs")
    works: dict[str, Callable[[dict[str, Any]], object]] = {
        "nano": lambda found: nano(bench, found),
        "single": lambda found: single(bench, found),
        "lora": lambda found: lora(bench, found),
        "controls": lambda found: controls(bench, ours, found),
        "forms": lambda found: forms(bench, found),
        "edit": lambda found: edit(bench, ours, found),
        "decode": lambda found: decode(bench, found),
        "picture": lambda found: picture(bench, ours, found),
        "compiled": lambda found: compiled(bench, ours, theirs, found),
        "memory": lambda found: memory(bench, found, min(PARTS["memory"][1], bench.left()) - 5),
    }
    return works.get(name) or (lambda found: size(bench, ours, theirs, int(name), found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--from", dest="from_", type=Path, help="take the numbers from this file")
    parser.add_argument("--seconds", type=float, default=520.0)
    parser.add_argument("--parts", nargs="*", choices=list(PARTS))
    parser.add_argument("--dry-run", action="store_true")
    asked = parser.parse_args()
    if asked.from_ is not None:
        plot(json.loads(asked.from_.read_text(encoding="utf-8")), asked.plot)
        return
    if asked.out is None:
        raise SystemExit("say where results go: --out FILE.json")
    if not asked.dry_run and not torch.cuda.is_available():
        raise SystemExit("torch sees no CUDA device here; --dry-run rehearses without one")
    if asked.parts is None:
        asked.parts = [name for name in PARTS if name != "memory" or not asked.dry_run]
    bench = Bench(asked)
    run(bench)
    if asked.plot:
        plot(bench.found, asked.plot)


if __name__ == "__main__":
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    main()
