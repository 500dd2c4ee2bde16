"""What Qwen-Image-2.1's networks compute, in bytes and operations; see `activations` for how such formulas are made.

The prefix (words and references) is computed in a drawing's first step, and its keys and values stay to the end, for
both sides of the guidance. So the first step is the largest, and every other one works on the target alone. Where
there is no room for that (`Job.kept`), every step computes the prefix again.
"""

from __future__ import annotations

import math
from functools import cache

from lanting.plan.geometry import Language3, SingleStream, Vae21, Vision3
from lanting.plan.job import Job
from lanting.plan.kinds import BYTES, Kind, expanding
from lanting.plan.sizes import Sizes
from lanting.plan.tensors21 import vae_tensors


def transformer_peak(net: SingleStream, sizes: Sizes, kind: Kind, job: Job, dtype: str, on_cpu: bool) -> int:
    """The largest step. N target tokens and P of the prefix, of D numbers.

    Three places compete: the rotation of the target's queries, its feed-forward, and the prefix's. The last block has
    no such feed-forward; where keys and values are kept, the target's places are the largest there, else before it.
    Alive throughout a block are the stack's first input and the block's; the target waits while the prefix is computed.
    """
    width = BYTES[dtype]
    rows = job.batch * (2 if job.joined else 1)
    unit = net.width * width * rows
    target, prefix = job.target_tokens, job.prefix_tokens
    kept = kept_bytes(net, job, dtype)
    before = max(kept - 2 * prefix * unit, 0)  # all but the last block's
    up = kept + (5 * target + (3 if kept else 4) * prefix) * unit
    prefix_up = before + (2 * target + 6 * prefix) * unit  # the target waits
    feeding, prefix_feeding = up + 9 * target * unit, prefix_up + 9 * prefix * unit
    rotating = kept + (14 * target + (4 if kept else 6) * prefix) * unit if width == 2 else 0
    peak = max(feeding, prefix_feeding, rotating)
    if kind.packed:
        expanded, after = expanding(sizes.linear, kind, width, on_cpu), sizes.linear * width
        for held, tokens in ((up, target), (prefix_up, prefix)):
            inner = net.mlp_ratio * tokens * unit  # one half of the gated pair is there while the other is made
            peak = max(peak, held + inner + max(expanded, after + inner))
    every = target + prefix
    latents = job.batch * job.picture_tokens * net.in_channels * (4 + 4 * width)
    states = job.batch * job.branches * job.text_tokens * net.context_in_dim * width
    places = job.branches * (every * net.attention_head_dim * 4 + job.text_tokens * prefix)  # rotations; words' masks
    return peak + latents + states + places


def kept_bytes(net: SingleStream, job: Job, dtype: str) -> int:
    """Keys and values of the prefix, in all layers."""
    if not job.kept:
        return 0
    return 2 * net.num_layers * net.width * job.prefix_tokens * BYTES[dtype] * job.branches * job.batch


def prefix_work(net: SingleStream, job: Job) -> float:
    """Floating point operations of computing the prefix once, for the whole batch and one side of the guidance."""
    rows = job.prefix_tokens
    return float(job.batch * net.num_layers * (2 * net.met * rows + 2 * rows**2 * net.width))  # half of all pairs


def beside_layer(language: Language3, eye: Vision3, job: Job, width: int) -> int:
    """What is alive beside a layer of the reader: keys and values of two layers, for no cache is kept; and where
    pictures are read, their features, spread over the text once for the words and once for every deep layer."""
    rows, seen = job.prompts * job.read_tokens, job.seen_tokens
    held = rows * 4 * language.num_key_value_heads * language.head_dim * width
    if not seen:
        return held
    deep = len(eye.deepstack_visual_indexes)
    return held + ((2 + deep) * rows + (1 + deep) * seen) * language.hidden_size * width + patches(job) * pixels(eye)


def vision_peak(net: Vision3, job: Job, width: int) -> int:
    """All pictures go through the eye together: a block's feed-forward, or its rotation in float32; and the features
    for the deep layers, which wait."""
    head = net.hidden_size // net.num_heads
    feeding = (2 * net.intermediate_size + 3 * net.hidden_size) * width
    rotating = 28 * net.hidden_size if width == 2 else 0
    deep = len(net.deepstack_visual_indexes) * net.out_hidden_size * width // 4
    return patches(job) * (max(feeding, rotating) + 12 * head + deep + pixels(net))


def patches(job: Job) -> int:
    """Of all pictures that are read; four make a cell."""
    return 4 * job.seen_tokens


def pixels(net: Vision3) -> int:
    """Bytes of a patch's pixels: float32, those of a picture and those of all."""
    return 2 * net.in_channels * net.temporal_patch_size * net.patch_size**2 * 4


@cache
def laid_bytes(net: Vae21, encodes: bool) -> int:
    """Copies of the autoencoder's convolutions that a CPU's kernels keep where memory is plenty: 16 numbers for every 9
    of a weight, 9 where a picture is doubled, float32 at most; the encoder's only where pictures are encoded."""
    total = 0
    for name, shape in vae_tensors(net):
        plain = name.endswith("conv_in.weight") or ".downsampler." in name or shape[2:] != (3, 3)
        if not plain and (encodes or not name.startswith("encoder.")):
            total += math.prod(shape[:2]) * (9 if ".upsampler." in name else 16) * 4
    return total
