"""nano's networks as they are trained: reader, transformer and two helper heads that are thrown away afterwards.

What makes a tiny network spell within hours is the start and the help:
- modulation begins at zero with gates slightly open, the output layer at zero: the first prediction is "no change";
- the embedding of a character begins as a code of its own picture (see `codes`), so that drawing it is a map shared
  by all characters, not one to be learnt for each;
- a head on the text stream says where each quoted character stands, one on the picture stream says what stands on
  each token. Both teach the routing from text to place, which otherwise takes most of the time;
- the same head says, half way, what stands on each token of a picture that is to be edited: to put words elsewhere, or
  in another face, the network must have read them before it draws. Left alone it reads half of them, and too late;
- a third draws each token's shapes in black and white, so that strokes are learnt apart from colour and noise;
- two more draw the character of a text token, behind the reader and a third of the way through the transformer. Without
  them the code of a character does not survive that far (docs/LOG.md), and drawing it stays a feat of memory;
- the last two draw a pictogram, small and in colours, at the token that ends its name, in the same two places.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lanting.nn.mmdit import Attend, Context, GeluProjection, QwenImageTransformer, Stack, TransformerConfig
from lanting.nn.qwen_language import Attend as CausalAttend
from lanting.nn.qwen_language import LanguageConfig, QwenLanguageModel, expand_cache, initialize
from lanting.nn.qwen_vision import QwenVision, VisionConfig
from lanting.nn.rope import Grid
from lanting.nn.swap import swap
from lanting.train.draw import INK
from lanting.train.labels import SCENE, SHAPE, WHAT, WHERE
from lanting.train.replay import Batch


def transformer_config(width: int = 128, layers: int = 6) -> TransformerConfig:
    """Heads of 32, as many as the width asks for."""
    return TransformerConfig(
        num_layers=layers,
        num_attention_heads=width // 32,
        attention_head_dim=32,
        joint_attention_dim=128,
        axes_dims_rope=(4, 14, 14),
    )


def language_config(vocabulary: int = 1024) -> LanguageConfig:
    return LanguageConfig(
        vocab_size=vocabulary,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        rope_theta=10000.0,
        mrope_section=(8, 12, 12),
        tie_word_embeddings=True,
    )


def vision_config() -> VisionConfig:
    return VisionConfig(
        depth=2,
        hidden_size=64,
        intermediate_size=128,
        num_heads=2,
        out_hidden_size=128,
        fullatt_block_indexes=(1,),
    )


@dataclass(frozen=True)
class NanoConfig:
    """Everything that decides what is trained; saved in every checkpoint."""

    transformer: TransformerConfig = field(default_factory=transformer_config)
    language: LanguageConfig = field(default_factory=language_config)
    vision: VisionConfig = field(default_factory=vision_config)

    def to_dict(self) -> dict[str, Any]:
        return {
            "transformer": asdict(self.transformer),
            "language": {k: getattr(self.language, k) for k in LanguageConfig.__slots__},
            "vision": {k: getattr(self.vision, k) for k in VisionConfig.__slots__},
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> NanoConfig:
        return cls(
            TransformerConfig.from_dict(values["transformer"]),
            LanguageConfig(**{k: _tuple(v) for k, v in values["language"].items()}),
            VisionConfig(**{k: _tuple(v) for k, v in values["vision"].items()}),
        )


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


class PlainAttend(Attend):
    """Joint attention by two batched products: on a CPU, in bfloat16, at a few hundred tokens, the backward pass
    of the fused kernel is several times slower than this. In float32 the fused kernel is the faster one."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        if v.dtype == torch.float32:
            return super().forward(q, k, v, mask)
        batch, tokens, heads, dim = q.shape
        q, k, v = (x.transpose(1, 2).reshape(batch * heads, tokens, dim).to(v.dtype) for x in (q, k, v))
        scores = torch.bmm(q * dim**-0.5, k.mT)  # (B H, T + N, T + N)
        if mask is not None:
            hidden = F.pad(~mask, (0, tokens - mask.shape[1]))[:, None, None]  # (B, 1, 1, T + N)
            hidden = hidden.expand(-1, heads, 1, -1).reshape(batch * heads, 1, tokens)
            scores = scores.masked_fill(hidden, -30000.0)
        out = torch.bmm(scores.softmax(-1).to(v.dtype), v)
        return out.view(batch, heads, tokens, dim).transpose(1, 2)


