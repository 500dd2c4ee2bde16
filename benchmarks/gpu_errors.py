"""What a GPU's ways to compute cost in exactness: python benchmarks/gpu_errors.py [--tokens 256] [--json FILE]

One full-width block (3072) with random weights, beside the same block in float32: the error of what the block adds to
the picture's stream (its residual), relative, in percent. Computed on the CPU by the kernels' twins in torch, which
mean the same as the kernels (`tests/gpu` compares them). Weights are normal with a deviation of 0.02, as the official
ones nearly are; their outliers, and those of real activations, are not in it. Attention with scores in 8 bits is
measured alone, by its kernel in Triton's interpreter. No time is measured.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lanting.attach.gpu import attach_gpu, detach_gpu
from lanting.nn.linears import Fp8Linear, Int4Linear, Int8Linear
from lanting.nn.mmdit import Block, Context, TransformerConfig
from lanting.nn.rope import RopeCache
from lanting.nn.swap import swap

TEXT = 128


def make_block() -> Block:
    torch.manual_seed(0)
    block = Block(replace(TransformerConfig(), num_layers=1)).eval().requires_grad_(False)
    for name, p in block.named_parameters():
        if p.ndim > 1:
            p.normal_(0, 0.02)
        elif "norm" not in name:
            p.normal_(0, 0.1)
    return block


def inputs(tokens: int) -> tuple[Tensor, Tensor, Context]:
    """Streams of unit size with a few channels ten times as large, as they are behind the first blocks."""
    torch.manual_seed(1)
    side = int(tokens**0.5)
    assert side * side == tokens, "a square number of tokens"
    img, txt = torch.randn(1, tokens, 3072), torch.randn(1, TEXT, 3072)
    for stream in (img, txt):
        stream[..., torch.randperm(3072)[:8]] *= 10
    rope = RopeCache((16, 56, 56), False)(((1, side, side),), TEXT, torch.device("cpu"))
    return img, txt, Context(torch.randn(1, 1, 3072), tokens, rope)


def packed(block: Block, cls: type, **options: object) -> dict[str, nn.Module]:
    """The Linears of the block but the modulation's, packed."""
    plain: dict[str, nn.Module] = {}

    def make(path: str, old: nn.Module) -> nn.Module | None:
        if "_mod" in path:
            return None
        plain[path] = old
        return cls.from_dense(old.weight.float(), old.bias, **options)  # type: ignore[attr-defined]

    swap(block, nn.Linear, make)
    return plain


def added(block: Block, img: Tensor, txt: Tensor, ctx: Context) -> Tensor:
    with torch.inference_mode():
        dtype = block.attn.norm_q.weight.dtype
        moved = replace(ctx, temb=ctx.temb.to(dtype))
        return block(img.to(dtype), txt.to(dtype), moved)[0].float() - img.to(dtype).float()


def ways() -> Iterator[tuple[str, type | None, dict[str, Any], dict[str, Any] | None]]:
    """(name, kind of weights, its options, options of attach_gpu or None for torch alone)."""
    yield "bfloat16, torch", None, {}, None
    yield "bfloat16, fused", None, {}, {}
    yield "fp8 weights, 16-bit activations (torch)", Fp8Linear, {"scale": "tensor"}, None
    yield "fp8, one scale for a weight (`--quant fp8`)", Fp8Linear, {"scale": "tensor"}, {}
    yield "fp8, a scale for each row", None, {}, {"compute": "fp8"}
    yield "int8 weights, 16-bit activations (torch)", Int8Linear, {}, None
    yield "int8 (`--quant int8`)", Int8Linear, {}, {}
    yield "int8, from plain weights", None, {}, {"compute": "int8"}
    yield "int8, rotated, from plain weights", None, {}, {"compute": "int8 rotated"}
    yield "int8, rotated", Int8Linear, {"rotate": 256}, {}
    for group in (32, 64, 128):
        yield f"int4, groups of {group}, 16-bit activations", Int4Linear, {"group": group}, {}
    yield "int4, groups of 64, 8-bit activations", Int4Linear, {"group": 64}, {"four": True}
    yield "int4, groups of 64, rotated, 16-bit activations", Int4Linear, {"group": 64, "rotate": 256}, {}
    yield "int4, groups of 64, rotated, 8-bit activations", Int4Linear, {"group": 64, "rotate": 256}, {"four": True}


def attention(tokens: int) -> float:
    """Of scores in 8 bits: normal queries and values, and keys that share three times as much as tells them apart."""
    os.environ["TRITON_INTERPRET"] = "1"  # only now: the block above is the twins'
    from lanting.kernels.gpu import eight_bit
    from lanting.kernels.gpu.attention import exact

    torch.manual_seed(2)
    q, k, v = torch.randn(3, 1, tokens, 2, 128).unbind()
    k = k + 3 * torch.randn(1, 1, 2, 128)
    wanted = exact(q, k, v, None)
    return float((eight_bit.attend(q, k, v, None) - wanted).norm() / wanted.norm()) * 100


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    block, (img, txt, ctx) = make_block(), inputs(given.tokens)
    exact = added(block, img, txt, ctx)
    block.bfloat16()
    table = {}
    for name, kind, options, attached in ways():
        plain = {} if kind is None else packed(block, kind, **options)
        if attached is not None:
            attach_gpu(block, **attached)
        found = added(block, img, txt, ctx)
        table[name] = round(float((found - exact).norm() / exact.norm()) * 100, 2)
        print(f"| {name} | {table[name]:.2f} % |", flush=True)
        detach_gpu(block)
        for path, old in plain.items():
            parent, _, last = path.rpartition(".")
            setattr(block.get_submodule(parent), last, old)
    table["attention alone, scores in 8 bits"] = round(attention(given.tokens + TEXT), 2)
    print(f"| attention alone, scores in 8 bits | {table['attention alone, scores in 8 bits']:.2f} % |")
    if given.json is not None:
        about = {"tokens": given.tokens, "text": TEXT, "torch": torch.__version__, "error_percent": table}
        given.json.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
