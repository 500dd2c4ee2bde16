"""AutoencoderKLQwenImage21: the RGBA autoencoder of Qwen-Image-2.1, 64 channels for 16 x 16 pixels, single pictures.

It is made of the blocks of `nn.vae`, in another order: a shortcut without weights goes around every level, averaging on
the way down and repeating on the way up, and the decoder is wider than the encoder. It descends from a video network:
where a level also halves time, half of the shortcut's values come from a frame that a single picture does not have, so
zeros are averaged in and the later of two repeated frames is kept. The time convolutions themselves never run; those
6.8 M of 337.7 M parameters are not kept. Shortcuts are added in place and on views: nothing is repeated in memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from lanting.nn.vae import (
    AutoencoderKLQwenImage,
    ChannelNorm,
    Decoder,
    Encoder,
    MidBlock,
    Resample,
    ResidualBlock,
    known_values,
)

SIDE = 2  # a level halves or doubles both sides


@dataclass(frozen=True, slots=True)
class VAE21Config:
    """The keys of the official `vae/config.json` (its own spelling).

    `decoder_base_dim` None means `base_dim`. `latents_mean` and `latents_std` hold one number per latent channel:
    normalised = (raw - mean) / std. Raises ValueError for a network that no release has.
    """

    base_dim: int = 96
    decoder_base_dim: int | None = 144
    z_dim: int = 64
    dim_mult: tuple[int, ...] = (1, 2, 4, 8, 8)
    num_res_blocks: int = 2
    attn_scales: tuple[float, ...] = ()
    temperal_downsample: tuple[bool, ...] = (False, True, True, True)
    dropout: float = 0.0
    is_residual: bool = True
    in_channels: int = 4
    out_channels: int = 4
    patch_size: int | None = None
    latents_mean: tuple[float, ...] = (
        *(0.5126, 0.7721, -0.0631, 1.3506, -0.7855, -2.1025, -0.3458, 1.3722),
        *(1.8873, -1.7177, -0.6510, 0.2732, 0.7562, -0.6163, -1.0277, 3.8363),
        *(2.0210, 0.0472, 0.9320, 2.0087, 2.4954, -0.1391, -1.4249, 1.8464),
        *(-0.5236, 1.2826, 3.7046, -1.3035, 2.7286, -1.4518, -1.9036, -1.9955),
        *(-0.0342, -1.0265, -0.7636, 3.0555, 0.0746, -3.0751, -0.1076, 1.7376),
        *(-1.0914, -1.9435, -0.2784, -1.3680, 0.4809, -0.4433, 0.3764, 0.5729),
        *(-2.0595, 1.0960, -1.3260, -2.0211, -5.0179, 0.5275, 4.0162, 1.8505),
        *(0.3026, 1.9373, 1.4937, 0.2632, 0.5547, -1.7121, -0.1562, 0.0304),
    )
    latents_std: tuple[float, ...] = (
        *(3.2001, 3.2936, 3.4321, 3.0091, 3.1061, 4.0379, 4.0705, 3.7910),
        *(3.0785, 3.6500, 3.9308, 3.0904, 2.8778, 3.7675, 3.7320, 5.0756),
        *(3.2864, 4.0397, 3.1317, 4.0443, 2.9249, 3.9454, 3.0988, 4.2489),
        *(3.4896, 3.8513, 3.9323, 3.4719, 3.7498, 4.2830, 3.5694, 4.2467),
        *(3.9037, 3.2947, 5.0770, 3.5075, 3.2700, 3.4767, 2.8063, 5.1125),
        *(3.5327, 4.7833, 3.1286, 4.1819, 3.8527, 3.8312, 3.5605, 4.3875),
        *(3.9624, 4.0168, 3.5643, 4.0550, 5.5614, 4.2963, 4.4080, 3.4959),
        *(3.8747, 3.7608, 3.5735, 3.1490, 3.7662, 3.6746, 3.4563, 3.8161),
    )

    def __post_init__(self) -> None:
        if self.attn_scales:
            raise ValueError("attn_scales must be empty: no released VAE has attention outside the middle block")
        if not self.is_residual or self.patch_size not in (None, 1):
            raise ValueError("is_residual must be true and patch_size null, as in every release")
        if len(self.temperal_downsample) != len(self.dim_mult) - 1:
            raise ValueError("temperal_downsample must have one entry less than dim_mult")
        if not len(self.latents_mean) == len(self.latents_std) == self.z_dim:
            raise ValueError("latents_mean and latents_std must have z_dim entries each")
        before = (1, *self.dim_mult[:-1])
        if any(b not in (a, 2 * a, 4 * a) for a, b in zip(before, self.dim_mult, strict=True)):
            raise ValueError("dim_mult must start at 1, 2 or 4 and stay, double or quadruple from level to level")
        if self.dim_mult[-1:] != self.dim_mult[-2:-1]:
            raise ValueError("the last two entries of dim_mult must be equal: the shortcut of the last level is plain")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> VAE21Config:
        """From the parsed `config.json`; keys that describe no network (`_class_name`, ...) are ignored."""
        return cls(**known_values(cls, values))

    @property
    def downscale(self) -> int:
        """Pixels per latent position, 16 for every release."""
        return SIDE ** len(self.temperal_downsample)

    @property
    def input_channels(self) -> int:
        """Channels of a picture, under the name that `VAEConfig` has for it; 4 for every release."""
        return self.in_channels

    @property
    def frames(self) -> tuple[int, ...]:
        """Frames that each halving level of the video network makes one, 1 or 2."""
        return tuple(1 + timed for timed in self.temperal_downsample)


def add_averaged(y: Tensor, x: Tensor, frames: int) -> Tensor:
    """Add x (B, C, 2h, 2w), averaged, to y (B, k C, h, w) in place; k divides 4 frames.

    The 4 frames values (t, dy, dx) behind a position of y are averaged in k groups, a channel each; all frames but
    the last are zero.
    """
    per = y.shape[1] // x.shape[1]  # k
    group = SIDE * SIDE * frames // per
    live = max(1, SIDE * SIDE // group)  # groups that meet the picture: the last ones
    parts = F.pixel_unshuffle(x, SIDE).unflatten(1, (x.shape[1], live, -1))  # (B, C, live, 4 / live, h, w)
    y.unflatten(1, (-1, per))[:, :, per - live :] += parts.sum(3) / group
    return y


def add_repeated(y: Tensor, x: Tensor, frames: int) -> Tensor:
    """Add x (B, k C, h, w), repeated, to y (B, C, 2h, 2w) in place; k divides 4 frames.

    k channels of x fill the 4 frames values (t, dy, dx) of a channel of y in this order; the last frame is kept.
    """
    per = x.shape[1] // y.shape[1]  # k
    repeats = SIDE * SIDE * frames // per
    for place in range(SIDE * SIDE):
        channel = ((frames - 1) * SIDE * SIDE + place) // repeats
        dy, dx = divmod(place, SIDE)
        y[..., dy::SIDE, dx::SIDE] += x[:, channel::per]
    return y


class Doubling(nn.Module):
    """Double both sides and keep the width. The convolution is `resample.1`, as in the checkpoint."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        grow = nn.Upsample(scale_factor=float(SIDE), mode="nearest-exact")
        self.resample = nn.Sequential(grow, nn.Conv2d(channels, channels, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        return self.resample(x)


class ResidualDownBlock(nn.Module):
    """`blocks` residual blocks, then halving unless `frames` is None; the averaged input is added."""

    def __init__(self, width_in: int, width_out: int, blocks: int, frames: int | None) -> None:
        super().__init__()
        self.frames = frames
        widths = [width_in] + [width_out] * (blocks - 1)
        self.resnets = nn.ModuleList([ResidualBlock(a, width_out) for a in widths])
        self.downsampler = None if frames is None else Resample(width_out, up=False)

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for layer in self.resnets:
            y = layer(y)
        if self.downsampler is None or self.frames is None:
            return y.add_(x)
        return add_averaged(self.downsampler(y), x, self.frames)


class ResidualUpBlock(nn.Module):
    """`blocks` + 1 residual blocks, then doubling and the repeated input unless `frames` is None."""

    def __init__(self, width_in: int, width_out: int, blocks: int, frames: int | None) -> None:
        super().__init__()
        self.frames = frames
        widths = [width_in] + [width_out] * blocks
        self.resnets = nn.ModuleList([ResidualBlock(a, width_out) for a in widths])
        self.upsampler = None if frames is None else Doubling(width_out)

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for layer in self.resnets:
            y = layer(y)
        if self.upsampler is None or self.frames is None:
            return y
        return add_repeated(self.upsampler(y), x, self.frames)


class Encoder21(Encoder):
    """(B, C, H, W) -> (B, 2 z, H/16, W/16); H and W are multiples of 16."""

    def __init__(self, config: VAE21Config) -> None:
        nn.Module.__init__(self)  # other layers under the same names
        widths = [config.base_dim * m for m in (1, *config.dim_mult)]
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        levels = zip(widths, widths[1:], (*config.frames, None), strict=False)
        self.down_blocks = nn.ModuleList(ResidualDownBlock(a, b, config.num_res_blocks, f) for a, b, f in levels)
        self.mid_block = MidBlock(widths[-1])
        self.norm_out = ChannelNorm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.z_dim, 3, padding=1)


class Decoder21(Decoder):
    """(B, z, h, w) -> (B, C, 16 h, 16 w), not clamped."""

    def __init__(self, config: VAE21Config) -> None:
        nn.Module.__init__(self)  # other layers under the same names
        base = config.decoder_base_dim or config.base_dim
        widths = [base * m for m in (*config.dim_mult, config.dim_mult[-1])][::-1]
        self.conv_in = nn.Conv2d(config.z_dim, widths[0], 3, padding=1)
        self.mid_block = MidBlock(widths[0])
        levels = zip(widths, widths[1:], (*config.frames[::-1], None), strict=False)
        self.up_blocks = nn.ModuleList(ResidualUpBlock(a, b, config.num_res_blocks, f) for a, b, f in levels)
        self.norm_out = ChannelNorm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], config.out_channels, 3, padding=1)