class PlainCausalAttend(CausalAttend):
    """The same for the reader: the queries are the last T of S keys."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        queries, keys = q.shape[2], k.shape[2]
        scores = (q * q.shape[-1] ** -0.5) @ k.mT  # (B, H, T, S)
        ahead = torch.ones(queries, keys, dtype=torch.bool, device=q.device).triu(keys - queries + 1)
        return scores.masked_fill(ahead, -30000.0).softmax(-1).to(v.dtype) @ v


class SigmoidGelu(nn.Module):
    """The tanh approximation of GELU by its other name, x sigmoid(2u): faster where a compiler fuses it, and only
    there."""

    def __init__(self, proj: nn.Linear):
        super().__init__()
        self.proj = proj

    def forward(self, x: Tensor) -> Tensor:
        x = self.proj(x)
        return x * torch.sigmoid(x * (1.5957691216 + 0.0713548163 * x * x))


def plain_block(block: nn.Module, img: Tensor, txt: Tensor, ctx: Context) -> tuple[Tensor, Tensor]:
    return block(img, txt, ctx)


class WatchedStack(Stack):
    """The blocks in order, remembering both streams for the helper heads. `run` may be a compiled function."""

    run: Callable[[nn.Module, Tensor, Tensor, Context], tuple[Tensor, Tensor]] = staticmethod(plain_block)
    half: Tensor
    middle: Tensor
    text: Tensor

    def forward(self, img: Tensor, txt: Tensor, ctx: Context) -> tuple[Tensor, Tensor]:
        early, half, late = (max(0, len(self) * sixths // 6 - 1) for sixths in (2, 3, 4))
        for i, block in enumerate(self):
            img, txt = self.run(block, img, txt, ctx)
            if i == early:
                self.text = txt
            if i == half:
                self.half = img
            if i == late:
                self.middle = img
        return img, txt


class Head(nn.Module):
    """Several classifications of each token at once: a training aid only."""

    def __init__(self, width: int, classes: Sequence[int]):
        super().__init__()
        self.classes = tuple(classes)
        self.norm, self.out = nn.LayerNorm(width), nn.Linear(width, sum(classes))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.out(F.silu(self.norm(x))).split(self.classes, -1)  # each (B, n, classes)


class Probe(nn.Module):
    """Shapes of `count` squares off a stream, by one linear map: what the next layer can read too."""

    def __init__(self, width: int, count: int):
        super().__init__()
        self.norm, self.out = nn.LayerNorm(width), nn.Linear(width, count)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.norm(x))


@dataclass(frozen=True)
class Answers:
    """What the helper heads say: logits, and ink as a share of each square."""

    what: tuple[Tensor, ...]  # each (B, N, classes)
    where: tuple[Tensor, ...]  # each (B, T, classes)
    ink: Tensor  # (B, N, 64)
    read: Tensor  # (B, T, 256) shapes behind the reader
    text: Tensor  # (B, T, 256) shapes in the text stream
    scene: Tensor  # (B, T, 768) the pictogram named there, in colours, in the text stream
    named: Tensor  # (B, T, 768) the same behind the reader
    shown: tuple[Tensor, ...] = ()  # each (B, k N, classes), on the references of an edit


class NanoNet(nn.Module):
    """Reader (with its vision tower), transformer and helper heads as one trainable module."""

    def __init__(self, config: NanoConfig):
        super().__init__()
        self.config = config
        self.language = QwenLanguageModel(config.language)
        self.visual = QwenVision(config.vision)
        self.transformer = QwenImageTransformer(config.transformer)
        width = config.transformer.width
        self.what, self.where = Head(width, WHAT), Head(width, WHERE)
        self.ink, self.drawn = Probe(width, INK * INK), Probe(width, SHAPE)
        self.read = Probe(config.language.hidden_size, SHAPE)
        self.scene, self.named = Probe(width, SCENE), Probe(config.language.hidden_size, SCENE)
        self.transformer.transformer_blocks = WatchedStack(self.transformer.transformer_blocks)
        swap(self, Attend, lambda path, old: PlainAttend())
        swap(self, CausalAttend, lambda path, old: PlainCausalAttend())

    @property
    def stack(self) -> WatchedStack:
        blocks = self.transformer.transformer_blocks
        assert isinstance(blocks, WatchedStack)
        return blocks

    def embed(self, prefix: Tensor, batch: Batch) -> Tensor:
        """States (B, T, D) behind the constant prefix (1, P), which is run once for all rows."""
        _, cache = self.language(prefix)
        cache = expand_cache(cache, batch.ids.shape[0])
        if batch.patches is None:
            return self.language(batch.ids, cache=cache)[0]
        embeds = self.language.embed_tokens(batch.ids)
        count = batch.patches.shape[0] * batch.patches.shape[1]
        seen = self.visual(batch.patches.flatten(0, 2), [batch.patch_grid] * count).to(embeds.dtype)
        embeds = embeds.masked_scatter((batch.ids == batch.image_token)[..., None], seen)
        return self.language(embeds, batch.positions, cache=cache)[0]

    def forward(self, x: Tensor, t: Tensor, prefix: Tensor, batch: Batch) -> tuple[Tensor, Answers]:
        """Velocity (B, N, C) of noisy targets x (B, N, C) at times t (B,), then what the helper heads answer."""
        states = self.embed(prefix, batch)
        tokens = x.shape[1]
        whole = x if batch.references is None else torch.cat([x, batch.references], 1)
        grids: list[Grid] = [batch.grid] * (whole.shape[1] // tokens)
        velocity = self.transformer(whole, t, states, batch.mask, grids, tokens)[:, :tokens]
        middle, text = self.stack.middle[:, :tokens], self.stack.text
        said = Answers(
            self.what(middle),
            self.where(text),
            self.ink(middle),
            self.read(states),
            self.drawn(text),
            self.scene(text),
            self.named(states),
            () if batch.references is None else self.what(self.stack.half[:, tokens:]),
        )
        return velocity, said


def compile_blocks(net: NanoNet) -> None:
    """Compile the blocks, one graph for all of them and for all sizes: minutes of work that long runs win back."""
    swap(net, GeluProjection, lambda path, old: SigmoidGelu(cast(nn.Linear, old.proj)))
    WatchedStack.run = staticmethod(torch.compile(plain_block, dynamic=True))


@torch.no_grad()
def start(net: NanoNet) -> NanoNet:
    """Fresh weights; see the module docstring."""
    initialize(net.language, std=0.05)
    initialize(net.visual, std=0.05)
    transformer, width = net.transformer, net.config.transformer.width
    for name, p in transformer.named_parameters():
        if p.ndim == 2:
            p.normal_(0, 1 / math.sqrt(p.shape[1]))
        elif name.endswith("bias"):
            p.zero_()
    for block in net.stack:
        for modulation in (block.get_submodule("img_mod.1"), block.get_submodule("txt_mod.1")):
            assert isinstance(modulation, nn.Linear)
            modulation.weight.zero_()
            modulation.bias.zero_()
            modulation.bias[2 * width : 3 * width] = 0.2
            modulation.bias[5 * width :] = 0.2
    for last in (transformer.norm_out["linear"], transformer.proj_out):
        assert isinstance(last, nn.Linear)
        last.weight.zero_()
        last.bias.zero_()
    return net


def matrices(net: NanoNet) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """(for Muon, for AdamW): Linears inside the layers but modulation go to Muon, everything else to AdamW."""
    inside = ("transformer_blocks", "language.layers", "visual.blocks")
    named = list(net.named_parameters())
    muon = [p for n, p in named if p.ndim == 2 and any(part in n for part in inside) and "_mod" not in n]
    chosen = {id(p) for p in muon}
    return muon, [p for _, p in named if id(p) not in chosen]
