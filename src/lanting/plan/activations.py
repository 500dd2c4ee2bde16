"""Peak bytes of what the networks compute, beside their weights: tensors counted along the code's own lifetime of them.

Each formula is the sum of what is alive at the few places where a network's memory can peak; tests run the real
networks on meta tensors, count what is alive, and compare. Scratch memory inside operations is not in the formulas but
in `overhead` (measured, benchmarks/plan_grid.py).
Rejected: one factor times the number of pixels, which is off by two for references and small pictures.
"""

from __future__ import annotations

from collections.abc import Sequence

import lanting.plan.activations21 as second
from lanting.plan.geometry import Body, Coder, Geometry, Language3, SingleStream, Vae, Vae21, Vision, Vision3
from lanting.plan.job import Job, Size, cells, tokens
from lanting.plan.kinds import BYTES, Kind, expanding
from lanting.plan.sizes import Sizes

__all__ = ["BYTES", "Job", "Size", "expanding", "tokens"]  # beside what is here
TILE, STRIDE = 256, 192  # pixels, those of lanting.nn.vae


def transformer_peak(net: Body, sizes: Sizes, kind: Kind, job: Job, dtype: str, on_cpu: bool, table: bool) -> int:
    """One step. N picture tokens and T text tokens of D numbers; S = N + T.

    Three places compete: the feed-forward of the pictures, the rotation of the keys, and the expansion of a packed
    weight. Five tensors of S are alive throughout a block: the stack's first input, the block's, the streams between
    its halves, and the inputs and results of attention.
    """
    if isinstance(net, SingleStream):
        return second.transformer_peak(net, sizes, kind, job, dtype, on_cpu)
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


def kept_bytes(net: Body, job: Job, dtype: str) -> int:
    """What a drawing keeps from its first step to its end: keys and values of a prefix."""
    return second.kept_bytes(net, job, dtype) if isinstance(net, SingleStream) else 0


def laid_bytes(net: Coder, encodes: bool) -> int:
    """Copies of convolutions that a CPU's kernels keep. The first VAE's (0.15 GB) are in what a program holds."""
    return second.laid_bytes(net, encodes) if isinstance(net, Vae21) else 0


def decoding_peak(net: Coder, job: Job, dtype: str, tile: int) -> int:
    """A norm of the last level: inputs, skip, float32 copies. One picture at a time, or one tile."""
    if isinstance(net, Vae):
        per, channels = net.base_dim * (16 if BYTES[dtype] == 2 else 20), 3
    else:
        per, channels = net.decoder_width * 24, net.out_channels
    pixels = job.size[0] * job.size[1]
    count = job.batch * max(job.frames - 1, 1)
    held = count * pixels * 4 * channels  # finished pictures, float32
    finishing = 4 * held
    if tile and max(job.size) > tile:
        rows = 2 * tile * job.size[0] * tile // STRIDE * channels * 4
        return max(per * tile * tile + rows + 2 * pixels * channels * BYTES[dtype] + held, finishing)
    return max(per * pixels + held, finishing)


def encoding_peak(net: Coder, sizes: Sequence[Size], dtype: str, tile: int) -> int:
    """Pictures to latents, one at a time."""
    if isinstance(net, Vae):
        per, pixel = net.base_dim * (14 if BYTES[dtype] == 2 else 16), 36
    else:
        per, pixel = net.base_dim * (16 if BYTES[dtype] == 2 else 20), 12 * net.in_channels
    areas = (tile * tile if tile and max(size) > tile else size[0] * size[1] for size in sizes)
    return max((per * area for area in areas), default=0) + sum(pixel * w * h for w, h in sizes)


def reader_peak(geometry: Geometry, job: Job, kind: Kind, dtype: str, on_cpu: bool) -> int:
    """The text encoder: a layer's feed-forward, keys and values of all layers, or the eye's."""
    language, eye, width = geometry.language, geometry.vision, BYTES[dtype]
    rows = max(job.prompts * job.read_tokens, job.written_tokens)
    layer = rows * (5 * language.hidden_size + 3 * language.intermediate_size) * width
    layer += 8 * language.head_dim * job.read_tokens
    expanded = expanding(language.hidden_size * language.intermediate_size, kind, width, on_cpu)
    if isinstance(language, Language3) and isinstance(eye, Vision3):
        beside = second.beside_layer(language, eye, job, width)
        return max(layer + beside + expanded, second.vision_peak(eye, job, width))
    assert isinstance(eye, Vision)
    kept = rows * 2 * language.num_hidden_layers * language.num_key_value_heads * language.head_dim * width
    return max(layer + kept + expanded, vision_peak(eye, job.seen, width))


def vision_peak(net: Vision, seen: Sequence[Size], width: int) -> int:
    """All pictures go through the eye together."""
    feeding = 3 * (net.intermediate_size + net.hidden_size) * width
    rotating = 28 * net.hidden_size if width == 2 else 0
    pixels = 2 * net.in_channels * net.temporal_patch_size * net.patch_size**2 * 4
    return sum(4 * cells(size) for size in seen) * (max(feeding, rotating) + 1000 + pixels)


def table_bytes(net: Body, job: Job, dtype: str) -> int:
    """The modulation's results for every step of the schedule; nothing, where there is no such table."""
    if isinstance(net, SingleStream):
        return 0
    rows = job.steps + (1 if net.zero_cond_t else 0)
    return rows * net.num_layers * 12 * net.width * BYTES[dtype]


def work(net: Body, job: Job) -> float:
    """Floating point operations of one prediction for the whole batch: Linears and attention. Where a prefix is kept,
    of every prediction but the first."""
    every = job.picture_tokens + job.text_tokens
    rows = job.target_tokens if isinstance(net, SingleStream) else every
    operations = float(job.batch * net.num_layers * (2 * net.met * rows + 4 * rows * every * net.width))
    return operations if job.kept or not isinstance(net, SingleStream) else operations + second.prefix_work(net, job)


def first_work(net: Body, job: Job) -> float:
    """Of what the first prediction does beside: the prefix."""
    return second.prefix_work(net, job) if job.kept and isinstance(net, SingleStream) else 0.0


def decoding_work(net: Coder, job: Job) -> float:
    """Of the decoder: 4.5 MFLOP per pixel in the first published one and 16.2 in Qwen-Image-2.1's, as their
    convolutions count."""
    share = 4.5e6 * (net.base_dim / 96) ** 2 if isinstance(net, Vae) else 16.2e6 * (net.decoder_width / 144) ** 2
    return job.batch * job.size[0] * job.size[1] * share
