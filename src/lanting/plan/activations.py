"""Peak bytes of what the networks compute, beside their weights: tensors counted along the code's own lifetime of them.

Each formula is the sum of what is alive at the few places where a network's memory can peak; tests run the real
networks on meta tensors, count what is alive, and compare. Scratch memory inside operations is not in the formulas but
in `overhead` (measured, benchmarks/plan_grid.py).
Rejected: one factor times the number of pixels, which is off by two for references and small pictures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lanting.plan.geometry import Geometry, Transformer, Vae, Vision
from lanting.plan.kinds import Kind
from lanting.plan.sizes import Sizes

TILE, STRIDE = 256, 192  # pixels, those of lanting.nn.vae
TOKEN = 16  # pixels per side of a token
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
RUN = 1 << 19  # weights of a GGUF block type that a CPU expands at a time, lanting.nn.dequant's
Size = tuple[int, int]  # width, height in pixels


@dataclass(frozen=True, slots=True)
class Job:
    """What is to be drawn, as far as it costs memory and time.

    size        of a picture, pixels
    references  sizes at which the VAE sees input pictures that stay beside the target (edits, layers)
    seen        sizes at which the text encoder sees pictures
    encoded     sizes of all pictures that the VAE encodes, references included
    batch       pictures drawn together; frames: pictures per picture of the batch (layers)
    prompts     different prompts; text: tokens of the longest, its closing words included; opening: of the template
    guided      two predictions per step; joined: both at once
    """

    size: Size = (1024, 1024)
    references: tuple[Size, ...] = ()
    seen: tuple[Size, ...] = ()
    encoded: tuple[Size, ...] = ()
    batch: int = 1
    frames: int = 1
    prompts: int = 1
    text: int = 517
    opening: int = 34
    steps: int = 50
    guided: bool = True
    joined: bool = False

    @property
    def target_tokens(self) -> int:
        return self.frames * tokens(self.size)

    @property
    def picture_tokens(self) -> int:
        """Target and references."""
        return self.target_tokens + sum(tokens(size) for size in self.references)

    @property
    def text_tokens(self) -> int:
        """What the transformer sees: prompt and pictures."""
        return self.text + sum(cells(size) for size in self.seen)

    @property
    def branches(self) -> int:
        return 2 if self.guided else 1


def tokens(size: Size) -> int:
    """Of the transformer, for a picture."""
    return (size[0] // TOKEN) * (size[1] // TOKEN)


def patches(size: Size) -> int:
    """Of 14 pixels, for a picture that is brought to multiples of 28."""
    return 4 * cells(size)


def cells(size: Size) -> int:
    """Tokens a picture takes among the text encoder's."""
    return max(round(size[0] / 28), 1) * max(round(size[1] / 28), 1)


def expanding(weights: int, kind: Kind, width: int, on_cpu: bool) -> int:
    """Bytes alive while a packed weight is expanded: the result, and what making it needs beside."""
    if not kind.packed:
        return 0
    if on_cpu and kind.in_runs:
        return weights * width + min(weights, RUN) * 16
    return int(weights * (width + (kind.scratch if on_cpu else min(kind.scratch, 2))))


def transformer_peak(
    net: Transformer, sizes: Sizes, kind: Kind, job: Job, dtype: str, on_cpu: bool, table: bool
) -> int:
    """One step. N picture tokens and T text tokens of D numbers; S = N + T.

    Three places compete: the feed-forward of the pictures, the rotation of the keys, and the expansion of a packed
    weight. Five tensors of S are alive throughout a block: the stack's first input, the block's, the streams between
    its halves, and the inputs and results of attention.
    """
    width = BYTES[dtype]
    unit = net.width * width * job.batch * (2 if job.joined else 1)
    pictures, text = job.picture_tokens, job.text_tokens
    every = pictures + text
    modulated = 6 * pictures if net.zero_cond_t else 0  # a row per token instead of one for all
    rotation = (13 if width == 2 else 9.5) * every + modulated
    feeding = 14 * pictures + 5 * text + modulated
    text_feeding = 5 * pictures + 14 * text + modulated
    peak = int(max(rotation, feeding, text_feeding) * unit)
    if kind.packed:
        after = sizes.linear * width  # the expanded weight
        up = (5 * every + pictures + modulated) * unit
        peak = max(peak, int(up + max(expanding(sizes.linear, kind, width, on_cpu), after + 4 * pictures * unit)))
        peak = max(peak, int(up + 4 * pictures * unit + expanding(sizes.linear, kind, width, on_cpu)))
        if not table:
            peak = max(peak, int(2 * every * unit + expanding(sizes.mod_linear, kind, width, on_cpu)))
    latents = job.batch * pictures * net.in_channels * (4 + 4 * width)
    states = job.batch * job.branches * text * net.joint_attention_dim * width
    rope = every * net.attention_head_dim * 4 * job.branches
    return peak + latents + states + rope


