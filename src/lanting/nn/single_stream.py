"""The Qwen-Image-2.1 transformer: one stream in which text, reference pictures and the target share all weights.

Text and reference pictures are the prefix. It never sees the target and is modulated as at t = 0, so nothing in it
changes from step to step, and its keys and values may be kept (`keep_prefix`). Prefix and target are computed apart
even where nothing is kept: the same calls on the same numbers make kept and new ones equal to the last bit. (Rejected:
one sequence under one mask, which rounds otherwise with and without the prefix and costs the fast attention kernels.)

The same three places as in `nn.mmdit` let the outside world attach: Linear, Attend, Stack. Tensor names are those of
the official checkpoint. Source: Qwen-Image-2.1 as released; diffusers 0.42 is the oracle.
Shapes: B batch, N target, R reference and T text tokens, P = T + R prefix tokens, D width, H heads, E head width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lanting.nn.chains import Beside, Companion
from lanting.nn.mmdit import FP16_LIMIT, RMSNorm, Stack
from lanting.nn.rope import Grid, rotate
from lanting.nn.single_layout import Layout, Turn, behind_words, check, layout, seen

KeysValues = tuple[Tensor, Tensor]  # (B, n, H, E) each; keys are already rotated
Kept = dict[nn.Module, KeysValues]  # a prefix's, by Attention


@dataclass(frozen=True)
class SingleStreamConfig:
    """The numbers of `transformer/config.json`; defaults are the 7.1 B release."""

    num_layers: int = 32
    num_attention_heads: int = 32
    attention_head_dim: int = 128
    context_in_dim: int = 4096
    in_channels: int = 64
    out_channels: int = 64
    patch_size: int = 1
    mlp_ratio: int = 3
    axes_dims_rope: tuple[int, int, int] = (16, 56, 56)
    eps: float = 1e-6
    causal_condition: bool = True

    def __post_init__(self) -> None:
        if not self.causal_condition:
            raise ValueError("causal_condition must be true: a prefix that changes with time is not supported")

    @property
    def width(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Self:
        """Read a config.json; keys we do not know (`_class_name`, ...) are left aside. Raises ValueError where the
        prefix is not modulated at t = 0 (`causal_condition`)."""
        known = {k: v for k, v in config.items() if k in cls.__dataclass_fields__ and v is not None}
        if "out_channels" not in known and "in_channels" in known:  # null means: as many as go in
            known["out_channels"] = known["in_channels"]
        if "axes_dims_rope" in known:
            known["axes_dims_rope"] = tuple(known["axes_dims_rope"])
        return cls(**known)


@dataclass(frozen=True)
class Context:
    """What every block sees and none may change; only `kept` is filled, by blocks that compute the prefix."""

    modulation: Tensor  # (B, 1, 4D) of the target: scale, gate of the attention, scale, gate of the feed-forward
    prefix_modulation: Tensor  # (1, 1, 4D) the same at t = 0
    target_tokens: int  # N
    layout: Layout
    mask: Tensor | None = None  # (B, 1, 1, P + N) bool, True = a token the target may see; None: nothing is padded
    kept: Kept | None = None  # None: nothing is kept
    control: tuple[Tensor, ...] = ()  # always empty; a Stack asks for it
    steer: None = None  # as well
    regions: None = None  # as well
    beside: Beside | None = None  # a ControlNet that computes along
    branch: str = "positive"  # which side of the guidance this is; for caches only


class Attend(nn.Module):
    """Attention. q (B, n, H, E), k and v (B, m, H, E), mask None or bool broadcastable to (B, 1, n, m), True = seen;
    -> (B, n, H, E)."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, H, n or m, E)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


class Attention(nn.Module):
    """The target over prefix and target; the prefix, segment by segment, over itself.

    last  whether this is the last block's: nobody reads the prefix behind it, so only its keys and values are computed
    """

    def __init__(self, config: SingleStreamConfig, last: bool = False):
        super().__init__()
        width, head, eps = config.width, config.attention_head_dim, config.eps
        self.heads, self.last = config.num_attention_heads, last
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.norm_q, self.norm_k = RMSNorm(head, eps), RMSNorm(head, eps)
        self.to_out = nn.ModuleList([nn.Linear(width, width, bias=False)])
        self.attend = Attend()

    def forward(self, img: Tensor, before: KeysValues, ctx: Context) -> Tensor:
        """The target's (B, N, D), which sees the prefix's keys and values and itself."""
        own = self.keys_values(img, ctx.layout.target)
        k, v = (torch.cat(pair, 1) for pair in zip(before, own, strict=True))  # (B, P + N, H, E)
        return self.to_out[0](self.attend(self.queries(img, ctx.layout.target), k, v, ctx.mask).flatten(2))

    def queries(self, x: Tensor, turn: Turn) -> Tensor:
        """(B, n, D) -> (B, n, H, E)"""
        return rotate(self.norm_q(self.to_q(x).unflatten(-1, (self.heads, -1))), *turn)

    def keys_values(self, x: Tensor, turn: Turn) -> KeysValues:
        """(B, n, D) -> twice (B, n, H, E)"""
        k, v = (linear(x).unflatten(-1, (self.heads, -1)) for linear in (self.to_k, self.to_v))
        return rotate(self.norm_k(k), *turn), v

    def among(self, q: Tensor, k: Tensor, v: Tensor, place: Layout) -> Tensor:
        """The prefix's attention (B, P, D). Padding needs no mask here: it is on the right of all text and of all
        pictures, and nothing real in the prefix looks to the right."""
        parts = [self.attend(q[:, a:b], k[:, :b], v[:, :b], mask) for a, b, mask in place.segments]
        return self.to_out[0](torch.cat(parts, 1).flatten(2))


