"""What a GPU does with the full model: steps, edits, decoding, a whole picture; side by side with diffusers in one run.

    python benchmarks/gpu.py --out results.json [--seconds 500] [--parts 1024 512 decode edit ...]
    python benchmarks/gpu.py --out results.json --dry-run     # a tiny network on the CPU, every part, in half a minute

Full geometry (20.4 B parameters), random weights, which diffusers' transformer shares: the pictures are noise, times
and memory are real. A step is both sides of the guidance, 128 and 10 tokens of text. Medians after two rounds that
don't count. The percentage of the limit is the time that the step's products need at the rates measured here, over the
time they took. What does not fit into `--seconds` is left out and named; results are written after every part.
`benchmarks/gpu_memory.py` does the same for memory.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

import torch
from torch import Tensor

from lanting.attach.frozen import frozen_references
from lanting.attach.gpu import attach_gpu, detach_gpu
from lanting.attach.graphs import attach_graphs, detach_graphs
from lanting.attach.modulation import ModulationTable
from lanting.flow.guidance import guide
from lanting.kernels.gpu import attention, products
from lanting.nn.mmdit import QwenImageTransformer, TransformerConfig

TEXT, SILENT = 128, 10  # tokens of the prompt and of the negative prompt
TINY = TransformerConfig(num_layers=2, num_attention_heads=2, attention_head_dim=32, axes_dims_rope=(4, 14, 14))
FIRST = "1024"  # the size at which every way is compared
PARTS = ("nano", FIRST, "512", "decode", "edit", "1328", "picture", "2048", "compiled")
STEPS = 50


class Bench:
    """One run: device, deadline, and what was found."""

    def __init__(self, asked: argparse.Namespace):
        self.asked, self.began = asked, time.monotonic()
        self.device = torch.device("cpu" if asked.dry_run else "cuda")
        self.found: dict[str, Any] = {"torch": torch.__version__, "left out": []}
        self.table: Any = None  # of modulations, which all of ours use

    def left(self) -> float:
        return self.asked.seconds - (time.monotonic() - self.began)

    def part(self, name: str, work: Callable[[], Any], need: float) -> Any:
        """Do one part if `need` seconds are left; what fails is told and does not end the run."""
        if self.left() < need:
            self.found["left out"].append(name)
            return None
        began = time.monotonic()
        try:
            self.found[name] = work()
        except Exception as error:
            self.found[name] = {"failed": f"{type(error).__name__}: {str(error)[:600]}"}
        self.found["attention"] = attention.chosen()
        took = time.monotonic() - began
        print(f"[{time.monotonic() - self.began:5.0f} s] {name} ({took:.1f} s): {self.found[name]}", flush=True)
        self.asked.out.write_text(json.dumps(self.found, indent=1) + "\n", encoding="utf-8")
        return self.found[name]

    def clock(self, work: Callable[[], Any], rounds: int = 3, warm: int = 2) -> float:
        """Milliseconds, the median."""
        seen = []
        for round_ in range(warm + rounds):
            self.wait()
            began = time.perf_counter()
            work()
            self.wait()
            if round_ >= warm:
                seen.append(1000 * (time.perf_counter() - began))
        return statistics.median(seen)

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def peak(self, work: Callable[[], float]) -> tuple[float, float]:
        """(what `work` returns, GB allocated at most meanwhile beyond what was there)."""
        if self.device.type != "cuda":
            return work(), 0.0
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        return work(), (torch.cuda.max_memory_allocated() - before) / 1e9


def limits(bench: Bench) -> dict[str, Any]:
    """Rates of this GPU: products in TFLOP/s, memory in TB/s read plus written."""
    if bench.device.type != "cuda":
        return {"bf16": 1.0, "fp8": 1.0, "int8": 1.0}
    n = 8192
    a = torch.randn(n, n, device="cuda", dtype=torch.bfloat16)
    e4m3, i8 = a.to(torch.float8_e4m3fn), (a * 30).to(torch.int8)
    ones = torch.ones(n, 1, device="cuda")
    rate = lambda ms: round(2 * n**3 / ms / 1e9)  # noqa: E731
    found: dict[str, Any] = {"gpu": torch.cuda.get_device_name(), "bf16": rate(bench.clock(lambda: a @ a, 10))}
    scaled = lambda: torch._scaled_mm(e4m3, e4m3.T, ones, ones.T, out_dtype=torch.bfloat16)  # noqa: E731
    for name, work in (("fp8", scaled), ("int8", lambda: torch._int_mm(i8, i8.T))):
        try:
            found[name] = rate(bench.clock(work, 10))
        except RuntimeError as error:
            found[name] = str(error)[:200]
    found["by torch"] = {
        "fp8": products.floats_by_torch(torch.device("cuda", 0), torch.bfloat16),
        "gelu": products.gelu_by_torch(torch.device("cuda", 0), torch.bfloat16),
    }
    found["tb_per_s"] = round(2 * a.nbytes / bench.clock(lambda: a.clone(), 10) / 1e9, 2)
    return found


@torch.no_grad()
def network(bench: Bench, **changes: Any) -> QwenImageTransformer:
    """Random weights of a size that keeps activations in range, made where they are used."""
    config = TINY if bench.asked.dry_run else TransformerConfig()
    config = TransformerConfig(**{**vars(config), **changes})
    with torch.device("meta"):
        net = QwenImageTransformer(config)
    net = net.to(torch.bfloat16).to_empty(device=bench.device)
    torch.manual_seed(0)
    for name, p in net.named_parameters():
        if p.ndim > 1:
            p.normal_(0, 0.5 / p.shape[-1] ** 0.5)
        else:
            p.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
    return net.eval().requires_grad_(False)


class Step:
    """Both sides of the guidance for one size, as calls of any network."""

    def __init__(self, bench: Bench, net: QwenImageTransformer, size: int, reference: int = 0):
        side, other = (pixels // 16 if not bench.asked.dry_run else pixels // 128 for pixels in (size, reference))
        self.grids = [(1, side, side), *([(1, other, other)] if reference else [])]
        self.tokens, config = side * side, net.config
        whole = self.tokens + other * other
        make = lambda *shape: torch.randn(*shape, device=bench.device, dtype=torch.bfloat16)  # noqa: E731
        torch.manual_seed(1)
        self.latents = make(1, whole, config.in_channels)
        self.texts = [make(1, n, config.joint_attention_dim) for n in (TEXT, SILENT)]
        self.timestep = torch.tensor([0.7], device=bench.device)

    def ours(self, net: QwenImageTransformer) -> Tensor:
        sides = [
            net(self.latents, self.timestep, text, None, self.grids, self.tokens, branch=branch)[:, : self.tokens]
            for text, branch in zip(self.texts, ("positive", "negative"), strict=True)
        ]
        return guide(*sides, 4.0)

    def theirs(self, net: Any) -> Tensor:
        sides = [
            net(
                hidden_states=self.latents,
                encoder_hidden_states=text,
                timestep=self.timestep.to(torch.bfloat16),
                img_shapes=[self.grids],
                return_dict=False,
            )[0][:, : self.tokens]
            for text in self.texts
        ]
        return guide(*sides, 4.0)

    def ideal(self, config: TransformerConfig, rates: dict[str, Any], kind: str) -> float:
        """Milliseconds that the products alone need: Linears at the rate of `kind`, attention at bfloat16's."""
        width, total = config.width, 0.0
        for text in self.texts:
            every = text.shape[1] + self.latents.shape[1]
            total += config.num_layers * (24 * width**2 * every / rates[kind] + 4 * every**2 * width / rates["bf16"])
        return total / 1e9


