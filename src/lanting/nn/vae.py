"""AutoencoderKLQwenImage for single pictures: a 2-D network behind the official tensor names.

The published autoencoder (the Wan 2.1 VAE with a re-trained decoder, Qwen-Image technical report) is a causal
3-D network. Its convolutions pad time with zero frames on the left, so for a clip of one frame only the last
temporal slice of every kernel meets data and the time convolutions never run. We keep exactly those 44.6 M of
126.9 M parameters as 4-D weights. Rejected: 3-D convolutions with an empty cache, three times the memory and
work for the same picture.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lanting.nn.tiling import TileGrid, run_tiled

TILE_PIXELS, TILE_STRIDE = 256, 192  # as `enable_tiling` of diffusers 0.42


@dataclass(frozen=True, slots=True)
class VAEConfig:
    """The keys of the official `vae/config.json` (its own spelling).

    `latents_mean` and `latents_std` hold one number per latent channel: normalised = (raw - mean) / std.
    """

    base_dim: int = 96
    z_dim: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    attn_scales: tuple[float, ...] = ()
    temperal_downsample: tuple[bool, ...] = (False, True, True)
    dropout: float = 0.0
    input_channels: int = 3
    latents_mean: tuple[float, ...] = (
        *(-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508),
        *(0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
    )
    latents_std: tuple[float, ...] = (
        *(2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743),
        *(3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160),
    )

    def __post_init__(self) -> None:
        if self.attn_scales:
            raise ValueError("attn_scales must be empty: no released VAE has attention outside the middle block")
        if len(self.temperal_downsample) != len(self.dim_mult) - 1:
            raise ValueError("temperal_downsample must have one entry less than dim_mult")
        if not len(self.latents_mean) == len(self.latents_std) == self.z_dim:
            raise ValueError("latents_mean and latents_std must have z_dim entries each")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> VAEConfig:
        """From the parsed `config.json`; keys that describe no network (`_class_name`, ...) are ignored."""
        return cls(**known_values(cls, values))

    @property
    def downscale(self) -> int:
        """Pixels per latent position, 8 for every release."""
        return 2 ** len(self.temperal_downsample)


def known_values(kind: type[Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """What `values` say of the fields of a config; lists become tuples."""
    known = {f.name: values[f.name] for f in fields(kind) if f.name in values}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in known.items()}


def channel_norm(x: Tensor, gamma: Tensor, scale: float) -> Tensor:
    """x / |x| over channels, times gamma and scale. 16-bit input is normalised in fp32 and cast back."""
    exact = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    return F.normalize(exact, dim=1).to(x.dtype) * (gamma * scale).to(x.dtype)


class ChannelNorm(nn.Module):
    """`channel_norm` with a scale of sqrt(C)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.scale = channels**0.5
        self.gamma = nn.Parameter(torch.ones(channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return channel_norm(x, self.gamma, self.scale)


class ResidualBlock(nn.Module):
    """norm, SiLU, 3x3, norm, SiLU, 3x3, plus the input (through a 1x1 convolution when the width changes)."""

    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__()
        self.norm1 = ChannelNorm(width_in)
        self.conv1 = nn.Conv2d(width_in, width_out, 3, padding=1)
        self.norm2 = ChannelNorm(width_out)
        self.conv2 = nn.Conv2d(width_out, width_out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(width_in, width_out, 1) if width_in != width_out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)))
        y = self.conv2(F.silu(self.norm2(y)))
        return self.conv_shortcut(x) + y


class AttentionBlock(nn.Module):
    """One head of the full width attends over all positions of the picture."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = ChannelNorm(channels)
        self.to_qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.to_qkv(self.norm(x)).flatten(2).transpose(1, 2).unsqueeze(1)  # (B, 1, h*w, 3C)
        q, k, v = qkv.contiguous().chunk(3, dim=-1)
        y = F.scaled_dot_product_attention(q, k, v)  # scale 1/sqrt(C)
        y = y.squeeze(1).transpose(1, 2).reshape(x.shape)
        return x + self.proj(y)


class MidBlock(nn.Module):
    """residual, attention, residual at the lowest resolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.resnets = nn.ModuleList([ResidualBlock(channels, channels), ResidualBlock(channels, channels)])
        self.attentions = nn.ModuleList([AttentionBlock(channels)])

    def forward(self, x: Tensor) -> Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Resample(nn.Module):
    """Halve or double both sides. The convolution is `resample.1`, as in the checkpoint."""

    def __init__(self, channels: int, *, up: bool) -> None:
        super().__init__()
        if up:  # doubling also halves the channels
            grow = nn.Upsample(scale_factor=2.0, mode="nearest-exact")
            self.resample = nn.Sequential(grow, nn.Conv2d(channels, channels // 2, 3, padding=1))
        else:
            shrink = nn.Conv2d(channels, channels, 3, stride=2)
            self.resample = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), shrink)

    def forward(self, x: Tensor) -> Tensor:
        return self.resample(x)


class UpBlock(nn.Module):
    """`num_res_blocks` + 1 residual blocks, then doubling except in the last block."""

    def __init__(self, width_in: int, width_out: int, blocks: int, *, up: bool) -> None:
        super().__init__()
        widths = [width_in] + [width_out] * blocks
        self.resnets = nn.ModuleList([ResidualBlock(a, width_out) for a in widths])
        self.upsamplers = nn.ModuleList([Resample(width_out, up=True)] if up else [])

    def forward(self, x: Tensor) -> Tensor:
        for layer in (*self.resnets, *self.upsamplers):
            x = layer(x)
        return x


