"""The Qwen-Image transformer: a multimodal diffusion transformer (MMDiT) with a text and a picture stream.

Three places let the outside world attach; nothing below knows that it does:
    Linear   replaced for quantization and LoRA
    Attend   replaced for kernels and sequence parallelism
    Stack    wrapped for caches and streaming (a stack of blocks is a block); a fused Block may replace `Block` whole
Tensor names are those of the official checkpoints. Source: Qwen-Image technical report; diffusers 0.42 is the oracle.
Shapes: B batch, N picture tokens, T text tokens, D width, H heads, E head width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lanting.nn.chains import Beside, Companion
from lanting.nn.regions import Regions, attended
from lanting.nn.rope import Grid, RopeCache, rotate

FP16_LIMIT = 65504.0
# (number of a block, the picture stream (B, N, D) behind it, target tokens) -> the stream that goes on
Steer = Callable[[int, Tensor, int], Tensor]


@dataclass(frozen=True)
class TransformerConfig:
    """The numbers of `transformer/config.json`; defaults are the 20.4 B releases."""

    num_layers: int = 60
    num_attention_heads: int = 24
    attention_head_dim: int = 128
    joint_attention_dim: int = 3584
    in_channels: int = 64
    out_channels: int = 16
    patch_size: int = 2
    axes_dims_rope: tuple[int, int, int] = (16, 56, 56)
    zero_cond_t: bool = False  # Edit-2511: reference pictures are modulated at t = 0
    use_additional_t_cond: bool = False  # Layered: a second, constant embedding joins the timestep's
    use_layer3d_rope: bool = False  # Layered: the condition picture sits at frame -1

    @property
    def width(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Self:
        """Read a config.json; keys we do not know (`_class_name`, `guidance_embeds`, ...) are left aside."""
        known = {k: v for k, v in config.items() if k in cls.__dataclass_fields__ and v is not None}
        if "axes_dims_rope" in known:
            known["axes_dims_rope"] = tuple(known["axes_dims_rope"])
        return cls(**known)


@dataclass(frozen=True)
class Context:
    """What every block sees and none may change."""

    temb: Tensor  # (B, 1 or 2, D): the target's time, then (zero_cond_t) the references'
    target_tokens: int  # picture tokens that belong to the target
    rope: tuple[Tensor, Tensor]  # cosines and sines (T + N, E/2), text first
    mask: Tensor | None = None  # (B, T) bool, True = a real token
    control: tuple[Tensor, ...] = ()  # residuals (B, N, D) for the picture stream
    branch: str = "positive"  # which side of the guidance this is; for caches only
    steer: Steer | None = None  # a blockwise ControlNet (`nn.blockwise`); it acts behind blocks, none reads it
    regions: Regions | None = None  # several texts, each for a part of the picture; then there is no mask
    beside: Beside | None = None  # a ControlNet that computes along (`nn.chains`); it acts behind blocks as well


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis; float32 inside, rounded before the weight, as the reference."""

    def __init__(self, dim: int, eps: float = 1e-6):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps

    def forward(self, x: Tensor) -> Tensor:
        h = x.float()
        h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + self.eps)
        return h.to(self.weight.dtype) * self.weight


class Attend(nn.Module):
    """Joint attention. q, k, v (B, T + N, H, E), text first; mask (B, T) over the text keys -> (B, T + N, H, E)."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, H, T + N, E)
        if mask is not None:
            mask = F.pad(mask, (0, k.shape[2] - mask.shape[1]), value=True)[:, None, None]  # (B, 1, 1, T + N)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


class Attention(nn.Module):
    """Two streams with weights of their own (`to_*` pictures, `add_*` text) and one attention over both."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        width, head = config.width, config.attention_head_dim
        self.heads = config.num_attention_heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.add_q_proj, self.add_k_proj, self.add_v_proj = (nn.Linear(width, width) for _ in range(3))
        self.norm_q, self.norm_k = RMSNorm(head), RMSNorm(head)
        self.norm_added_q, self.norm_added_k = RMSNorm(head), RMSNorm(head)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])
        self.to_add_out = nn.Linear(width, width)
        self.attend = Attend()

    def forward(self, img: Tensor, txt: Tensor, ctx: Context) -> tuple[Tensor, Tensor]:
        length = txt.shape[1]
        split = lambda x: x.unflatten(-1, (self.heads, -1))  # noqa: E731  (B, n, D) -> (B, n, H, E)
        q = torch.cat([self.norm_added_q(split(self.add_q_proj(txt))), self.norm_q(split(self.to_q(img)))], 1)
        k = torch.cat([self.norm_added_k(split(self.add_k_proj(txt))), self.norm_k(split(self.to_k(img)))], 1)
        v = torch.cat([split(self.add_v_proj(txt)), split(self.to_v(img))], 1)
        q, k = rotate(q, *ctx.rope), rotate(k, *ctx.rope)
        out = attended(self.attend, q, k, v, ctx).flatten(2).type_as(img)
        return self.to_out[0](out[:, length:]), self.to_add_out(out[:, :length])


