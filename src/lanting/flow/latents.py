"""The only place that knows the VAE's mean, std, stride and packing, and how noise is drawn.

Everything else speaks of packed, normalised tokens (B, N, 4 z), in 2.1 (B, N, z). Two choices differ from diffusers
0.42 on purpose: a picture is encoded to the MODE of its posterior always (diffusers samples in five of its pipelines,
so that the noise of a seed depends on whether a picture was encoded before it), and the statistics are
applied in float32 (diffusers rounds 1/std to bfloat16, up to 0.6 % off).
Shapes: B batch, F frames, z latent channels, (h, w) rows and columns of tokens; latents (2h, 2w), pixels (16h, 16w).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lanting.flow.loop import Grid, Tokens

PATCH = 2  # a token is 2 x 2 latents; in Qwen-Image-2.1, whose latents are of 16 pixels, it is one


class VAE(Protocol):
    """The autoencoder as the codec sees it; `lanting.nn.vae.AutoencoderKLQwenImage` is one."""

    def encode(self, pixels: Tensor, *, tile: bool = False) -> tuple[Tensor, Tensor]: ...

    def decode(self, latents: Tensor, *, tile: bool = False) -> Tensor: ...

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]: ...


def pack(latents: Tensor, patch: int = PATCH) -> Tensor:
    """(B, c, 2h, 2w) -> (B, h w, 4c); the order inside a token is (c, dy, dx)."""
    return F.pixel_unshuffle(latents, patch).flatten(2).transpose(1, 2)


def unpack(tokens: Tensor, grid: Grid, patch: int = PATCH) -> Tensor:
    """(B, h w, 4c) -> (B, c, 2h, 2w) for grid (1, h, w); the inverse of `pack`."""
    return F.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, grid[1:]), patch)


class LatentCodec:
    """Pictures to tokens and back, and tokens of noise.

    vae             its weights say dtype and device
    mean, std       per latent channel, from `vae/config.json`
    stride          pixels per latent
    patch           latents per side of a token
    pixel_channels  3 (RGB) or 4 (RGBA; Layered and 2.1)
    tile            bound the VAE's memory on large pictures; read at every call, so a plan may set it later
    """

    def __init__(
        self,
        vae: VAE,
        mean: Sequence[float],
        std: Sequence[float],
        *,
        stride: int = 8,
        patch: int = PATCH,
        pixel_channels: int = 3,
        tile: bool = False,
    ) -> None:
        self.vae, self.stride, self.patch = vae, stride, patch
        self.pixel_channels, self.tile = pixel_channels, tile
        self.mean = torch.tensor(mean, dtype=torch.float32).view(1, -1, 1, 1)  # (1, z, 1, 1)
        self.std = torch.tensor(std, dtype=torch.float32).view(1, -1, 1, 1)

    @property
    def channels(self) -> int:
        """Latent channels z."""
        return self.mean.shape[1]

    def grid(self, width: int, height: int) -> Grid:
        """The token grid of a picture of width x height pixels, rounded down to multiples of 16."""
        return 1, height // (self.stride * self.patch), width // (self.stride * self.patch)

    def encode(self, pixels: Tensor) -> Tokens:
        """(B, 3 or 4, H, W) in [-1, 1] -> tokens (B, N, 4z) in float32 on the VAE's device."""
        _, height, width = pixels.shape[-3:]
        return Tokens(pack(self.latents(pixels), self.patch), self.grid(width, height))

    def latents(self, pixels: Tensor) -> Tensor:
        """(B, 3 or 4, H, W) in [-1, 1] -> normalised latents (B, z, H/8, W/8), float32, not packed."""
        weight = next(self.vae.parameters())  # any: for dtype and device
        with torch.no_grad():
            mode = [self.vae.encode(one.to(weight.device, weight.dtype), tile=self.tile)[0] for one in pixels.split(1)]
        latents = torch.cat(mode).float()
        return (latents - self.mean.to(latents.device)) / self.std.to(latents.device)

    def decode(self, tokens: Tensor, grid: Grid) -> Tensor:
        """(B, N, 4z) of one picture each -> (B, 3 or 4, H, W) float32 in [-1, 1], on the VAE's device.

        One picture at a time: decoding is where memory peaks.
        """
        weight = next(self.vae.parameters())  # any: for dtype and device
        latents = unpack(tokens, grid, self.patch).to(weight.device, torch.float32)
        latents = (latents * self.std.to(latents.device) + self.mean.to(latents.device)).to(weight.dtype)
        with torch.no_grad():
            return torch.cat([self.vae.decode(one, tile=self.tile).float() for one in latents.split(1)])

    def noise(self, grid: Grid, generators: Sequence[torch.Generator], frames: int = 1) -> Tensor:
        """(B, frames h w, 4z) float32 on the CPU, one CPU generator per picture of the batch.

        Drawn as (1, frames, z, 2h, 2w), so a seed gives what diffusers gives with a list of CPU generators,
        whatever device and dtype the noise then moves to (a bfloat16 draw is the float32 draw, rounded).
        """
        shape = (frames, self.channels, self.patch * grid[1], self.patch * grid[2])
        drawn = [torch.randn(1, *shape, generator=generator) for generator in generators]
        tokens = pack(torch.cat(drawn).flatten(0, 1), self.patch)  # (B F, h w, 4z)
        return tokens.unflatten(0, (len(drawn), frames)).flatten(1, 2)


