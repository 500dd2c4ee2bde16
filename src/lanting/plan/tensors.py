"""Every tensor of the family's networks by its official name, as far as it follows from a few numbers.

Those of Qwen-Image-2.1 are in `tensors21`.
"""

from __future__ import annotations

from collections.abc import Iterator

from lanting.plan.geometry import Language, Transformer, Vae, Vision

Tensor = tuple[str, tuple[int, ...]]  # name, shape
VIDEO = (3, 3, 3)  # a kernel of the first autoencoder: frames, rows, columns


def linear(name: str, inner: int, outer: int, bias: bool = True) -> Iterator[Tensor]:
    yield f"{name}.weight", (outer, inner)
    if bias:
        yield f"{name}.bias", (outer,)


def transformer_tensors(net: Transformer) -> Iterator[Tensor]:
    """Every tensor of the checkpoint, by its official name."""
    width = net.width
    yield from linear("img_in", net.in_channels, width)
    yield "txt_norm.weight", (net.joint_attention_dim,)
    yield from linear("txt_in", net.joint_attention_dim, width)
    for name, inner in (("linear_1", 256), ("linear_2", width)):
        yield from linear(f"time_text_embed.timestep_embedder.{name}", inner, width)
    if net.use_additional_t_cond:
        yield "time_text_embed.addition_t_embedding.weight", (2, width)
    yield from linear("norm_out.linear", width, 2 * width)
    yield from linear("proj_out", width, net.patch_size**2 * net.out_channels)
    for index in range(net.num_layers):
        for name, shape in block_tensors(net):
            yield f"transformer_blocks.{index}.{name}", shape


def block_tensors(net: Transformer) -> Iterator[Tensor]:
    """Those of one block."""
    width = net.width
    for stream in ("img", "txt"):
        yield from linear(f"{stream}_mod.1", width, 6 * width)
        yield from linear(f"{stream}_mlp.net.0.proj", width, 4 * width)
        yield from linear(f"{stream}_mlp.net.2", 4 * width, width)
    for name in ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "to_out.0", "to_add_out"):
        yield from linear(f"attn.{name}", width, width)
    for name in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
        yield f"attn.{name}.weight", (net.attention_head_dim,)


def language_tensors(net: Language, head: bool) -> Iterator[Tensor]:
    """The reader's language model; `head`: with the matrix that writes words."""
    width, keys = net.hidden_size, net.num_key_value_heads * net.head_dim
    yield "model.embed_tokens.weight", (net.vocab_size, width)
    for index in range(net.num_hidden_layers):
        layer = f"model.layers.{index}"
        yield from linear(f"{layer}.self_attn.q_proj", width, width)
        yield from linear(f"{layer}.self_attn.k_proj", width, keys)
        yield from linear(f"{layer}.self_attn.v_proj", width, keys)
        yield from linear(f"{layer}.self_attn.o_proj", width, width, bias=False)
        yield from linear(f"{layer}.mlp.gate_proj", width, net.intermediate_size, bias=False)
        yield from linear(f"{layer}.mlp.up_proj", width, net.intermediate_size, bias=False)
        yield from linear(f"{layer}.mlp.down_proj", net.intermediate_size, width, bias=False)
        yield f"{layer}.input_layernorm.weight", (width,)
        yield f"{layer}.post_attention_layernorm.weight", (width,)
    yield "model.norm.weight", (width,)
    if head:
        yield "lm_head.weight", (net.vocab_size, width)


def vision_tensors(net: Vision) -> Iterator[Tensor]:
    """The reader's eye."""
    width, merged = net.hidden_size, net.hidden_size * net.spatial_merge_size**2
    patch = (net.in_channels, net.temporal_patch_size, net.patch_size, net.patch_size)
    yield "visual.patch_embed.proj.weight", (width, *patch)
    for index in range(net.depth):
        block = f"visual.blocks.{index}"
        yield f"{block}.norm1.weight", (width,)
        yield f"{block}.norm2.weight", (width,)
        yield from linear(f"{block}.attn.qkv", width, 3 * width)
        yield from linear(f"{block}.attn.proj", width, width)
        yield from linear(f"{block}.mlp.gate_proj", width, net.intermediate_size)
        yield from linear(f"{block}.mlp.up_proj", width, net.intermediate_size)
        yield from linear(f"{block}.mlp.down_proj", net.intermediate_size, width)
    yield "visual.merger.ln_q.weight", (width,)
    yield from linear("visual.merger.mlp.0", merged, merged)
    yield from linear("visual.merger.mlp.2", merged, net.out_hidden_size)


