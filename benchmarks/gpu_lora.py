"""The part `lora` of `benchmarks/gpu.py`: an update of a LoRA on the full geometry, weights in 16 bits and packed.

Random weights, one picture of 1024 x 1024, 128 tokens of text, rank 16 in the blocks' attention and feed-forward,
AdamW. Frozen weights have no gradients, so an update's products are those of three passes: forward, the same again, and
back. Peak memory is the allocator's, beside what `lanting train lora` would have said.
"""

from __future__ import annotations

import gc
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from gpu_bench import TEXT, Bench, network
from lanting.attach.quant import chooser
from lanting.nn.mmdit import QwenImageTransformer
from lanting.nn.swap import swap
from lanting.train.lora import memory
from lanting.train.lora.net import LoraNet
from lanting.train.lora.run import LoraRun
from lanting.weights.stored import pack

RUN = LoraRun(rank=16)
KINDS = ("none", "int8", "int4")
PASSES = 3


def packed(net: QwenImageTransformer, kind: str) -> QwenImageTransformer:
    """The same network, its Linears packed one by one where they are."""
    choose = chooser("transformer", kind)

    def make(path: str, old: nn.Module) -> nn.Module | None:
        assert isinstance(old, nn.Linear)
        form = choose(path, (old.out_features, old.in_features)) if choose else None
        return None if form is None else pack(form, old.weight.detach(), old.bias)

    swap(net, nn.Linear, make)
    return net


def lora(bench: Bench, found: dict[str, Any]) -> None:
    """Milliseconds an update, percent of the limit, gigabytes, by kind of weights."""
    for kind in KINDS:
        try:
            found["bf16" if kind == "none" else kind] = trained(bench, kind)
        except Exception as error:
            found[kind] = f"{type(error).__name__}: {str(error)[:300]}"
        gc.collect()  # blocks know their network, and Python counts no circles
        if bench.device.type == "cuda":
            torch.cuda.empty_cache()


def trained(bench: Bench, kind: str) -> dict[str, float]:
    """One kind."""
    net = packed(network(bench), kind)
    config, side = net.config, 4 if bench.asked.dry_run else 64
    tokens = side * side
    make = lambda *shape: torch.randn(*shape, device=bench.device, dtype=torch.bfloat16)  # noqa: E731
    latents, text = make(1, tokens, config.in_channels), make(1, TEXT, config.joint_attention_dim)
    wanted = make(1, tokens, config.patch_size**2 * config.out_channels).float()
    said = forecast(net, kind, tokens + TEXT, bench.device)
    made = LoraNet(SimpleNamespace(net=net, device=bench.device, streamer=None), RUN.rank, RUN.rank, RUN.targets, 0)
    optimizer = torch.optim.AdamW(made.parameters, lr=1e-4)
    times = torch.tensor([0.7], device=bench.device)

    def update() -> torch.Tensor:
        out = made(latents, times, text, None, [(1, side, side)], tokens)[:, :tokens]
        loss = (out.float() - wanted).square().mean()
        made.learn(loss)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    if bench.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    ms = bench.clock(update)
    peak = torch.cuda.max_memory_allocated() / 1e9 if bench.device.type == "cuda" else 0.0
    rate = bench.found.get("limits", {}).get("bf16", 1.0)
    every, width = tokens + TEXT, config.width
    ideal = PASSES * config.num_layers * (24 * width**2 * every + 4 * every**2 * width) / rate / 1e9
    return {"ms": round(ms, 1), "of limit": round(ideal / ms, 3), "gb": round(peak, 2), "said gb": round(said / 1e9, 2)}


def forecast(net: QwenImageTransformer, kind: str, tokens: int, device: torch.device) -> int:
    """Bytes that are said before a run; the process's own are not the allocator's."""
    before, memory.stored = memory.stored, lambda models, kind: SimpleNamespace(module=net)
    try:
        models: Any = SimpleNamespace(dtype=torch.bfloat16, device=device)
        own = memory.CUDA if device.type == "cuda" else 0
        return memory.need(models, kind, tokens, RUN).total - own
    finally:
        memory.stored = before
