"""Qwen-Image-2.1's autoencoder on a CPU through native kernels: the levels of `attach.vae` with shortcuts around them.

A level's input is needed once more behind it, so it is kept where the level would write over it; that is a third
picture of memory, and none at levels that change their width. Shortcuts are added in place (`nn.vae21`).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lanting.attach.vae import conv, known, last, middle, residuals
from lanting.nn.vae21 import AutoencoderKLQwenImage21, Decoder21, Encoder21, add_averaged, add_repeated


def attach_vae21(vae: AutoencoderKLQwenImage21) -> None:
    """Let an autoencoder on the CPU use the kernels, which must be there. Undone by `attach.vae.detach_vae`."""
    vae.encoder.__dict__["forward"] = partial(encode, vae.encoder)
    vae.decoder.__dict__["forward"] = partial(decode, vae.decoder)


def encode(encoder: Encoder21, x: Tensor) -> Tensor:
    """`Encoder21.forward`."""
    if not known(encoder, x):
        return type(encoder).forward(encoder, x)
    x = last(encoder.conv_in(last(x)))
    block: Any
    for block in encoder.down_blocks:
        y = level(block.resnets, x)
        x = y.add_(x) if block.downsampler is None else add_averaged(last(block.downsampler(y)), x, block.frames)
    return conv(encoder.conv_out, middle(encoder.mid_block, x), encoder.norm_out)


def decode(decoder: Decoder21, z: Tensor) -> Tensor:
    """`Decoder21.forward`."""
    if not known(decoder, z):
        return type(decoder).forward(decoder, z)
    x = middle(decoder.mid_block, last(decoder.conv_in(last(z))))
    block: Any
    for block in decoder.up_blocks:
        if block.upsampler is None:
            x = residuals(block.resnets, x)
        else:
            grown = conv(block.upsampler.resample[1], level(block.resnets, x), grow=True)
            x = add_repeated(grown, x, block.frames)
    return conv(decoder.conv_out, x, decoder.norm_out)


def level(blocks: nn.ModuleList, x: Tensor) -> Tensor:
    """`residuals` of x, which is left as it is."""
    first: Any = blocks[0]
    changes = isinstance(first.conv_shortcut, nn.Conv2d)  # then the first sum is written elsewhere
    return residuals(blocks, x if changes else x.clone(memory_format=torch.preserve_format))