def diffusers_network(bench: Bench, net: QwenImageTransformer) -> Any:
    """diffusers' transformer on the very same weights."""
    from diffusers import QwenImageTransformer2DModel

    with torch.device("meta"):
        theirs = QwenImageTransformer2DModel(**vars(net.config))
    theirs.load_state_dict(net.state_dict(), assign=True)
    theirs.pos_embed = type(theirs.pos_embed)(theta=10000, axes_dim=list(net.config.axes_dims_rope), scale_rope=True)
    return theirs.eval().requires_grad_(False)


@torch.no_grad()
def size(bench: Bench, net: QwenImageTransformer, theirs: Any, pixels: int) -> dict[str, Any]:
    """Milliseconds a step, percent of the limit and memory at one size, of every way."""
    step, rates = Step(bench, net, pixels), bench.found["limits"]
    rounds = 1 if bench.asked.dry_run else 3
    table: dict[str, Any] = {}

    def tell(name: str, work: Callable[[], Tensor], kind: str) -> None:
        try:
            ms, gb = bench.peak(lambda: bench.clock(work, rounds))
        except Exception as error:
            table[name] = f"{type(error).__name__}: {str(error)[:300]}"
            return
        share = step.ideal(net.config, rates, kind) / ms if isinstance(rates.get(kind), int | float) else 0.0
        table[name] = {"ms": round(ms, 1), "of limit": round(share, 3), "more gb": round(gb, 2)}

    exact = step.theirs(theirs) if theirs is not None else None
    if theirs is not None:
        tell("diffusers", lambda: step.theirs(theirs), "bf16")
    errors = bench.found.setdefault("errors", {})
    for name, compute, graphs in WAYS if str(pixels) == FIRST else WAYS[1:-1]:
        attach_gpu(net, compute)
        try:
            step.ours(net)  # copies in 8 bits are made here
        except Exception as error:
            table[name] = f"{type(error).__name__}: {str(error)[:300]}"
            detach_gpu(net)
            continue
        recorded = attach_graphs(net, bench.table) if graphs else None
        tell(name, lambda: step.ours(net), (compute or "bf16").split()[0])
        if exact is not None and str(pixels) == FIRST:
            off = (step.ours(net).float() - exact.float()).norm() / exact.float().norm()
            errors[f"{name}, of diffusers' velocity"] = round(float(off), 4)
        if recorded is not None and recorded.failed:
            table[f"{name}, not recorded because"] = recorded.failed
        detach_graphs(net)
        detach_gpu(net)
    return table


