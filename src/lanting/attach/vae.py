"""The autoencoder on a CPU through native kernels: what it draws stays, time and memory shrink.

Its time goes into 3x3 convolutions and, as torch does them, nearly as much into what lies between: norms and SiLU pass
a picture through memory a dozen times, doubling writes every pixel four times, sums copy. Here a convolution does all
of that on its way, with fewer than half the products (`csrc/vae.h`), adds its result to the picture where that lies,
and a level of the network needs two pictures of memory. Attention keeps no scores.

Weights and their names stay; a second copy of the convolutions' is made when they are first used. Where the processor
multiplies bfloat16 in tiles (AMX), torch's convolutions are faster than ours and do the work between our norms.
Rejected: bands of rows through the widest levels, which would halve the memory again and compute their margins twice.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lanting.kernels import calls
from lanting.kernels.conv import Laid, convolve, lay, padded
from lanting.kernels.library import dense_bytes, instruction_set, ready
from lanting.nn.vae import AutoencoderKLQwenImage, ChannelNorm, Decoder, Encoder, MidBlock, ResidualBlock
from lanting.nn.vae21 import AutoencoderKLQwenImage21

DTYPES = (torch.float32, torch.bfloat16)
ROWS = 1 << 14  # that are laid out in float32 at once


def attach_vae(vae: AutoencoderKLQwenImage, keep: bool = True) -> bool:
    """Let an autoencoder on the CPU use the kernels; False where there are none. Undone by `detach_vae`.

    keep  the copies of its convolutions that kernels read, 16 numbers for 9; else they are made anew for each picture
    """
    if not ready():
        return False
    for layer in vae.modules():
        layer.__dict__.pop("laid", None)
        layer.__dict__["passing"] = not keep
    if isinstance(vae, AutoencoderKLQwenImage21):
        from lanting.attach.vae21 import attach_vae21

        attach_vae21(vae)
        return True
    vae.encoder.__dict__["forward"] = partial(encode, vae.encoder)
    vae.decoder.__dict__["forward"] = partial(decode, vae.decoder)
    return True


def detach_vae(vae: AutoencoderKLQwenImage) -> None:
    """torch does all the work again."""
    for part in (vae.encoder, vae.decoder):
        part.__dict__.pop("forward", None)
        for layer in part.modules():
            layer.__dict__.pop("laid", None)
            layer.__dict__.pop("passing", None)


def encode(encoder: Encoder, x: Tensor) -> Tensor:
    """`Encoder.forward`."""
    if not known(encoder, x):
        return type(encoder).forward(encoder, x)
    x, level = last(encoder.conv_in(last(x))), []
    for block in encoder.down_blocks:
        if isinstance(block, ResidualBlock):
            level.append(block)
            continue
        x, level = block(residuals(level, x)), []
    x = middle(encoder.mid_block, residuals(level, x))
    return conv(encoder.conv_out, x, encoder.norm_out)


def decode(decoder: Decoder, z: Tensor) -> Tensor:
    """`Decoder.forward`."""
    if not known(decoder, z):
        return type(decoder).forward(decoder, z)
    x = middle(decoder.mid_block, last(decoder.conv_in(last(z))))
    block: Any
    for block in decoder.up_blocks:
        x = residuals(block.resnets, x)
        for doubling in block.upsamplers:
            x = conv(doubling.resample[1], x, grow=True)
    return conv(decoder.conv_out, x, decoder.norm_out)


def known(part: nn.Module, x: Tensor) -> bool:
    """Whether the kernels do what is asked; they know no gradients."""
    weight = next(part.parameters())
    graded = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    return x.device.type == "cpu" and x.dtype == weight.dtype and x.dtype in DTYPES and not graded


def last(x: Tensor) -> Tensor:
    """Channels last."""
    return x.contiguous(memory_format=torch.channels_last)


def middle(block: MidBlock, x: Tensor) -> Tensor:
    x = residuals(block.resnets[:1], x)
    return residuals(block.resnets[1:], attention(block.attentions[0], x))


def residuals(blocks: Iterable[Any], x: Tensor) -> Tensor:
    """`ResidualBlock`s of one level, one after the other. x is overwritten: two pictures are all that is held."""
    room = None
    for block in blocks:
        room = conv(block.conv1, x, block.norm1, out=room)
        x = pointwise(block.conv_shortcut, x)
        x = conv(block.conv2, room, block.norm2, add=x, out=x)
    return x


def attention(block: Any, x: Tensor) -> Tensor:
    """`AttentionBlock.forward`; in float32 torch's own is as fast."""
    channels = x.shape[1]
    if x.dtype != torch.bfloat16 or channels % 32 or channels > calls.WIDEST:
        return block(x)
    qkv = pointwise(block.to_qkv, calls.norm_silu(x, gamma_of(block.norm), silu=False))
    q, k, v = last(qkv).permute(0, 2, 3, 1).flatten(1, 2).unsqueeze(2).chunk(3, dim=-1)  # (B, h w, 1, C)
    y = calls.attend(q, k, v).view(x.shape[0], *x.shape[2:], channels).permute(0, 3, 1, 2)
    return pointwise(block.proj, y).add_(x)