def conv(name: str, inner: int, outer: int, *kernel: int) -> Iterator[Tensor]:
    yield f"{name}.weight", (outer, inner, *kernel)
    yield f"{name}.bias", (outer,)


def residual(name: str, inner: int, outer: int, kernel: tuple[int, ...] = VIDEO) -> Iterator[Tensor]:
    yield f"{name}.norm1.gamma", (inner, 1, 1, 1)
    yield from conv(f"{name}.conv1", inner, outer, *kernel)
    yield f"{name}.norm2.gamma", (outer, 1, 1, 1)
    yield from conv(f"{name}.conv2", outer, outer, *kernel)
    if inner != outer:
        yield from conv(f"{name}.conv_shortcut", inner, outer, *(1 for _ in kernel))


def middle(name: str, width: int, kernel: tuple[int, ...] = VIDEO) -> Iterator[Tensor]:
    """The block at the lowest resolution."""
    for index in (0, 1):
        yield from residual(f"{name}.resnets.{index}", width, width, kernel)
    yield f"{name}.attentions.0.norm.gamma", (width, 1, 1)
    yield from conv(f"{name}.attentions.0.to_qkv", width, 3 * width, 1, 1)
    yield from conv(f"{name}.attentions.0.proj", width, width, 1, 1)


def encoder_tensors(net: Vae) -> Iterator[Tensor]:
    """Pictures to latents; the flat list of blocks is the checkpoint's."""
    widths, width, place = [net.base_dim * m for m in net.dim_mult], net.base_dim, 0
    yield from conv("encoder.conv_in", net.input_channels, width, 3, 3, 3)
    for level, target in enumerate(widths):
        for _ in range(net.num_res_blocks):
            yield from residual(f"encoder.down_blocks.{place}", width, target)
            width, place = target, place + 1
        if level < len(widths) - 1:
            yield from conv(f"encoder.down_blocks.{place}.resample.1", width, width, 3, 3)
            if net.temperal_downsample[level]:
                yield from conv(f"encoder.down_blocks.{place}.time_conv", width, width, 3, 1, 1)
            place += 1
    yield from middle("encoder.mid_block", width)
    yield "encoder.norm_out.gamma", (width, 1, 1, 1)
    yield from conv("encoder.conv_out", width, 2 * net.z_dim, 3, 3, 3)
    yield from conv("quant_conv", 2 * net.z_dim, 2 * net.z_dim, 1, 1, 1)


def decoder_tensors(net: Vae) -> Iterator[Tensor]:
    """Latents to pictures."""
    widths = [net.base_dim * m for m in reversed(net.dim_mult)]
    timed, width = net.temperal_downsample[::-1], widths[0]
    yield from conv("post_quant_conv", net.z_dim, net.z_dim, 1, 1, 1)
    yield from conv("decoder.conv_in", net.z_dim, width, 3, 3, 3)
    yield from middle("decoder.mid_block", width)
    for level, target in enumerate(widths):
        block = f"decoder.up_blocks.{level}"
        for index in range(net.num_res_blocks + 1):
            yield from residual(f"{block}.resnets.{index}", target if index else width, target)
        if level < len(widths) - 1:
            yield from conv(f"{block}.upsamplers.0.resample.1", target, target // 2, 3, 3)
            if timed[level]:
                yield from conv(f"{block}.upsamplers.0.time_conv", target, 2 * target, 3, 1, 1)
        width = target // 2
    yield "decoder.norm_out.gamma", (widths[-1], 1, 1, 1)
    yield from conv("decoder.conv_out", widths[-1], net.input_channels, 3, 3, 3)


def vae_tensors(net: Vae) -> Iterator[Tensor]:
    yield from encoder_tensors(net)
    yield from decoder_tensors(net)
