"""Our image VAE against diffusers' causal 3-D one, random weights, single pictures."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKLQwenImage as Reference

from lanting.nn.tiling import TileGrid, run_tiled
from lanting.nn.vae import AutoencoderKLQwenImage, VAEConfig, to_image_weights, to_video_weights

TINY = {"base_dim": 8, "z_dim": 4, "num_res_blocks": 1, "latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}


def make_reference(seed: int = 0, **overrides) -> Reference:
    torch.manual_seed(seed)
    reference = Reference(**{**TINY, **overrides}).eval()
    with torch.no_grad():  # gammas and biases away from their defaults, so that a mix-up shows
        for name, p in reference.named_parameters():
            if name.endswith("gamma"):
                p.uniform_(0.5, 1.5)
            else:
                p.normal_(0, 1.5 / p[0].numel() ** 0.5 if p.ndim > 1 else 0.1)
    return reference


def make_ours(reference: Reference) -> AutoencoderKLQwenImage:
    ours = AutoencoderKLQwenImage(VAEConfig.from_dict(dict(reference.config))).eval()
    ours.load_state_dict(to_image_weights(reference.state_dict()), strict=True)
    return ours.to(next(reference.parameters()).dtype)


def pictures(height: int, width: int, channels: int = 3, batch: int = 2) -> torch.Tensor:
    return torch.rand(batch, channels, height, width, generator=torch.Generator().manual_seed(5)) * 2 - 1


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    assert ours.shape == theirs.shape
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


@torch.no_grad()
def compare(reference: Reference, ours: AutoencoderKLQwenImage, pixels: torch.Tensor, tile: bool = False):
    """Relative errors of mean, logvar and decoded picture; both decoders read the reference's mean."""
    if tile:
        reference.enable_tiling()
    posterior = reference.encode(pixels[:, :, None]).latent_dist
    mean, logvar = ours.encode(pixels, tile=tile)
    z = posterior.mean
    picture = reference.decode(z).sample.clamp(-1, 1)[:, :, 0]
    decoded = ours.decode(z[:, :, 0], tile=tile)
    pairs = ((mean, posterior.mean[:, :, 0]), (logvar, posterior.logvar[:, :, 0]), (decoded, picture))
    return [relative(a.float(), b.float()) for a, b in pairs]


@pytest.mark.parametrize("channels", [3, 4])
@pytest.mark.parametrize("size", [(64, 64), (48, 80), (40, 24), (45, 67)])
def test_encode_and_decode_equal_the_reference(channels, size):
    reference = make_reference(input_channels=channels)
    assert max(compare(reference, make_ours(reference), pictures(*size, channels))) < 1e-5


@pytest.mark.parametrize(
    "overrides",
    [
        {"temperal_downsample": [False, False, False]},
        {"temperal_downsample": [True, True, False], "num_res_blocks": 2},
        {"dim_mult": [1, 2, 2], "temperal_downsample": [False, True]},
        {"base_dim": 16, "z_dim": 16, "latents_mean": [0.0] * 16, "latents_std": [1.0] * 16},
    ],
)
def test_every_shape_of_network_equals_the_reference(overrides):
    reference = make_reference(**overrides)
    assert max(compare(reference, make_ours(reference), pictures(32, 48))) < 1e-5


@pytest.mark.parametrize("size", [(272, 464), (208, 264), (400, 256), (256, 256)])
def test_tiled_equals_the_tiled_reference(size):
    """In float64: so thin a network is 1e-5 apart from itself in float32, by processor."""
    reference = make_reference(base_dim=4)
    ours = make_ours(reference).double()
    assert max(compare(reference.double(), ours, pictures(*size, batch=1).double(), tile=True)) < 1e-6


def test_tiling_matters_and_is_off_by_default():
    ours = make_ours(make_reference(base_dim=4))
    pixels = pictures(320, 64, batch=1)
    with torch.no_grad():
        whole, tiled = ours.encode(pixels)[0], ours.encode(pixels, tile=True)[0]
        small = pictures(256, 64, batch=1)
        assert torch.equal(ours.encode(small)[0], ours.encode(small, tile=True)[0])
    assert relative(tiled, whole) > 1e-6