class Encoder(nn.Module):
    """(B, C, H, W) -> (B, 2 z, H/8, W/8)."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        widths = [config.base_dim * m for m in config.dim_mult]
        self.conv_in = nn.Conv2d(config.input_channels, config.base_dim, 3, padding=1)
        blocks: list[nn.Module] = []  # one flat list, as in the checkpoint
        width = config.base_dim
        for level, target in enumerate(widths):
            for _ in range(config.num_res_blocks):
                blocks.append(ResidualBlock(width, target))
                width = target
            if level < len(widths) - 1:
                blocks.append(Resample(width, up=False))
        self.down_blocks = nn.ModuleList(blocks)
        self.mid_block = MidBlock(width)
        self.norm_out = ChannelNorm(width)
        self.conv_out = nn.Conv2d(width, 2 * config.z_dim, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(F.silu(self.norm_out(self.mid_block(x))))


class Decoder(nn.Module):
    """(B, z, h, w) -> (B, C, 8 h, 8 w), not clamped."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        widths = [config.base_dim * m for m in reversed(config.dim_mult)]
        self.conv_in = nn.Conv2d(config.z_dim, widths[0], 3, padding=1)
        self.mid_block = MidBlock(widths[0])
        self.up_blocks = nn.ModuleList()
        width = widths[0]
        for level, target in enumerate(widths):
            up = level < len(widths) - 1
            self.up_blocks.append(UpBlock(width, target, config.num_res_blocks, up=up))
            width = target // 2
        self.norm_out = ChannelNorm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], config.input_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(z))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class AutoencoderKLQwenImage(nn.Module):
    """Pictures to latents and back. Weights: `to_image_weights` of the official file, loaded strictly."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        z = config.z_dim
        self.encoder = Encoder(config)
        self.quant_conv = nn.Conv2d(2 * z, 2 * z, 1)
        self.post_quant_conv = nn.Conv2d(z, z, 1)
        self.decoder = Decoder(config)

    def encode(self, pixels: Tensor, *, tile: bool = False) -> tuple[Tensor, Tensor]:
        """Raw (not normalised) latents: mean and log-variance, each (B, z, H/8, W/8).

        `pixels` is (B, 3 or 4, H, W) in [-1, 1], H and W at least 8; rows beyond a multiple of 8 are dropped.
        The mean is the mode. `tile` bounds the memory of pictures above 256 pixels; it changes the result
        slightly, because attention then sees one tile at a time.
        """
        grid = TileGrid(TILE_PIXELS, TILE_STRIDE, 1 / self.config.downscale)
        moments = self._run(lambda x: self.quant_conv(self.encoder(x)), pixels, grid, tile)
        mean, logvar = moments.chunk(2, dim=1)
        return mean, logvar.clamp(-30.0, 20.0)

    def decode(self, latents: Tensor, *, tile: bool = False) -> Tensor:
        """(B, z, h, w) raw latents -> (B, 3 or 4, 8 h, 8 w) in [-1, 1]; `tile` as in `encode`."""
        scale = self.config.downscale
        grid = TileGrid(TILE_PIXELS // scale, TILE_STRIDE // scale, scale)
        return self._run(self.reconstruct, latents, grid, tile).clamp(-1.0, 1.0)

    def reconstruct(self, latents: Tensor) -> Tensor:
        """`decode` before the clamp, which would stop the gradient of saturated pixels in training."""
        return self.decoder(self.post_quant_conv(latents))

    def _run(self, network: Any, x: Tensor, grid: TileGrid, tile: bool) -> Tensor:
        return run_tiled(network, x, grid) if tile and max(x.shape[-2:]) > grid.size else network(x)


def to_image_weights(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Official (video) tensors -> ours: the last temporal slice of each kernel, flat gammas, no `time_conv`.

    Tensors that are already in image form pass unchanged.
    """
    image: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if ".time_conv." in name:
            continue
        if name.endswith(".gamma"):
            tensor = tensor.reshape(-1, 1, 1)
        elif tensor.ndim == 5:
            tensor = tensor[:, :, -1].contiguous()
        image[name] = tensor
    return image


def to_video_weights(state: Mapping[str, Tensor], config: VAEConfig) -> dict[str, Tensor]:
    """Our tensors -> the official layout, so that diffusers loads them strictly.

    Earlier temporal slices and `time_conv` are zero: one frame never meets them, so the picture is the same.
    """
    video: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name.endswith(".gamma") and ".attentions." not in name:
            tensor = tensor.reshape(-1, 1, 1, 1)
        elif tensor.ndim == 4 and not _stays_flat(name):
            kernel = 3 if tensor.shape[-1] == 3 else 1
            slices = tensor.new_zeros(*tensor.shape[:2], kernel, *tensor.shape[2:])
            slices[:, :, -1] = tensor
            tensor = slices
        video[name] = tensor
    return video | _zero_time_convs(state, config)


def _stays_flat(name: str) -> bool:
    """Resampling and attention convolutions are 2-D in the official file too."""
    return ".resample." in name or ".to_qkv." in name or ".proj." in name


def _zero_time_convs(state: Mapping[str, Tensor], config: VAEConfig) -> dict[str, Tensor]:
    zeros: dict[str, Tensor] = {}
    for level, timed in enumerate(config.temperal_downsample):
        if not timed:
            continue
        down = f"encoder.down_blocks.{level * (config.num_res_blocks + 1) + config.num_res_blocks}"
        up = f"decoder.up_blocks.{len(config.temperal_downsample) - 1 - level}.upsamplers.0"
        for prefix, factor in ((down, 1), (up, 2)):
            like = state[f"{prefix}.resample.1.weight"]
            width = like.shape[1]
            zeros[f"{prefix}.time_conv.weight"] = like.new_zeros(width * factor, width, 3, 1, 1)
            zeros[f"{prefix}.time_conv.bias"] = like.new_zeros(width * factor)
    return zeros
