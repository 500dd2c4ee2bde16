"""The parts `controls` and `forms` of `benchmarks/gpu.py`: what steering a step costs, and what packed weights do.

`controls`: a step at 1024 x 1024 by itself, with a blockwise ControlNet (60 blocks, random), with VideoX-Fun's (a chain
of 5 blocks), recorded and not, and with words for two overlapping parts of the picture, in groups of queries as we do
and under one mask from token to token.
`forms`: one Linear of the full model (3072 to 12288, bias) on the 4224 rows of such a step, its weight stored in each
form that files come in: milliseconds, times those of 16 bits, and the memory that a product takes beside the result.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpu_bench import TEXT, Bench, Step
from lanting.attach.gpu import attach_gpu, detach_gpu
from lanting.attach.graphs import attach_graphs, detach_graphs
from lanting.nn.affine import AffineLinear
from lanting.nn.blockwise import BlockwiseConfig, BlockwiseControlNet
from lanting.nn.controlnet_fun import FunConfig, QwenImageFunControlNet
from lanting.nn.fourbit import Nvfp4Linear, TableLinear
from lanting.nn.linears import Fp8Linear, Int4Linear, Int8Linear, PackedLinear
from lanting.nn.lowrank import LowRankLinear
from lanting.nn.mmdit import QwenImageTransformer
from lanting.nn.regions import Regions, regions_of

REGION = 24  # tokens of a region's words
CHAIN = 5  # blocks of VideoX-Fun's net


# ---------------------------------------------------------------- what steers
@torch.no_grad()
def controls(bench: Bench, net: QwenImageTransformer, found: dict[str, Any]) -> None:
    """Milliseconds of one side of the guidance."""
    step = Step(bench, net, 1024)
    config = net.config
    with torch.device("meta"):
        behind = BlockwiseControlNet(BlockwiseConfig(config.num_layers, config.width, config.in_channels))
        every = max(config.num_layers // CHAIN, 1)
        chain = QwenImageFunControlNet(FunConfig(**vars(config), control_layers=(*range(0, config.num_layers, every),)))
    blank = [each.to(torch.bfloat16).to_empty(device=bench.device).eval() for each in (behind, chain)]
    behind, chain = (random_(each.requires_grad_(False)) for each in blank)
    hint = torch.zeros(1, step.tokens, 132, device=bench.device, dtype=torch.bfloat16)
    regions = halves(step, bench.device)
    words = torch.cat([step.texts[0][:, :REGION]] * 2 + [step.texts[0]], 1)
    asked = {
        "plain": {},
        "blockwise ControlNet": {"steer": behind.steer([(step.latents, 1.0)])},
        "chain of a ControlNet": {"steer": chain.steer([(hint, 1.0)])},
        "two regions": {"regions": regions},
    }
    for each in (net, behind, chain):
        attach_gpu(each)
    try:
        for recorded in (True, False):
            graphs = attach_graphs(net, bench.table) if recorded else None
            for name, more in asked.items():
                text = words if "regions" in more else step.texts[0]
                told = name if recorded else f"{name}, not recorded"
                tell(bench, found, told, lambda text=text, more=more: ask(net, step, text, **more))
            if graphs is not None and graphs.failed:
                found["not recorded because"] = graphs.failed
            detach_graphs(net)
        attentions(bench, net, regions, found)
    finally:
        detach_graphs(net)
        detach_gpu(net)


def ask(net: QwenImageTransformer, step: Step, text: Tensor, **more: Any) -> Tensor:
    return net(step.latents, step.timestep, text, None, step.grids, step.tokens, **more)


def halves(step: Step, device: torch.device) -> Regions:
    """The left and the right two thirds."""
    _, rows, columns = step.grids[0]
    inside = torch.zeros(2, rows, columns, dtype=torch.bool, device=device)
    inside[0, :, : 2 * columns // 3] = inside[1, :, columns // 3 :] = True
    return regions_of([REGION, REGION, TEXT], inside.flatten(1))


def attentions(bench: Bench, net: QwenImageTransformer, regions: Regions, found: dict[str, Any]) -> None:
    """One attention: without regions, in groups, and under a mask."""
    block: Any = net.transformer_blocks[0]
    tokens, config = len(regions.rows), net.config
    shape = (1, tokens, config.num_attention_heads, config.attention_head_dim)
    q, k, v = (torch.randn(shape, device=bench.device, dtype=torch.bfloat16) for _ in range(3))
    mask = torch.zeros(tokens, tokens, dtype=torch.bool, device=bench.device)
    for asking, seen in regions.groups:
        mask[asking[:, None], seen] = True
    turned = [x.transpose(1, 2) for x in (q, k, v)]
    masked = partial(F.scaled_dot_product_attention, *turned, attn_mask=mask)
    tell(bench, found, "one attention", lambda: block.attn.attend(q, k, v, None))
    tell(bench, found, "one attention, two regions", lambda: regions.attend(block.attn.attend, q, k, v))
    tell(bench, found, "one attention, under a mask", masked)


# ---------------------------------------------------------------- forms of weights
def makers(width: int, out: int) -> dict[str, Callable[[], PackedLinear]]:
    """Empty Linears of every form."""
    return {
        "int8": lambda: Int8Linear(width, out, scale=(out, 1)),
        "int4": lambda: Int4Linear(width, out),
        "fp8 scaled": lambda: Fp8Linear(width, out, scale=()),
        "nf4": lambda: TableLinear(width, out),
        "nf4, nested": lambda: TableLinear(width, out, nested=(256, 0.0)),
        "nvfp4": lambda: Nvfp4Linear(width, out),
        "mxfp8": lambda: Fp8Linear(width, out, scale=(out, width // 32)),
        "uint4 (AWQ, MLX)": lambda: AffineLinear(width, out, bits=4, group=64),
        "uint6 (MLX)": lambda: AffineLinear(width, out, bits=6, group=64),
        "SVDQuant int4": lambda: LowRankLinear(Int4Linear(width, out, bias=False), 32),
        "SVDQuant fp4": lambda: LowRankLinear(Nvfp4Linear(width, out, bias=False), 32),
    }


@torch.no_grad()
def forms(bench: Bench, found: dict[str, Any]) -> None:
    width, out, rows = (64, 128, 40) if bench.asked.dry_run else (3072, 12288, 4224)
    x = torch.randn(1, rows, width, device=bench.device, dtype=torch.bfloat16)
    plain = random_(nn.Linear(width, out, device=bench.device, dtype=torch.bfloat16))
    tell(bench, found, "bf16", lambda: plain(x))
    for name, make in makers(width, out).items():
        try:
            linear = filled(make().to(bench.device))
            net = nn.ModuleList([linear])
            attach_gpu(net)
            tell(bench, found, name, lambda linear=linear: linear(x))
            found[name]["times bf16"] = round(found[name]["ms"] / max(found["bf16"]["ms"], 1e-3), 2)
            detach_gpu(net)
        except Exception as error:
            found[name] = f"{type(error).__name__}: {str(error)[:300]}"


def filled(linear: PackedLinear) -> PackedLinear:
    """Random codes under small scales: what is stored does not change how long it takes."""
    for tensor in linear.buffers():
        if tensor.dtype == torch.uint8:
            tensor.random_(0, 256)
        elif tensor.dtype == torch.int8:
            tensor.random_(-127, 128)
        else:
            tensor.copy_(torch.rand(tensor.shape, device=tensor.device).to(tensor.dtype))
    for module in linear.modules():  # bytes of scales may be numbers of any size, and must not be NaN
        scale = module._buffers.get("weight_scale")
        if scale is not None and scale.dtype == torch.uint8:
            scale.random_(32, 64)
    return linear


def random_(net: Any) -> Any:
    for name, p in net.named_parameters():
        p.data.normal_(0, 0.3 / p.shape[-1] ** 0.5) if p.ndim > 1 else p.data.fill_(
            float("rms" in name or "norm" in name)
        )
    return net


def tell(bench: Bench, found: dict[str, Any], name: str, work: Callable[[], Tensor]) -> None:
    ms, gb = bench.peak(lambda: bench.clock(work))
    found[name] = {"ms": round(ms, 2), "more gb": round(gb, 2)}