def test_tiles_of_a_local_network_fuse_without_a_seam():
    """A network that looks at no neighbours must not notice the tiles, whatever the picture's size."""
    x = torch.rand(1, 2, 133, 71)
    for size, stride in ((32, 24), (40, 32), (16, 16)):
        assert torch.allclose(run_tiled(lambda t: 2 * t, x, TileGrid(size, stride, 1)), 2 * x, atol=1e-6)


def test_a_leftover_narrower_than_one_latent_does_not_fail():
    ours = make_ours(make_reference(base_dim=4))
    with torch.no_grad():
        assert ours.encode(pictures(64, 388, batch=1), tile=True)[0].shape == (1, 4, 8, 48)


def test_bfloat16_is_as_exact_as_the_reference():
    """Two 16-bit runs round differently, so both are measured against the same weights in fp32."""
    reference = make_reference().to(torch.bfloat16)
    ours = make_ours(reference)
    pixels = pictures(64, 48).to(torch.bfloat16)
    exact = make_reference()
    exact.load_state_dict({k: v.float() for k, v in reference.state_dict().items()})
    with torch.no_grad():
        truth = exact.encode(pixels.float()[:, :, None]).latent_dist.mean
        picture = exact.decode(truth).sample[:, :, 0]
        theirs = reference.encode(pixels[:, :, None]).latent_dist.mean
        z = truth.to(torch.bfloat16)
        assert relative(ours.encode(pixels)[0].float(), truth[:, :, 0]) < max(
            0.02, 1.5 * relative(theirs.float(), truth)
        )
        mine, other = ours.decode(z[:, :, 0]).float(), reference.decode(z).sample[:, :, 0].float()
        assert relative(mine, picture) < max(0.02, 1.5 * relative(other, picture))
        assert mine.dtype == torch.float32 and ours.decode(z[:, :, 0]).dtype == torch.bfloat16


def test_channels_last_gives_the_same_picture():
    ours = make_ours(make_reference())
    pixels = pictures(48, 64)
    with torch.no_grad():
        mean, picture = ours.encode(pixels)[0], ours.decode(ours.encode(pixels)[0])
        ours.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        again = ours.encode(pixels.to(memory_format=torch.channels_last))[0]
        assert relative(again, mean) < 1e-5
        assert relative(ours.decode(again), picture) < 1e-5


@pytest.mark.parametrize("temporal", [[False, False, False], [False, True, True], [True, False, True]])
def test_video_weights_load_strictly_and_draw_the_same(temporal):
    first = make_reference(temperal_downsample=temporal)
    ours = make_ours(first)
    second = make_reference(seed=1, temperal_downsample=temporal)
    second.load_state_dict(to_video_weights(ours.state_dict(), ours.config), strict=True)
    assert max(compare(second, ours, pictures(32, 32))) < 1e-5
    back = to_image_weights(second.state_dict())
    assert back.keys() == ours.state_dict().keys()
    assert all(torch.equal(back[k], v) for k, v in ours.state_dict().items())


def test_the_full_size_network():
    """The released geometry: 126.9 M stored numbers, 44.6 M live, the same picture."""
    reference = make_reference(base_dim=96, z_dim=16, num_res_blocks=2, latents_mean=[0.0] * 16, latents_std=[1.0] * 16)
    ours = make_ours(reference)
    assert sum(p.numel() for p in ours.parameters()) == 44_599_603
    assert sum(p.numel() for p in reference.parameters()) == 126_892_531
    assert max(compare(reference, ours, pictures(64, 64, batch=1))) < 1e-5


def test_config_reads_the_official_file_and_refuses_what_it_cannot_run():
    official = dict(Reference(base_dim=4).config)  # everything but the width at its published value
    assert VAEConfig.from_dict({**official, "_class_name": "AutoencoderKLQwenImage"}) == VAEConfig(base_dim=4)
    assert VAEConfig().downscale == 8
    with pytest.raises(ValueError, match="attn_scales"):
        VAEConfig.from_dict({"attn_scales": [0.5]})
    with pytest.raises(ValueError, match="z_dim"):
        VAEConfig.from_dict({"z_dim": 4})
    with pytest.raises(ValueError, match="temperal_downsample"):
        VAEConfig.from_dict({"dim_mult": [1, 2]})
