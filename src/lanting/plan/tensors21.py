"""Every tensor of Qwen-Image-2.1's networks by its official name: one stream, an RGBA autoencoder, Qwen3-VL."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

from lanting.plan.geometry import Language3, SingleStream, Vae21, Vision3
from lanting.plan.tensors import Tensor, conv, linear, middle, residual

FLAT = (3, 3)  # a kernel


def transformer_tensors(net: SingleStream) -> Iterator[Tensor]:
    """There are no biases."""
    width, patch = net.width, net.patch_size**2
    yield from linear("img_in", net.in_channels * patch, width, bias=False)
    yield "txt_in.text_norm.weight", (net.context_in_dim,)
    for name, inner in (("in_layer", net.context_in_dim), ("out_layer", width)):
        yield from linear(f"txt_in.{name}", inner, width, bias=False)
    for name, inner in (("linear_1", 256), ("linear_2", width)):
        yield from linear(f"time_text_embed.timestep_embedder.{name}", inner, width, bias=False)
    yield from linear("modulation.1", width, 4 * width, bias=False)
    yield from linear("norm_out.linear", width, width, bias=False)
    yield from linear("proj_out", width, net.out_channels * patch, bias=False)
    for index in range(net.num_layers):
        for name, shape in block_tensors(net):
            yield f"transformer_blocks.{index}.{name}", shape


def block_tensors(net: SingleStream) -> Iterator[Tensor]:
    """Those of one block."""
    width, inner = net.width, net.mlp_ratio * net.width
    for name in ("to_q", "to_k", "to_v", "to_out.0"):
        yield from linear(f"attn.{name}", width, width, bias=False)
    for name in ("norm_q", "norm_k"):
        yield f"attn.{name}.weight", (net.attention_head_dim,)
    for name in ("proj", "gate_layer"):
        yield from linear(f"img_mlp.{name}", width, inner, bias=False)
    yield from linear("img_mlp.out", inner, width, bias=False)


def language_tensors(net: Language3, head: bool) -> Iterator[Tensor]:
    """The reader's language model; `head`: with the matrix that writes words."""
    width, queries, keys = (
        net.hidden_size,
        net.num_attention_heads * net.head_dim,
        net.num_key_value_heads * net.head_dim,
    )
    yield "model.embed_tokens.weight", (net.vocab_size, width)
    for index in range(net.num_hidden_layers):
        layer = f"model.layers.{index}"
        for name, inner, outer in (
            ("self_attn.q_proj", width, queries),
            ("self_attn.k_proj", width, keys),
            ("self_attn.v_proj", width, keys),
            ("self_attn.o_proj", queries, width),
            ("mlp.gate_proj", width, net.intermediate_size),
            ("mlp.up_proj", width, net.intermediate_size),
            ("mlp.down_proj", net.intermediate_size, width),
        ):
            yield from linear(f"{layer}.{name}", inner, outer, bias=False)
        for name in ("q_norm", "k_norm"):
            yield f"{layer}.self_attn.{name}.weight", (net.head_dim,)
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield f"{layer}.{name}.weight", (width,)
    yield "model.norm.weight", (width,)
    if head:
        yield "lm_head.weight", (net.vocab_size, width)


def vision_tensors(net: Vision3) -> Iterator[Tensor]:
    """The reader's eye."""
    width, merged = net.hidden_size, net.hidden_size * net.spatial_merge_size**2
    yield from conv("visual.patch_embed.proj", net.in_channels, width, net.temporal_patch_size, *[net.patch_size] * 2)
    yield "visual.pos_embed.weight", (net.num_position_embeddings, width)
    for index in range(net.depth):
        block = f"visual.blocks.{index}"
        yield from norm(f"{block}.norm1", width)
        yield from norm(f"{block}.norm2", width)
        yield from linear(f"{block}.attn.qkv", width, 3 * width)
        yield from linear(f"{block}.attn.proj", width, width)
        yield from linear(f"{block}.mlp.linear_fc1", width, net.intermediate_size)
        yield from linear(f"{block}.mlp.linear_fc2", net.intermediate_size, width)
    deep = [f"visual.deepstack_merger_list.{index}" for index in range(len(net.deepstack_visual_indexes))]
    for merger in ("visual.merger", *deep):
        yield from norm(f"{merger}.norm", merged if merger in deep else width)
        yield from linear(f"{merger}.linear_fc1", merged, merged)
        yield from linear(f"{merger}.linear_fc2", merged, net.out_hidden_size)


def norm(name: str, width: int) -> Iterator[Tensor]:
    yield f"{name}.weight", (width,)
    yield f"{name}.bias", (width,)


def vae_tensors(net: Vae21) -> Iterator[Tensor]:
    """As it is published, with the convolutions over time that no single picture meets."""
    widths = [net.base_dim * m for m in (1, *net.dim_mult)]
    yield from conv("encoder.conv_in", net.in_channels, widths[0], *FLAT)
    for level, (inner, outer) in enumerate(pairwise(widths)):
        block = f"encoder.down_blocks.{level}"
        yield from level_tensors(f"{block}.resnets", inner, outer, net.num_res_blocks)
        if level < len(net.temperal_downsample):
            yield from sampler(f"{block}.downsampler", outer, outer if net.temperal_downsample[level] else 0)
    yield from middle("encoder.mid_block", widths[-1], FLAT)
    yield "encoder.norm_out.gamma", (widths[-1], 1, 1, 1)
    yield from conv("encoder.conv_out", widths[-1], 2 * net.z_dim, *FLAT)
    yield from conv("quant_conv", 2 * net.z_dim, 2 * net.z_dim, 1, 1)
    yield from conv("post_quant_conv", net.z_dim, net.z_dim, 1, 1)
    widths = [net.decoder_width * m for m in (*net.dim_mult, net.dim_mult[-1])][::-1]
    timed = net.temperal_downsample[::-1]
    yield from conv("decoder.conv_in", net.z_dim, widths[0], *FLAT)
    yield from middle("decoder.mid_block", widths[0], FLAT)
    for level, (inner, outer) in enumerate(pairwise(widths)):
        block = f"decoder.up_blocks.{level}"
        yield from level_tensors(f"{block}.resnets", inner, outer, net.num_res_blocks + 1)
        if level < len(timed):
            yield from sampler(f"{block}.upsampler", outer, 2 * outer if timed[level] else 0)
    yield "decoder.norm_out.gamma", (widths[-1], 1, 1, 1)
    yield from conv("decoder.conv_out", widths[-1], net.out_channels, *FLAT)


def level_tensors(name: str, inner: int, outer: int, blocks: int) -> Iterator[Tensor]:
    """The residual blocks of a level."""
    for index in range(blocks):
        yield from residual(f"{name}.{index}", outer if index else inner, outer, FLAT)


def sampler(name: str, width: int, frames: int) -> Iterator[Tensor]:
    """Halves or doubles both sides; `frames`: channels out of its convolution over time, 0 where it has none."""
    yield from conv(f"{name}.resample.1", width, width, *FLAT)
    if frames:
        yield from conv(f"{name}.time_conv", width, frames, 1, 1)