class GeluProjection(nn.Module):
    """Linear, then tanh-approximate GELU; a class because the checkpoint calls the Linear `net.0.proj`."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.proj = nn.Linear(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.proj(x), approximate="tanh")


class FeedForward(nn.Module):
    """D -> 4D -> D; index 1 of `net` is where the checkpoint's layout keeps a dropout."""

    def __init__(self, width: int):
        super().__init__()
        self.net = nn.ModuleList([GeluProjection(width, 4 * width), nn.Identity(), nn.Linear(4 * width, width)])

    def forward(self, x: Tensor) -> Tensor:
        return self.net[2](self.net[0](x))


def layer_norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


def per_token(rows: Tensor, tokens: int, target_tokens: int) -> Tensor:
    """(B, 1, D) broadcasts; (B, 2, D) becomes (B, N, D): the target's row, then the references'."""
    if rows.shape[1] == 1:
        return rows
    target = rows[:, :1].expand(-1, target_tokens, -1)
    return torch.cat([target, rows[:, 1:].expand(-1, tokens - target_tokens, -1)], 1)


class Block(nn.Module):
    """One layer of both streams: modulate, attend jointly, gate; modulate, feed forward, gate."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        width = config.width
        self.img_mod = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.txt_mod = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.attn = Attention(config)
        self.img_mlp, self.txt_mlp = FeedForward(width), FeedForward(width)

    def forward(self, img: Tensor, txt: Tensor, ctx: Context) -> tuple[Tensor, Tensor]:
        rows = per_token(self.img_mod(ctx.temb), img.shape[1], ctx.target_tokens)  # (B, 1 or N, 6D)
        shift1, scale1, gate1, shift2, scale2, gate2 = rows.chunk(6, -1)
        tshift1, tscale1, tgate1, tshift2, tscale2, tgate2 = self.txt_mod(ctx.temb[:, :1]).chunk(6, -1)

        img_in = layer_norm(img) * (1 + scale1) + shift1
        txt_in = layer_norm(txt) * (1 + tscale1) + tshift1
        img_out, txt_out = self.attn(img_in, txt_in, ctx)
        img, txt = img + gate1 * img_out, txt + tgate1 * txt_out

        img = img + gate2 * self.img_mlp(layer_norm(img) * (1 + scale2) + shift2)
        txt = txt + tgate2 * self.txt_mlp(layer_norm(txt) * (1 + tscale2) + tshift2)
        if img.dtype == torch.float16:  # the reference clips both streams in half precision, and only there
            img, txt = img.clip(-FP16_LIMIT, FP16_LIMIT), txt.clip(-FP16_LIMIT, FP16_LIMIT)
        return self.given(img, txt)

    def given(self, img: Tensor, txt: Tensor) -> Any:
        """What `forward` gives, of both streams."""
        return img, txt


class Stack(nn.ModuleList):
    """Blocks in order. ControlNet residuals are spread evenly over them and added behind each block; a blockwise
    ControlNet is asked there, and one that computes along goes on."""

    def forward(self, img: Tensor, txt: Tensor, ctx: Context) -> tuple[Tensor, Tensor]:
        return through(self, img, txt, ctx)


def through(
    stack: Stack, img: Tensor, txt: Tensor, ctx: Context, first: int = 0, last: int | None = None
) -> tuple[Tensor, Tensor]:
    """Blocks `first` to `last` (not included) of a stack."""
    every = math.ceil(len(stack) / len(ctx.control)) if ctx.control else 0
    for i in range(len(stack))[first:last]:
        before = img, txt
        img, txt = stack[i](img, txt, ctx)
        if every:
            img = img + ctx.control[i // every]
        if ctx.steer is not None:
            img = ctx.steer(i, img, ctx.target_tokens)
        if ctx.beside is not None:
            img, txt = ctx.beside(i, before, (img, txt), ctx)
    return img, txt


def both_builds(
    steer: Steer | Companion | tuple[Steer, Companion] | None,
) -> tuple[Steer | None, Companion | None]:
    """Who is asked behind blocks, and who computes along."""
    if isinstance(steer, tuple):
        return steer
    along = steer is not None and hasattr(steer, "begin")
    return (None, steer) if along else (steer, None)  # type: ignore[return-value]


class TimestepEmbedding(nn.Module):
    """Sinusoid of 1000 t (cosines first), two Linears; Layered adds row 0 of a constant embedding."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        width = config.width
        self.timestep_embedder = nn.ModuleDict({"linear_1": nn.Linear(256, width), "linear_2": nn.Linear(width, width)})
        self.addition_t_embedding = nn.Embedding(2, width) if config.use_additional_t_cond else None

    def forward(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        wave = sinusoid(t).to(dtype)  # (B, k, 256)
        hidden = F.silu(self.timestep_embedder["linear_1"](wave))
        temb = self.timestep_embedder["linear_2"](hidden)  # (B, k, D)
        return temb if self.addition_t_embedding is None else temb + self.addition_t_embedding.weight[0]


def sinusoid(t: Tensor) -> Tensor:
    """t (...) in [0, 1] -> (..., 256) float32: 128 cosines, then 128 sines, of 1000 t 10000^(-k/128)."""
    exponent = -math.log(10000) * torch.arange(128, dtype=torch.float32, device=t.device) / 128
    angles = 1000 * (t.float()[..., None] * torch.exp(exponent))
    return torch.cat([angles.cos(), angles.sin()], -1)


class QwenImageTransformer(nn.Module):
    """Latent tokens, time and text in; flow velocity (noise minus data) out."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        width, text = config.width, config.joint_attention_dim
        self.config = config
        self.img_in = nn.Linear(config.in_channels, width)
        self.txt_norm, self.txt_in = RMSNorm(text), nn.Linear(text, width)
        self.time_text_embed = TimestepEmbedding(config)
        self.transformer_blocks = Stack(Block(config) for _ in range(config.num_layers))
        self.norm_out = nn.ModuleDict({"linear": nn.Linear(width, 2 * width)})
        self.proj_out = nn.Linear(width, config.patch_size**2 * config.out_channels)
        self.rope = RopeCache(config.axes_dims_rope, config.use_layer3d_rope)

    def forward(  # noqa: PLR0913  what the network is given, no less
        self,
        latents: Tensor,
        timestep: Tensor,
        prompt_embeds: Tensor,
        prompt_mask: Tensor | None,
        grids: Sequence[Grid],
        target_tokens: int,
        *,
        control: Sequence[Tensor] = (),
        branch: str = "positive",
        steer: Steer | Companion | tuple[Steer, Companion] | None = None,
        regions: Regions | None = None,
    ) -> Tensor:
        """latents (B, N, in_channels): targets, then references, in the order of `grids`; timestep (B,) in [0, 1];
        prompt_embeds (B, T, joint_attention_dim), with `regions` all texts; prompt_mask (B, T) bool or None when
        nothing is padded; steer: what ControlNets do that act inside, of either build or one of each.
        Returns (B, N, 4 * out_channels); the caller keeps the first `target_tokens`."""
        img = self.img_in(latents)  # (B, N, D)
        txt = self.txt_in(self.txt_norm(prompt_embeds))  # (B, T, D)
        temb = self.time_text_embed(self.times(timestep.to(img.dtype)), img.dtype)  # (B, 1 or 2, D)
        longest = txt.shape[1] if regions is None else max(regions.lengths)
        rope = self.rope(tuple(grids), longest, img.device)
        rope = rope if regions is None else regions.rope(*rope)
        mask = None if prompt_mask is None else prompt_mask.bool()
        behind, along = both_builds(steer)
        beside = None if along is None else along.begin()
        ctx = Context(temb, target_tokens, rope, mask, tuple(control), branch, behind, regions, beside)
        img, _ = self.transformer_blocks(img, txt, ctx)
        scale, shift = self.norm_out["linear"](F.silu(temb[:, :1])).chunk(2, -1)  # scale first, unlike in a block
        return self.proj_out(layer_norm(img) * (1 + scale) + shift)

    def times(self, t: Tensor) -> Tensor:
        """(B, 1), or (B, 2) with a second time of 0 for the references of zero_cond_t releases."""
        return torch.stack([t, torch.zeros_like(t)], 1) if self.config.zero_cond_t else t[:, None]