def decoding_peak(net: Vae, job: Job, dtype: str, tile: int) -> int:
    """The last level's second norm: input, skip, float32 copies. One picture at a time, or one tile."""
    per = net.base_dim * (16 if BYTES[dtype] == 2 else 20)
    pixels = job.size[0] * job.size[1]
    count = job.batch * max(job.frames - 1, 1)
    held = count * pixels * 12  # finished pictures, float32
    finishing = 4 * held
    if tile and max(job.size) > tile:
        rows = 2 * tile * job.size[0] * tile // STRIDE * 3 * 4
        return max(per * tile * tile + rows + 2 * pixels * 3 * BYTES[dtype] + held, finishing)
    return max(per * pixels + held, finishing)


def encoding_peak(net: Vae, sizes: Sequence[Size], dtype: str, tile: int) -> int:
    """Pictures to latents, one at a time."""
    per = net.base_dim * (14 if BYTES[dtype] == 2 else 16)
    areas = (tile * tile if tile and max(size) > tile else size[0] * size[1] for size in sizes)
    return max((per * area for area in areas), default=0) + sum(36 * w * h for w, h in sizes)


def reader_peak(geometry: Geometry, job: Job, kind: Kind, dtype: str, on_cpu: bool) -> int:
    """The text encoder: a layer's feed-forward, keys and values of all layers, or the eye's."""
    language, width = geometry.language, BYTES[dtype]
    length = job.opening + job.text_tokens
    rows = job.prompts * length
    layer = rows * (5 * language.hidden_size + 3 * language.intermediate_size) * width + 8 * language.head_dim * length
    kept = rows * 2 * language.num_hidden_layers * language.num_key_value_heads * language.head_dim * width
    expanded = expanding(language.hidden_size * language.intermediate_size, kind, width, on_cpu)
    return max(layer + kept + expanded, vision_peak(geometry.vision, job.seen, width))


def vision_peak(net: Vision, seen: Sequence[Size], width: int) -> int:
    """All pictures go through the eye together."""
    feeding = 3 * (net.intermediate_size + net.hidden_size) * width
    rotating = 28 * net.hidden_size if width == 2 else 0
    pixels = 2 * net.in_channels * net.temporal_patch_size * net.patch_size**2 * 4
    return sum(patches(size) for size in seen) * (max(feeding, rotating) + 1000 + pixels)


def table_bytes(net: Transformer, job: Job, dtype: str) -> int:
    """The modulation's results for every step of the schedule."""
    rows = job.steps + (1 if net.zero_cond_t else 0)
    return rows * net.num_layers * 12 * net.width * BYTES[dtype]


def work(net: Transformer, job: Job) -> float:
    """Floating point operations of one prediction for the whole batch: Linears and attention."""
    every = job.picture_tokens + job.text_tokens
    linears = 2 * 12 * net.width**2 * every
    attention = 4 * every**2 * net.width
    return float(job.batch * net.num_layers * (linears + attention))


def decoding_work(net: Vae, job: Job) -> float:
    """Of the decoder: 4.5 MFLOP per pixel in the published one, as its convolutions count."""
    return job.batch * job.size[0] * job.size[1] * 4.5e6 * (net.base_dim / 96) ** 2
