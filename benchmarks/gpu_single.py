"""The part `single` of `benchmarks/gpu.py`: a steady step of Qwen-Image-2.1 at full geometry, beside diffusers' eager
one, with what stands in front of the target kept in both.

7.1 B random weights, which both share. One side only: 2.1 is drawn without guidance unless asked. 1024 x 1024 pixels,
128 tokens of text; then the same with one reference picture as large behind the twentieth word.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gpu_bench import TEXT, Bench
from lanting.attach.gpu import attach_gpu, detach_gpu
from lanting.nn.single_stream import QwenImage21Transformer, SingleStreamConfig, keep_prefix

TINY = SingleStreamConfig(2, 2, 32, 32, 8, 8, 1, 3, (8, 12, 12))
PLACE = 20  # words in front of the reference
WAYS = (("bf16", None), ("fp8", "fp8"), ("int8 rotated", "int8 rotated"))


def dtype_of(bench: Bench) -> torch.dtype:
    return torch.bfloat16 if bench.device.type == "cuda" else torch.float32  # few CPUs multiply bfloat16


@torch.no_grad()
def network(bench: Bench) -> QwenImage21Transformer:
    """Random weights of a size that keeps activations in range, made where they are used."""
    with torch.device("meta"):
        net = QwenImage21Transformer(TINY if bench.asked.dry_run else SingleStreamConfig())
    net = net.to(dtype_of(bench)).to_empty(device=bench.device)
    torch.manual_seed(0)
    for name, weight in net.named_parameters():
        if weight.ndim > 1:
            weight.normal_(0, 0.5 / weight.shape[-1] ** 0.5)
        else:
            weight.fill_(0.0 if "text_norm" in name else 1.0)  # that one is stored less 1
    return net.eval().requires_grad_(False)


def diffusers_network(bench: Bench, net: QwenImage21Transformer) -> Any:
    """diffusers' transformer on the very same weights; what it computes when it is made is made where it is used."""
    from diffusers import QwenImage21Transformer2DModel

    with torch.device("meta"):
        theirs = QwenImage21Transformer2DModel(**vars(net.config))
    theirs.load_state_dict(net.state_dict(), assign=True)
    theirs.pos_embed = type(theirs.pos_embed)(theta=10000, axes_dim=list(net.config.axes_dims_rope))
    embed = theirs.time_text_embed
    embed.time_proj = type(embed.time_proj)(timestep_dim=256).to(bench.device)
    return theirs.eval().requires_grad_(False)


class Step:
    """One steady step, as calls of either network."""

    def __init__(self, bench: Bench, net: QwenImage21Transformer, reference: bool):
        side, config = 4 if bench.asked.dry_run else 64, net.config  # tokens: 16 pixels each
        self.grids = [(1, side, side)] * (2 if reference else 1)
        self.tokens, self.places = side * side, (PLACE,) if reference else ()
        torch.manual_seed(1)
        make = lambda *shape: torch.randn(*shape, device=bench.device, dtype=dtype_of(bench))  # noqa: E731
        self.latents = make(1, self.tokens * len(self.grids), config.in_channels)
        self.text, self.timestep = make(1, TEXT, config.context_in_dim), torch.tensor([0.7], device=bench.device)

    def ours(self, net: QwenImage21Transformer) -> Tensor:
        """Inside `keep_prefix` all but the first are steady."""
        return net(self.latents, self.timestep, self.text, None, self.grids, self.tokens, places=self.places)

    def theirs(self, net: Any) -> Callable[[], Tensor]:
        """A steady step. The reference wants a slot for every four tokens of a picture, the target last."""
        from diffusers.models.transformers.transformer_qwenimage21 import QwenImage21KVCache

        slots, at = self.tokens // 4, self.places[0] if self.places else TEXT
        gap = slots if self.places else 0
        text = torch.cat([self.text[:, :at], self.text.new_zeros(1, gap, self.text.shape[2]), self.text[:, at:]], 1)
        mask = torch.zeros(1, TEXT + gap + slots, dtype=torch.bool, device=text.device)
        mask[:, at : at + gap], mask[:, TEXT + gap :] = True, True
        latents = torch.cat([self.latents[:, self.tokens :], self.latents[:, : self.tokens]], 1)
        cache = QwenImage21KVCache(len(net.transformer_blocks))

        def call(mode: str) -> Tensor:
            found = net(
                hidden_states=latents,
                encoder_hidden_states=text,
                timestep=self.timestep.to(latents.dtype),
                img_shapes=[self.grids],
                img_mask=mask,
                kv_cache=cache,
                kv_cache_mode=mode,
                return_dict=False,
            )
            return found[0][:, -self.tokens :]

        call("extract")
        return lambda: call("cached")

    def ideal(self, config: SingleStreamConfig, rates: dict[str, Any], kind: str) -> float:
        """Milliseconds that the products alone need: Linears at the rate of `kind`, attention at bfloat16's."""
        every = TEXT + self.latents.shape[1]
        linears = 2 * (4 + 3 * config.mlp_ratio) * config.width**2 * self.tokens / rates[kind]
        return config.num_layers * (linears + 4 * self.tokens * every * config.width / rates["bf16"]) / 1e9


@torch.no_grad()
def single(bench: Bench, found: dict[str, Any]) -> None:
    """Milliseconds a step, percent of the limit, memory beyond weights, and how far from diffusers' velocity."""
    net = network(bench)
    try:
        theirs = diffusers_network(bench, net)
    except Exception as error:  # diffusers says RuntimeError where a package of its own can't be imported
        theirs, found["diffusers"] = None, f"{type(error).__name__}: {str(error)[:300]}"
    for name, reference in (("1024", False), ("1024, a reference", True)):
        compared(bench, Step(bench, net, reference), net, theirs, found.setdefault(name, {}))


def compared(bench: Bench, step: Step, net: QwenImage21Transformer, theirs: Any, table: dict[str, Any]) -> None:
    rates, exact = bench.found.get("limits", {}), None

    def tell(name: str, work: Callable[[], Tensor], kind: str) -> None:
        ms, gb = bench.peak(lambda: bench.clock(work, 5))
        share = step.ideal(net.config, rates, kind) / ms if isinstance(rates.get(kind), int | float) else 0.0
        table[name] = {"ms": round(ms, 2), "of limit": round(share, 3), "more gb": round(gb, 2)}
        if exact is not None:
            table[name]["off diffusers'"] = float(f"{(work().float() - exact).norm() / exact.norm():.3g}")

    if theirs is not None:
        work = step.theirs(theirs)
        tell("diffusers", work, "bf16")
        exact = work().float()
    for name, compute in WAYS:
        attach_gpu(net, compute)
        try:
            with keep_prefix(net):
                step.ours(net)  # reads the prefix, and makes copies in 8 bits
                tell(name, lambda: step.ours(net), (compute or "bf16").split()[0])
        except Exception as error:
            table[name] = f"{type(error).__name__}: {str(error)[:300]}"
        finally:
            detach_gpu(net)