def pointwise(layer: nn.Module, x: Tensor) -> Tensor:
    """A 1x1 convolution, or nothing; torch's but in bfloat16 on a processor that does not multiply that (`compute`)."""
    if not isinstance(layer, nn.Conv2d) or dense_bytes() != 4 or x.dtype != torch.bfloat16:
        return layer(x)
    weight, bias = calls.dense(layer.weight.flatten(1)), None if layer.bias is None else layer.bias.float()
    if weight is None:
        return layer(x)
    rows = last(x).permute(0, 2, 3, 1)  # (B, h, w, C)
    out = torch.empty(*rows.shape[:3], layer.out_channels, dtype=x.dtype)
    for part, to in zip(rows.flatten(0, 2).split(ROWS), out.flatten(0, 2).split(ROWS), strict=True):
        calls.product(calls.quantize(part, dense=True), weight, to, bias)
    return out.permute(0, 3, 1, 2)


def gamma_of(norm: ChannelNorm) -> Tensor:
    return padded(norm.gamma.detach().float() * norm.scale)


def conv(
    layer: nn.Conv2d,
    x: Tensor,
    norm: ChannelNorm | None = None,
    *,
    grow: bool = False,
    add: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """A 3x3 convolution after norm and SiLU or doubling, plus `add`; in `out`, or elsewhere where that is faster."""
    gamma = None if norm is None else gamma_of(norm)
    if not (x.dtype == torch.bfloat16 and multiplies_tiles()):
        return convolve(x, laid(layer, x.dtype, grow), gamma, add=add, out=out)
    x = x if gamma is None else calls.norm_silu(x, gamma)
    x = F.interpolate(x, scale_factor=2.0, mode="nearest-exact") if grow else x
    y = last(layer(x))
    return y if add is None else add.add_(y)


def multiplies_tiles() -> bool:
    """Whether the processor has AMX and torch may use it."""
    return bool(getattr(torch.cpu, "_is_amx_tile_supported", bool)())


def laid(layer: nn.Conv2d, dtype: torch.dtype, grow: bool) -> Laid:
    """The layer's weight as kernels read it, made anew when the weight or the instruction set is another."""
    weight, bias = layer.weight, layer.bias
    assert bias is not None
    versions = [0 if each.is_inference() else each._version for each in (weight, bias)]
    now = (dtype, grow, instruction_set(), weight.data_ptr(), bias.data_ptr(), *versions)
    kept = layer.__dict__.get("laid")
    if kept is None or kept[0] != now:
        kept = (now, lay(weight, bias, dtype, grow=grow))
        if not layer.__dict__.get("passing"):
            layer.__dict__["laid"] = kept
    return kept[1]