class FeedForward(nn.Module):
    """SwiGLU: D -> `mlp_ratio` D -> D."""

    def __init__(self, config: SingleStreamConfig):
        super().__init__()
        width, hidden = config.width, config.mlp_ratio * config.width
        self.proj, self.gate_layer = (nn.Linear(width, hidden, bias=False) for _ in range(2))
        self.out = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.silu(self.gate_layer(x)) * self.proj(x))


def scaled(x: Tensor, scale: Tensor, eps: float) -> Tensor:
    """Layer norm without weights, times 1 + scale: all of 2.1's norms with a time; there are no shifts."""
    return F.layer_norm(x, x.shape[-1:], eps=eps) * (1 + scale)


class Block(nn.Module):
    """One layer: scale, attend, gate; scale, feed forward, gate. The modulation is the whole network's."""

    def __init__(self, config: SingleStreamConfig, last: bool = False):
        super().__init__()
        self.attn, self.img_mlp = Attention(config, last), FeedForward(config)
        self.eps = config.eps

    def forward(self, img: Tensor, txt: Tensor | None, ctx: Context) -> tuple[Tensor, Tensor | None]:
        """img (B, N, D) target; txt (B, P, D) prefix, or None where `ctx.kept` has its keys and values. The last block
        gives the prefix back as it came."""
        before, txt = self.behind(txt, ctx)
        return self.given(self.ahead(img, before, ctx), txt)

    def given(self, img: Tensor, txt: Tensor | None) -> Any:
        """What `forward` gives, of both streams."""
        return img, txt

    def behind(self, txt: Tensor | None, ctx: Context) -> tuple[KeysValues, Tensor | None]:
        """The prefix's part of the layer: what the target sees of it, and what becomes of it."""
        if txt is None:
            assert ctx.kept is not None
            return ctx.kept[self.attn], None
        scale1, gate1, scale2, gate2 = ctx.prefix_modulation.chunk(4, -1)  # (1, 1, D)
        normed = scaled(txt, scale1, self.eps)
        before = self.attn.keys_values(normed, ctx.layout.prefix)
        if ctx.kept is not None:
            ctx.kept[self.attn] = before
        if not self.attn.last:
            found = self.attn.among(self.attn.queries(normed, ctx.layout.prefix), *before, ctx.layout)
            txt = self.fed(txt + gate1.tanh() * found, scale2, gate2)
        return before, txt

    def ahead(self, img: Tensor, before: KeysValues, ctx: Context) -> Tensor:
        """The target's part, all there is in a step whose prefix is kept."""
        scale1, gate1, scale2, gate2 = ctx.modulation.chunk(4, -1)  # (B, 1, D)
        found = self.attn(scaled(img, scale1, self.eps), before, ctx)
        return self.fed(img + gate1.tanh() * found, scale2, gate2)

    def fed(self, x: Tensor, scale: Tensor, gate: Tensor) -> Tensor:
        """The second half of the layer, for either stream."""
        x = x + gate.tanh() * self.img_mlp(scaled(x, scale, self.eps))
        return x.clip(-FP16_LIMIT, FP16_LIMIT) if x.dtype == torch.float16 else x  # as the reference


class ZeroCentredRMSNorm(RMSNorm):
    """A norm whose weight is stored less 1; all of it in float32, rounded once at the end."""

    def forward(self, x: Tensor) -> Tensor:
        h = x.float()
        h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + self.eps)
        return (h * (1 + self.weight.float())).type_as(x)


