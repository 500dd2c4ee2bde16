"""A copy of the network in bfloat16 that a GPU trains through, while weights, averages and optimizers stay in float32.

Under autocast every norm, rotary turn and gate of a block goes through memory in 32 bits, one operation at a time:
half of a step's time on a GPU. Here the copy computes in 16 bits throughout, in the operations that torch has fused
already, which need no compiler. Gradients are taken for the copy's weights and added up in float32. Numbers differ
from autocast's by rounding only.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lanting.nn.mmdit import Context
from lanting.train.model import NanoNet
from lanting.train.speed import prepare_for_gpu

DTYPE = torch.bfloat16
Tables = tuple[Tensor, Tensor]


class FusedBlocks:
    """`mmdit.Block.forward` for training: same numbers up to rounding, few operations. Keeps its rotary tables."""

    def __init__(self) -> None:
        self.tables: dict[int, tuple[Tensor, Tables]] = {}

    def turns(self, cosines: Tensor, sines: Tensor) -> Tables:
        """(n, E/2) twice -> (n, 1, E) twice in bfloat16: every pair's cosine twice, its sine with both signs."""
        kept = self.tables.get(id(cosines))
        if kept is None or kept[0] is not cosines:
            twice = cosines.repeat_interleave(2, -1)[:, None].to(DTYPE)
            signed = torch.stack([-sines, sines], -1).flatten(-2)[:, None].to(DTYPE)
            kept = self.tables[id(cosines)] = (cosines, (twice, signed))
        return kept[1]

    def __call__(self, block: nn.Module, img: Tensor, txt: Tensor, ctx: Context) -> tuple[Tensor, Tensor]:
        made: Any = block
        shift1, scale1, gate1, shift2, scale2, gate2 = made.img_mod(ctx.temb).chunk(6, -1)  # each (B, 1, D)
        tshift1, tscale1, tgate1, tshift2, tscale2, tgate2 = made.txt_mod(ctx.temb).chunk(6, -1)
        img_in, txt_in = modulated(img, shift1, scale1), modulated(txt, tshift1, tscale1)
        img_out, txt_out = self.attend(made.attn, img_in, txt_in, self.turns(*ctx.rope))
        img, txt = torch.addcmul(img, gate1, img_out), torch.addcmul(txt, tgate1, txt_out)
        img = torch.addcmul(img, gate2, made.img_mlp(modulated(img, shift2, scale2)))
        txt = torch.addcmul(txt, tgate2, made.txt_mlp(modulated(txt, tshift2, tscale2)))
        return img, txt

    def attend(self, attn: Any, img: Tensor, txt: Tensor, turns: Tables) -> tuple[Tensor, Tensor]:
        """`mmdit.Attention.forward` without masks."""
        length, heads = txt.shape[1], attn.heads
        text = [
            x.unflatten(-1, (heads, -1)) for x in (attn.add_q_proj(txt), attn.add_k_proj(txt), attn.add_v_proj(txt))
        ]
        seen = [x.unflatten(-1, (heads, -1)) for x in (attn.to_q(img), attn.to_k(img), attn.to_v(img))]
        q = torch.cat([normed(text[0], attn.norm_added_q), normed(seen[0], attn.norm_q)], 1)
        k = torch.cat([normed(text[1], attn.norm_added_k), normed(seen[1], attn.norm_k)], 1)
        v = torch.cat([text[2], seen[2]], 1)  # (B, T + N, H, E)
        q, k, v = (x.transpose(1, 2) for x in (turned(q, turns), turned(k, turns), v))
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return attn.to_out[0](out[:, length:]), attn.to_add_out(out[:, :length])


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=1e-6), 1 + scale)


def normed(x: Tensor, norm: Any) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], norm.weight, norm.eps)


def turned(x: Tensor, turns: Tables) -> Tensor:
    """`rope.rotate` of x (B, n, H, E)."""
    swapped = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    return torch.addcmul(x * turns[0], swapped, turns[1])


def twin_of(net: NanoNet) -> NanoNet:
    """The copy in bfloat16 on the device of `net`, ready for a GPU's batches. `net` must not be prepared for one."""
    twin = prepare_for_gpu(copy.deepcopy(net).to(DTYPE))
    twin.stack.run = FusedBlocks()
    return twin