WAYS = (
    ("bf16, not recorded", None, False),
    ("bf16", None, True),
    ("fp8", "fp8", True),
    ("int8 rotated", "int8 rotated", True),
)


class EveryFew:
    """Refreshes references in the first step and then never: what a step beside kept ones costs."""

    def __init__(self) -> None:
        self.beside = False

    def frozen(self, branch: str) -> bool:
        return self.beside

    def refreshed(self, branch: str, error: float) -> None:
        pass


@torch.no_grad()
def edit(bench: Bench, net: QwenImageTransformer) -> dict[str, Any]:
    """An edit of one 1024 x 1024 picture with one reference as large: computed, and beside frozen references."""
    step, judge = Step(bench, net, 1024, 1024), EveryFew()
    found: dict[str, Any] = {}
    for name, compute in (("bf16", None), ("fp8", "fp8")):
        attach_gpu(net, compute)
        try:
            exact = bench.clock(lambda: step.ours(net))
            judge.beside = False
            with frozen_references(net, judge):
                refresh = bench.clock(lambda: step.ours(net), 2, 1)
                judge.beside = True
                beside = bench.clock(lambda: step.ours(net))
            every = {str(k): round(exact / ((refresh + (k - 1) * beside) / k), 2) for k in (2, 3, 5)}
            found[name] = {
                "exact ms": exact,
                "refresh ms": refresh,
                "beside ms": beside,
                "gain if every k steps": every,
            }
        finally:
            detach_gpu(net)
    return found


@torch.no_grad()
def decode(bench: Bench) -> dict[str, Any]:
    """The VAE's decoder at 1024 x 1024, theirs and ours."""
    from diffusers import AutoencoderKLQwenImage as Theirs

    from lanting.engine.compute import speed_up_vae
    from lanting.nn.vae import AutoencoderKLQwenImage, VAEConfig, to_image_weights

    torch.manual_seed(2)
    theirs = Theirs().eval().requires_grad_(False)
    ours = AutoencoderKLQwenImage(VAEConfig()).eval().requires_grad_(False)
    ours.load_state_dict(to_image_weights(theirs.state_dict()))
    theirs, ours = (x.to(bench.device, torch.bfloat16) for x in (theirs, ours))
    if bench.device.type == "cuda":
        speed_up_vae(ours, bench.device)
    side = 8 if bench.asked.dry_run else 128
    latents = torch.randn(1, 16, side, side, device=bench.device, dtype=torch.bfloat16)
    their_ms, their_gb = bench.peak(lambda: bench.clock(lambda: theirs.decode(latents[:, :, None]).sample))
    our_ms, our_gb = bench.peak(lambda: bench.clock(lambda: ours.decode(latents)))
    a, b = theirs.decode(latents[:, :, None]).sample[:, :, 0].float(), ours.decode(latents).float()
    off = float((a - b).norm() / a.norm())
    return {"diffusers": (their_ms, their_gb), "ours": (our_ms, our_gb), "gain": their_ms / our_ms, "difference": off}


