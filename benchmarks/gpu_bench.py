"""What `benchmarks/gpu.py` measures with: a clock, parts with deadlines, the full network, and a step of it."""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lanting.flow.guidance import guide
from lanting.kernels.gpu import attention, products
from lanting.nn.mmdit import QwenImageTransformer, TransformerConfig

TEXT, SILENT = 128, 10  # tokens of the prompt and of the negative prompt
TINY = TransformerConfig(num_layers=2, num_attention_heads=2, attention_head_dim=32, axes_dims_rope=(4, 14, 14))


class Over(BaseException):
    """A part has had its time. No Exception, so that whoever catches those goes on being interrupted."""


class Bench:
    """One run: device, deadline, and what was found."""

    def __init__(self, asked: argparse.Namespace):
        self.asked, self.began = asked, time.monotonic()
        self.device = torch.device("cpu" if asked.dry_run else "cuda")
        self.found: dict[str, Any] = {"torch": torch.__version__, "left out": []}
        self.table: Any = None  # of modulations, which all of ours use

    def left(self) -> float:
        return self.asked.seconds - (time.monotonic() - self.began)

    def part(self, name: str, work: Callable[[dict[str, Any]], object], need: float, most: float) -> None:
        """One part, if `need` seconds are left, for `most` seconds at most. It fills a table as it goes: what fails or
        takes too long leaves what was found, and does not end the run."""
        if self.left() < need:
            self.found["left out"].append(name)
            return
        began, found = time.monotonic(), self.found.setdefault(name, {})
        try:
            with deadline(min(most, self.left())):
                work(found)
        except Over:
            found["cut"] = f"after {time.monotonic() - began:.0f} s"
        except Exception as error:
            found["failed"] = f"{type(error).__name__}: {str(error)[:600]}"
        self.found["attention"] = attention.chosen()
        self.found["products that torch refused"] = sorted({str(key) for key in products.refused()})
        found["seconds of this part"] = round(time.monotonic() - began, 1)
        print(f"[{time.monotonic() - self.began:5.0f} s] {name}: {json.dumps(found)}", flush=True)
        self.write()

    def write(self) -> None:
        self.asked.out.write_text(json.dumps(self.found, indent=1) + "\n", encoding="utf-8")

    def clock(self, work: Callable[[], Any], rounds: int = 3, warm: int = 2) -> float:
        """Milliseconds, the median; a rehearsal has one round."""
        rounds, warm = (1, 0) if self.asked.dry_run else (rounds, warm)
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


@contextmanager
def deadline(seconds: float) -> Iterator[None]:
    """Interrupts what takes longer, between two of Python's own steps."""

    def over(*_: object) -> None:
        raise Over

    before = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.1))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def limits(bench: Bench, found: dict[str, Any]) -> None:
    """Rates of this GPU: products in TFLOP/s, memory in TB/s read plus written."""
    if bench.device.type != "cuda":
        found |= {"bf16": 1.0, "fp8": 1.0, "int8": 1.0}
        return
    n = 8192
    a = torch.randn(n, n, device="cuda", dtype=torch.bfloat16)
    e4m3, i8 = a.to(torch.float8_e4m3fn), (a * 30).to(torch.int8)
    ones = torch.ones(n, 1, device="cuda")
    rate = lambda ms: round(2 * n**3 / ms / 1e9)  # noqa: E731
    found |= {"gpu": torch.cuda.get_device_name(), "bf16": rate(bench.clock(lambda: a @ a, 10))}
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