@dataclass(frozen=True)
class Preview:
    """A linear guess of the decoder: the mean colour of 8 x 8 (2.1: 16 x 16) pixels. Made by `fit_preview`."""

    matrix: Tensor  # (z, 3)
    bias: Tensor  # (3,)
    patch: int = PATCH

    @cached_property
    def packed(self) -> Tensor:
        """(4z, 12): the same for a token's four latents at once, so that no token is taken apart before."""
        four = torch.eye(self.patch**2)
        return torch.einsum("zc,kl->zklc", self.matrix, four).flatten(2).flatten(0, 1)

    def __call__(self, tokens: Tensor, grid: Grid) -> Tensor:
        """(B, N, 4z) -> (B, 3, 2h, 2w) float32 in [-1, 1]; the first picture where N holds several."""
        count = grid[1] * grid[2]
        matrix, bias = self.packed.to(tokens.device), self.bias.to(tokens.device)
        colours = (tokens[:, :count].float() @ matrix).unflatten(
            2, (self.patch, self.patch, 3)
        ) + bias  # (B, h w, 2, 2, 3)
        rows = colours.unflatten(1, grid[1:]).permute(0, 5, 1, 3, 2, 4)  # (B, 3, h, 2, w, 2)
        return rows.reshape(-1, 3, self.patch * grid[1], self.patch * grid[2]).clamp(-1, 1)


def fit_preview(codec: LatentCodec, size: int = 64) -> Preview:
    """Least squares from latents to mean colours over a few synthetic pictures; fitted once per VAE.

    Fitted rather than tabulated, so that it serves any VAE: the released ones, nano's, one's own.
    """
    pixels = _patterns(size)  # (P, 3, size, size)
    latents = torch.cat([codec.latents(opaque(one, codec.pixel_channels)) for one in pixels.split(1)])
    colours = F.avg_pool2d(pixels, codec.stride).flatten(2).transpose(1, 2).flatten(0, 1)  # (n, 3)
    known = latents.flatten(2).transpose(1, 2).flatten(0, 1).cpu()  # (n, z)
    known = torch.cat([known, torch.ones(len(known), 1)], 1).double()
    # A trace of ridge: patterns may leave directions of the latent space untouched.
    gram = known.T @ known + 1e-4 * len(known) * torch.eye(known.shape[1], dtype=torch.float64)
    solution = torch.linalg.solve(gram, known.T @ colours.double()).float()  # (z + 1, 3)
    return Preview(solution[:-1], solution[-1], codec.patch)


def _patterns(size: int) -> Tensor:
    """(P, 3, size, size) in [-1, 1]: flat colours, ramps and soft random blobs; the same every time."""
    levels = torch.tensor([-1.0, 0.0, 1.0])
    flat = torch.cartesian_prod(levels, levels, levels).view(-1, 3, 1, 1).expand(-1, -1, size, size)
    ramp = torch.linspace(-1, 1, size)
    ramps = torch.stack([ramp.expand(size, size), ramp.view(-1, 1).expand(size, size), ramp.flip(0).expand(size, size)])
    coarse = torch.rand(8, 3, 5, 5, generator=torch.Generator().manual_seed(0)) * 2 - 1
    blobs = F.interpolate(coarse, size=(size, size), mode="bilinear", align_corners=True)
    return torch.cat([flat, ramps[None], ramps.flip(0)[None], blobs])


def opaque(pixels: Tensor, channels: int = 4) -> Tensor:
    """Pixels (B, 3, H, W) with an opaque fourth channel, if the VAE reads RGBA."""
    return torch.cat([pixels, torch.ones_like(pixels[:, :1])], 1) if channels == 4 else pixels