def nano(bench: Bench) -> dict[str, Any]:
    """The embedded model end to end through the engine, and its picture beside the CPU's."""
    import numpy as np

    from lanting import Engine, Request

    request = Request(prompt='A blue sign that says "HELLO"', seed=7)
    pictures, found = {}, {}
    for device in {"cpu", bench.device.type}:
        with Engine.open("nano", device=device, dtype="float32" if device == "cpu" else None) as engine:
            seconds = []
            for _ in range(3):
                began = time.perf_counter()
                result = engine.run(request)
                seconds.append(time.perf_counter() - began)
            pictures[device] = np.asarray(result.images[0], np.float32)
            found[device] = {"seconds": seconds}
            if device == "cuda":
                result.images[0].save(bench.asked.out.with_name("nano-gpu.png"))
    if len(pictures) == 2:
        off = np.abs(pictures["cpu"] - pictures["cuda"])
        found["grey levels apart"] = {"mean": float(off.mean()), "most": float(off.max())}
    return found


@torch.no_grad()
def picture(bench: Bench, net: QwenImageTransformer) -> dict[str, Any]:
    """All steps of a 1024 x 1024 picture, one after the other, in seconds."""
    step, found = Step(bench, net, 1024), {}
    steps = 2 if bench.asked.dry_run else STEPS
    times = torch.linspace(1, 0.02, steps, device=bench.device)
    for name, compute in (("fp8", "fp8"), ("bf16", None)):
        attach_gpu(net, compute)
        bench.table.prepare(times.to(torch.bfloat16))
        attach_graphs(net, bench.table)
        for _ in range(2):
            step.ours(net)
        bench.wait()
        began = time.perf_counter()
        for each in times:
            step.timestep = each[None]
            step.latents = step.latents - 0.02 * step.ours(net)
        bench.wait()
        found[name] = round(time.perf_counter() - began, 2)
        detach_graphs(net)
        detach_gpu(net)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=500.0)
    parser.add_argument("--parts", nargs="*", default=list(PARTS), choices=PARTS)
    parser.add_argument("--dry-run", action="store_true")
    asked = parser.parse_args()
    if not asked.dry_run and not torch.cuda.is_available():
        raise SystemExit("torch sees no CUDA device here; --dry-run rehearses without one")
    run(Bench(asked))


def run(bench: Bench) -> None:
    """The parts that were asked for, in the order that was asked for."""
    parts = list(bench.asked.parts)
    if "nano" in parts:  # needs no full-size weights
        bench.part("nano", lambda: nano(bench), 15)
        parts.remove("nano")
    if not parts:
        return
    bench.part("limits", lambda: limits(bench), 5)
    net = network(bench)
    theirs: Any = None
    try:
        theirs = diffusers_network(bench, net)
    except ImportError as error:
        bench.found["diffusers"] = str(error)
    bench.table = ModulationTable(net)
    bench.table.prepare(torch.tensor([0.7], dtype=torch.bfloat16, device=bench.device))
    for name in parts:
        works: dict[str, tuple[Callable[[], Any], float]] = {
            "decode": (lambda: decode(bench), 8),
            "picture": (lambda: picture(bench, net), 20),
            "edit": (lambda: edited(bench, net), 12),
            "compiled": (lambda: compiled(bench, net, theirs), 75),
        }
        work, need = works.get(name) or (
            lambda name=name: size(bench, net, theirs, int(name)),
            8 + (int(name) / 400) ** 2,
        )
        bench.part(name, work, need)
    print(json.dumps({"left out": bench.found["left out"], "attention": bench.found["attention"]}))


@torch.no_grad()
def compiled(bench: Bench, net: QwenImageTransformer, theirs: Any) -> dict[str, Any]:
    """diffusers' blocks behind torch.compile, once for all of them: milliseconds a step. Compiling takes a minute."""
    if bench.device.type == "cuda":
        theirs.compile_repeated_blocks(fullgraph=True, dynamic=False)
    found: dict[str, Any] = {}
    for pixels in (1024, 512):
        if bench.left() > 60:
            step = Step(bench, net, pixels)
            found[str(pixels)] = round(bench.clock(lambda step=step: step.theirs(theirs)), 1)
    return found


def edited(bench: Bench, net: QwenImageTransformer) -> dict[str, Any]:
    """The same weights as a release that modulates references at time zero."""
    with torch.device("meta"):
        twin = QwenImageTransformer(TransformerConfig(**{**vars(net.config), "zero_cond_t": True}))
    twin.load_state_dict(net.state_dict(), assign=True)
    table = ModulationTable(twin.eval().requires_grad_(False))
    table.prepare(torch.tensor([0.7], dtype=torch.bfloat16, device=bench.device))
    return edit(bench, twin)


if __name__ == "__main__":
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    main()