class TextProjection(nn.Module):
    """The reader's states (B, T, context_in_dim) -> (B, T, D)."""

    def __init__(self, config: SingleStreamConfig):
        super().__init__()
        self.text_norm = ZeroCentredRMSNorm(config.context_in_dim, config.eps)
        self.in_layer = nn.Linear(config.context_in_dim, config.width, bias=False)
        self.out_layer = nn.Linear(config.width, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_layer(F.gelu(self.in_layer(self.text_norm(x)), approximate="tanh"))


class TimestepEmbedding(nn.Module):
    """t (B,) in [0, 1] -> (B, D): a sinusoid of 1000 t, two Linears."""

    def __init__(self, width: int):
        super().__init__()
        linears = {"linear_1": nn.Linear(256, width, bias=False), "linear_2": nn.Linear(width, width, bias=False)}
        self.timestep_embedder = nn.ModuleDict(linears)

    def forward(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        hidden = self.timestep_embedder["linear_1"](sinusoid(t).to(dtype))
        return self.timestep_embedder["linear_2"](F.silu(hidden))


def sinusoid(t: Tensor) -> Tensor:
    """t (B,) in [0, 1] -> (B, 256) float32: 128 cosines, then 128 sines. 1000 t is rounded before it meets the
    frequencies; the first releases multiply in the other order (`nn.mmdit`), which moves angles by up to 6e-5."""
    exponent = -math.log(10000) * torch.arange(128, dtype=torch.float32, device=t.device) / 128
    angles = (1000 * t.float())[:, None] * torch.exp(exponent)
    return torch.cat([angles.cos(), angles.sin()], -1)


class QwenImage21Transformer(nn.Module):
    """Latent tokens, time and text in; flow velocity (noise minus data) of the target out."""

    def __init__(self, config: SingleStreamConfig):
        super().__init__()
        width, patch = config.width, config.patch_size**2
        self.config = config
        self.img_in = nn.Linear(config.in_channels * patch, width, bias=False)
        self.txt_in, self.time_text_embed = TextProjection(config), TimestepEmbedding(width)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 4 * width, bias=False))
        self.transformer_blocks = Stack(Block(config, i == config.num_layers - 1) for i in range(config.num_layers))
        self.norm_out = nn.ModuleDict({"linear": nn.Linear(width, width, bias=False)})
        self.proj_out = nn.Linear(width, config.out_channels * patch, bias=False)
        self.layouts = lru_cache(16)(layout)  # few, so that ragged prompts can't fill memory
        # by branch: prompt (the object itself: an id can be given away again), grids and the like, what is kept
        self.prefixes: dict[str, tuple[Tensor, object, Kept]] | None = None  # None: nothing is

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
        places: Sequence[int] = (),
        steer: Companion | None = None,
    ) -> Tensor:
        """latents (B, N + R, in_channels): the target, then reference pictures, in the order of `grids`; timestep (B,)
        in [0, 1]; prompt_embeds (B, T, context_in_dim) without the slots of pictures, padded on the right; prompt_mask
        (B, T) bool or None when nothing is padded; places: how many prompt tokens stand before each reference picture,
        the same in all rows, none of which may end before the last place; steer: what ControlNets do. Returns
        (B, N, out_channels). Raises ValueError for control residuals, and where grids, places and tokens don't fit
        together."""
        if control:
            raise ValueError("control residuals are not supported: ControlNets for Qwen-Image-2.1 compute beside it")
        sequence, text = (tuple(grids), tuple(places)), prompt_embeds.shape[1]
        check(latents.shape[1], target_tokens, *sequence, text)
        place = self.layouts(self.config.axes_dims_rope, *sequence, text, latents.device)
        img = self.img_in(latents[:, :target_tokens])  # (B, N, D)
        times = timestep.to(img.dtype)
        temb = self.time_text_embed(torch.cat([times, times.new_zeros(1)]), img.dtype)  # (B + 1, D), t = 0 behind
        rows = self.modulation(temb)[:, None]  # (B + 1, 1, 4D)
        kept = self.kept(branch, prompt_embeds, (*sequence, len(img), steer and steer.prefix))
        done = kept is not None and len(kept) == len(self.transformer_blocks) + (steer.blocks if steer else 0)
        txt = None if done else self.prefix(prompt_embeds, latents[:, target_tokens:], place)
        mask = None if prompt_mask is None else seen(prompt_mask.bool(), place)
        if prompt_mask is not None:
            place = behind_words(place, prompt_mask.bool(), self.config.axes_dims_rope[0])
        beside = steer.begin() if steer else None
        ctx = Context(rows[:-1], rows[-1:], target_tokens, place, mask, kept, branch=branch, beside=beside)
        img, _ = self.transformer_blocks(img, txt, ctx)
        scale = self.norm_out["linear"](F.silu(temb[:-1]))[:, None]  # (B, 1, D)
        return self.proj_out(scaled(img, scale, self.config.eps))

    def prefix(self, prompt_embeds: Tensor, references: Tensor, place: Layout) -> Tensor:
        """Text (B, T, context_in_dim) and reference pictures (B, R, in_channels) in their order: (B, P, D)."""
        text = self.txt_in(prompt_embeds)
        return torch.cat([text, self.img_in(references)], 1)[:, place.order] if references.shape[1] else text

    def kept(self, branch: str, prompt: Tensor, given: object) -> Kept | None:
        """What a branch keeps for this prompt; empty where it begins, None where nothing is kept."""
        if self.prefixes is None:
            return None
        found = self.prefixes.get(branch)
        if found is None or found[0] is not prompt or found[1] != given:
            found = self.prefixes[branch] = (prompt, given, {})
        return found[2]


@contextmanager
def keep_prefix(transformer: QwenImage21Transformer) -> Iterator[None]:
    """Inside, every branch computes its prefix once and keeps its keys and values: 2 P D numbers a layer and row.
    The results are those without it, bit for bit. For one drawing: a branch begins anew with another prompt tensor,
    other grids, places or number of rows, but nobody notices if the reference pictures' latents become others.
    Nothing is kept afterwards."""
    before, transformer.prefixes = transformer.prefixes, {}
    try:
        yield
    finally:
        transformer.prefixes = before
