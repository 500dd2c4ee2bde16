"""Two full-width blocks of Qwen-Image-2.1's transformer on a CPU, ours against diffusers', side by side in one process.

    python benchmarks/single_cpu.py [--tokens 256 1024] [--reference 256] [--reps 3] [--threads 1] [--out FILE]

Width 4096, 32 heads, 128 text tokens, random weights, a reference picture of `--reference` tokens (0: none). A step is
one of the later ones, as nearly all are: keys and values of words and reference are kept, in diffusers by its own
cache. Medians of processor time, variants in turn; errors are of the velocity, against diffusers in float32.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from block_cpu import medians, packed
from lanting.attach.compute import attach_kernels
from lanting.kernels import library
from lanting.nn.single_stream import QwenImage21Transformer, SingleStreamConfig, keep_prefix
from lanting.nn.swap import swap

LAYERS, TEXT = 2, 128
KINDS = ["bf16", "int8", "int4 64", "Q4_K"]


def oracle(dtype: torch.dtype) -> Any:
    """diffusers', its weights numbers that bfloat16 holds; `net.bfloat16()` would round their rotary tables, too."""
    from diffusers import QwenImage21Transformer2DModel

    torch.manual_seed(0)
    net = QwenImage21Transformer2DModel(num_layers=LAYERS, in_channels=64, out_channels=64).eval().requires_grad_(False)
    for name, weight in net.named_parameters():
        if weight.ndim > 1:
            weight.normal_(0, 0.3 * weight.shape[1] ** -0.5 if "modulation" in name else weight.shape[1] ** -0.5)
        weight.data = weight.data.bfloat16().to(dtype)
    return net


def ours(state: dict[str, Tensor], kind: str) -> QwenImage21Transformer:
    """With these weights; the blocks' Linears packed as `kind`, all by our kernels where the processor has them."""
    net = QwenImage21Transformer(SingleStreamConfig(num_layers=LAYERS))
    net.load_state_dict(state)
    net = net.eval().requires_grad_(False).bfloat16()
    make = packed(kind)
    if make is not None:
        swap(net.transformer_blocks, nn.Linear, make)
    attach_kernels(net)
    return net


def given(tokens: int, reference: int) -> dict[str, Any]:
    torch.manual_seed(1)
    sides = [int(count**0.5) for count in (tokens, reference)]
    grids = [(1, side, side) for side in sides if side]
    latents = torch.randn(1, sum(side * side for side in sides), 64)
    words = torch.randn(1, TEXT, 4096)
    return {"latents": latents, "words": words, "grids": grids, "places": (8,) if sides[1] else (), "tokens": tokens}


def their_step(net: Any, asked: dict[str, Any], dtype: torch.dtype) -> Callable[[], Tensor]:
    """A later step of diffusers: the prefix is in its cache."""
    from diffusers.models.transformers.transformer_qwenimage21 import QwenImage21KVCache

    tokens, cache = asked["tokens"], QwenImage21KVCache(LAYERS)
    latents = torch.cat([asked["latents"][:, tokens:], asked["latents"][:, :tokens]], 1).to(dtype)
    slots = (latents.shape[1] - tokens) // 4
    place = asked["places"][0] if slots else TEXT
    words = torch.cat([asked["words"][:, :place], torch.zeros(1, slots, 4096), asked["words"][:, place:]], 1).to(dtype)
    mask = torch.zeros(1, words.shape[1] + tokens // 4, dtype=torch.bool)
    mask[:, place : place + slots] = mask[:, words.shape[1] :] = True

    def step(mode: str = "cached") -> Tensor:
        found = net(
            hidden_states=latents,
            timestep=torch.tensor([0.5], dtype=dtype),
            encoder_hidden_states=words,
            encoder_hidden_states_mask=None,
            img_shapes=[[*asked["grids"][1:], asked["grids"][0]]],
            img_mask=mask,
            kv_cache=cache,
            kv_cache_mode=mode,
            return_dict=False,
        )[0]
        return found[:, -tokens:]

    step("extract")
    return step


def our_step(net: QwenImage21Transformer, asked: dict[str, Any], stack: ExitStack) -> Callable[[], Tensor]:
    stack.enter_context(keep_prefix(net))
    latents, words = asked["latents"].bfloat16(), asked["words"].bfloat16()
    time = torch.tensor([0.5])

    def step() -> Tensor:
        return net(latents, time, words, None, asked["grids"], asked["tokens"], places=asked["places"])

    step()
    return step


@torch.inference_mode()
def measure(theirs: dict[str, Any], nets: dict[str, Any], asked: dict[str, Any], reps: int) -> dict[str, Any]:
    with ExitStack() as stack:
        dtypes = {"diffusers fp32": torch.float32, "diffusers bf16": torch.bfloat16}
        cases = {name: their_step(net, asked, dtypes[name]) for name, net in theirs.items()}
        cases |= {name: our_step(net, asked, stack) for name, net in nets.items()}
        exact = cases["diffusers fp32"]()
        errors = {name: float((case().float() - exact).norm() / exact.norm()) for name, case in cases.items()}
        seconds = medians(cases, reps)
    first = seconds["diffusers fp32"]
    return {name: {"seconds": s, "beside_fp32": first / s, "error": errors[name]} for name, s in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--reference", type=int, default=256)
    parser.add_argument("--kinds", nargs="+", default=KINDS)
    parser.add_argument("--no-bf16", action="store_true", help="Leave out diffusers in bfloat16.")
    parser.add_argument("--reps", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    library.use_threads(asked.threads)
    wide = oracle(torch.float32)
    state = dict(wide.state_dict())
    theirs = {"diffusers fp32": wide} | ({} if asked.no_bf16 else {"diffusers bf16": oracle(torch.bfloat16)})
    nets = {f"ours {kind}": ours(state, kind) for kind in asked.kinds}
    report = {"machine": platform.processor(), "kernels": library.instruction_set(), "threads": asked.threads}
    report |= {"reference": asked.reference, "cases": (found := [])}
    for tokens in asked.tokens:
        rows = measure(theirs, nets, given(tokens, asked.reference), asked.reps)
        found.append({"tokens": tokens, "rows": rows})
        print(f"{tokens} tokens")
        for name, row in rows.items():
            print(f"  {name:16s} {row['beside_fp32']:6.2f} x fp32  error {row['error']:.4f}", flush=True)
        if asked.out:
            asked.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
