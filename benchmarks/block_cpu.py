"""One full-width block of the transformer on a CPU, ours against diffusers', side by side in one process.

    python benchmarks/block_cpu.py [--tokens 256 1024 4096] [--reps 5] [--threads 1] [--out FILE]

Width 3072, 24 heads, 128 text tokens, random weights (so errors say that the kernels compute what they should, not
what quantizing does to the official weights). Medians of processor time, variants in turn, beside diffusers in bfloat16
and in float32, which is faster where the processor does not multiply bfloat16. The six modulation vectors
come from a table in ours, as they do when a model runs (docs/memory.md); diffusers multiplies them out, which is 1 to
6 % of its time, shown as a row of its own. Errors are of what the block adds to the picture stream, against float32.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lanting.attach.compute import attach_kernels
from lanting.kernels import library
from lanting.nn.linears import GgufLinear, Int4Linear, Int8Linear
from lanting.nn.mmdit import Block, Context, TransformerConfig
from lanting.nn.rope import RopeCache
from lanting.nn.swap import swap
from lanting.weights.kquants import quantize as gguf_quantize

TEXT, WIDTH, HEADS = 128, 3072, 24
CONFIG = TransformerConfig(num_layers=1, num_attention_heads=HEADS, attention_head_dim=128, joint_attention_dim=3584)


class Given(nn.Module):
    """Modulation out of a table."""

    def __init__(self, rows: Tensor):
        super().__init__()
        self.rows = rows

    def forward(self, temb: Tensor) -> Tensor:
        return self.rows


def oracle() -> Any:
    """diffusers' block with weights of a size that keeps streams sane."""
    from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformerBlock

    torch.manual_seed(0)
    block = QwenImageTransformerBlock(WIDTH, HEADS, 128).eval().requires_grad_(False)
    for name, p in block.named_parameters():
        if p.ndim > 1:
            p.normal_(0, 0.02)
        elif "norm" not in name:
            p.normal_(0, 0.01)
    return block


def ours(state: dict[str, Tensor], temb: Tensor, make: Callable[[str, Any], nn.Module | None] | None) -> Block:
    """Our block with these weights; `make` packs its Linears."""
    block = Block(CONFIG)
    block.load_state_dict(state)
    block = block.eval().requires_grad_(False).bfloat16()
    for name in ("img_mod", "txt_mod"):
        setattr(block, name, Given(getattr(block, name)(temb)))
    if make is not None:
        swap(block, nn.Linear, make)
    attach_kernels(nn.ModuleList([block]))
    return block


def packed(kind: str) -> Callable[[str, Any], nn.Module | None] | None:
    """What makes a packed Linear of a plain one."""
    if kind == "bf16":
        return None
    if kind.startswith("Q"):
        return lambda path, old: GgufLinear.from_packed(
            gguf_quantize(old.weight.float(), kind), kind, old.in_features, old.bias
        )
    cls: Any = Int8Linear if kind == "int8" else Int4Linear
    options: dict[str, int] = {} if kind == "int8" else {"group": int(kind.split()[1])}
    if kind.endswith("rotated"):
        options["rotate"] = 256
    return lambda path, old: cls.from_dense(old.weight.float(), old.bias, **options)


def medians(cases: dict[str, Callable[[], Any]], reps: int, warm: int = 1) -> dict[str, float]:
    """Seconds of processor time of each case, all of them in turn, after `warm` runs that don't count."""
    seen: dict[str, list[float]] = {name: [] for name in cases}
    for each in cases.values():
        for _ in range(warm):
            each()
    for _ in range(reps):
        for name, each in cases.items():
            began = time.process_time()
            each()
            seen[name].append(time.process_time() - began)
    return {name: statistics.median(values) for name, values in seen.items()}


def flops(tokens: int) -> float:
    """Multiplications and additions of the block's Linears and of its attention."""
    every = tokens + TEXT
    return 2 * 12 * WIDTH**2 * every + 4 * every**2 * WIDTH


def inputs(tokens: int) -> tuple[Tensor, Tensor, Tensor, Any, Context]:
    from diffusers.models.transformers.transformer_qwenimage import QwenEmbedRope

    side = int(tokens**0.5)
    torch.manual_seed(1)
    temb, txt, img = (torch.randn(1, n, WIDTH) for n in (1, TEXT, tokens))  # the same time for every size
    theirs = QwenEmbedRope(theta=10000, axes_dim=[16, 56, 56], scale_rope=True)
    rope = theirs([(1, side, side)], max_txt_seq_len=TEXT, device=torch.device("cpu"))
    tables = RopeCache((16, 56, 56), False)(((1, side, side),), TEXT, torch.device("cpu"))
    return img, txt, temb, rope, Context(temb, tokens, tables)


@torch.inference_mode()
def measure(block: Any, blocks: dict[str, Block], tokens: int, reps: int) -> dict[str, Any]:
    img, txt, temb, rope, ctx = inputs(tokens)
    b = [x.bfloat16() for x in (img, txt, temb[0])]

    def theirs(net: Any, img: Tensor, txt: Tensor, temb: Tensor) -> Tensor:
        found = net(
            hidden_states=img,
            encoder_hidden_states=txt,
            encoder_hidden_states_mask=None,
            temb=temb,
            image_rotary_emb=rope,
        )
        return next(x for x in found if x.shape[1] == tokens)

    cases: dict[str, Callable[[], Any]] = {"diffusers bf16": lambda: theirs(block, *b)}
    cases["diffusers, its modulation alone"] = lambda: (block.img_mod(b[2]), block.txt_mod(b[2]))
    wide = copy.deepcopy(block).float()
    cases["diffusers fp32"] = lambda: theirs(wide, img, txt, temb[0])
    for name, each in blocks.items():
        cases[name] = lambda each=each: each(b[0], b[1], ctx)[0]
    exact = theirs(wide, img, txt, temb[0]) - img
    errors = {
        name: ((case().float() - img - exact).norm() / exact.norm()).item()
        for name, case in cases.items()
        if "alone" not in name
    }
    seconds = medians(cases, reps)
    first, second = seconds["diffusers bf16"], seconds["diffusers fp32"]
    rows = {
        name: {
            "seconds": s,
            "faster": first / s,
            "beside_fp32": second / s,
            "error": errors.get(name),
            "gflops": flops(tokens) / s / 1e9,
        }
        for name, s in seconds.items()
    }
    return {"tokens": tokens, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--kinds", nargs="+", default=["bf16", "int8", "int4 32", "int4 64", "int4 128", "Q4_K"])
    parser.add_argument("--reps", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    library.use_threads(asked.threads)
    block = oracle()
    state = {k: v for k, v in block.state_dict().items()}
    temb = inputs(256)[2].bfloat16()
    blocks = {f"ours {kind}": ours(state, temb, packed(kind)) for kind in asked.kinds}
    block.bfloat16()
    report = {"machine": platform.processor(), "kernels": library.instruction_set(), "threads": asked.threads}
    report["cases"] = found = []
    for tokens in asked.tokens:
        found.append(measure(block, blocks, tokens, asked.reps if tokens < 4000 else max(1, asked.reps // 2)))
        print(f"{tokens} tokens")
        for name, row in found[-1]["rows"].items():
            error = "" if row["error"] is None else f"error {row['error']:.4f}"
            ratios = f"{row['faster']:6.2f} x bf16  {row['beside_fp32']:6.2f} x fp32"
            print(f"  {name:32s} {ratios}  {row['gflops']:5.0f} GFLOP/s  {error}", flush=True)
    if asked.out:
        asked.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