class AutoencoderKLQwenImage21(AutoencoderKLQwenImage):
    """RGBA pictures to latents and back. Weights: `nn.vae.to_image_weights` of the official file, loaded strictly.

    `decode` and `reconstruct` are those of `AutoencoderKLQwenImage` with 4 channels and 16 pixels per latent.
    """

    config: VAE21Config  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(self, config: VAE21Config) -> None:
        nn.Module.__init__(self)  # other parts under the same names
        self.config = config
        z = config.z_dim
        self.encoder = Encoder21(config)
        self.quant_conv = nn.Conv2d(2 * z, 2 * z, 1)
        self.post_quant_conv = nn.Conv2d(z, z, 1)
        self.decoder = Decoder21(config)

    def encode(self, pixels: Tensor, *, tile: bool = False) -> tuple[Tensor, Tensor]:
        """Raw (not normalised) latents: mean and log-variance, each (B, z, H/16, W/16).

        `pixels` is (B, 4, H, W) in [-1, 1], alpha last and not premultiplied, H and W at least 16; rows beyond a
        multiple of 16 are dropped. The mean is the mode. `tile` as in `AutoencoderKLQwenImage.encode`.
        """
        height, width = (side - side % self.config.downscale for side in pixels.shape[-2:])
        return super().encode(pixels[..., :height, :width], tile=tile)


def to_official_weights(state: Mapping[str, Tensor], config: VAE21Config) -> dict[str, Tensor]:
    """Our tensors -> the official layout, so that diffusers loads them strictly; undone by `to_image_weights`.

    The time convolutions are zero: one frame never meets them, so the picture is the same.
    """
    official: dict[str, Tensor] = {}
    for name, tensor in state.items():
        video = name.endswith(".gamma") and ".attentions." not in name
        official[name] = tensor.reshape(-1, 1, 1, 1) if video else tensor
    for level, frames in enumerate(config.frames):
        down = f"encoder.down_blocks.{level}.downsampler"
        up = f"decoder.up_blocks.{len(config.frames) - 1 - level}.upsampler"
        for prefix, factor in ((down, 1), (up, 2)) if frames > 1 else ():
            like = state[f"{prefix}.resample.1.bias"]
            width = like.shape[0]
            official[f"{prefix}.time_conv.weight"] = like.new_zeros(factor * width, width, 1, 1)
            official[f"{prefix}.time_conv.bias"] = like.new_zeros(factor * width)
    return official
