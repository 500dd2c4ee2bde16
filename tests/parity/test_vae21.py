"""The RGBA autoencoder of Qwen-Image-2.1 against diffusers, random weights, single pictures."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLQwenImage21 as Reference

from lanting.nn.vae import to_image_weights
from lanting.nn.vae21 import AutoencoderKLQwenImage21, VAE21Config, add_averaged, to_official_weights

TOLERANCE = 1e-5  # of the largest value, in float32
TINY: dict[str, Any] = {
    "base_dim": 6,
    "decoder_base_dim": 8,
    "z_dim": 4,
    "num_res_blocks": 1,
    "latents_mean": [0.0] * 4,
    "latents_std": [1.0] * 4,
}
THIN: dict[str, Any] = {"base_dim": 4, "decoder_base_dim": 4, "dim_mult": [1, 1, 1, 2, 2]}  # for large pictures


def make_reference(seed: int = 0, **overrides: Any) -> Any:
    """Every parameter random: gammas and biases away from their defaults, so that a mix-up shows.

    The last convolution is weak: a picture that is clamped nearly everywhere shows little.
    """
    torch.manual_seed(seed)
    reference: Any = Reference(**{**TINY, **overrides}).eval()
    with torch.no_grad():
        for name, p in reference.named_parameters():
            gain = 0.4 if name == "decoder.conv_out.weight" else 1.5
            if name.endswith("gamma"):
                p.uniform_(0.5, 1.5)
            else:
                p.normal_(0, gain / p[0].numel() ** 0.5 if p.ndim > 1 else 0.1)
    return reference


def make_ours(reference: Any) -> AutoencoderKLQwenImage21:
    ours = AutoencoderKLQwenImage21(VAE21Config.from_dict(dict(reference.config))).eval()
    ours.load_state_dict(to_image_weights(reference.state_dict()), strict=True)
    return ours.to(next(reference.parameters()).dtype)


def pictures(height: int, width: int, channels: int = 4, batch: int = 2) -> torch.Tensor:
    return torch.rand(batch, channels, height, width, generator=torch.Generator().manual_seed(5)) * 2 - 1


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    assert ours.shape == theirs.shape
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


@torch.no_grad()
def compare(reference: Any, ours: AutoencoderKLQwenImage21, pixels: torch.Tensor, tile: bool = False):
    """Relative errors of mean, logvar and decoded picture; both decoders read the reference's mean."""
    if tile:
        reference.enable_tiling()
    posterior = reference.encode(pixels[:, :, None]).latent_dist
    mean, logvar = ours.encode(pixels, tile=tile)
    z = posterior.mode()
    picture = reference.decode(z).sample[:, :, 0]
    assert picture.abs().max() > 0.5 and (picture.abs() < 1).float().mean() > 0.2  # neither flat nor mostly clamped
    decoded = ours.decode(z[:, :, 0], tile=tile)
    pairs = ((mean, z[:, :, 0]), (logvar, posterior.logvar[:, :, 0]), (decoded, picture))
    return [relative(a, b) for a, b in pairs]


@pytest.mark.parametrize("size", [(64, 64), (48, 80), (16, 32)])
def test_encode_and_decode_equal_the_reference(size):
    reference = make_reference()
    ours = make_ours(reference)
    assert max(compare(reference, ours, pictures(*size))) < TOLERANCE
    assert ours.config.downscale == 16


def levels(dim_mult: list[int], timed: list[bool]) -> dict[str, Any]:
    return {"dim_mult": dim_mult, "temperal_downsample": timed, "scale_factor_spatial": 2 ** len(timed)}


@pytest.mark.parametrize(
    "overrides",
    [
        {"num_res_blocks": 2, "base_dim": 8, "decoder_base_dim": None},
        {"in_channels": 3, "out_channels": 3},
        levels([1, 1, 1], [True, False]),
        levels([1, 2, 4, 4], [True, False, False]),
        levels([2, 8, 8], [False, False]),
        levels([4, 4, 16, 16], [True, True, True]),
    ],
)
def test_every_shape_of_shortcut_equals_the_reference(overrides):
    reference = make_reference(**overrides)
    ours = make_ours(reference)
    assert max(compare(reference, ours, pictures(32, 48, ours.config.input_channels))) < TOLERANCE


@pytest.mark.parametrize("size", [(208, 400), (272, 208)])
def test_tiled_equals_the_tiled_reference(size):
    """In float64, so that little but the reference's doubling, which always rounds to float32, is apart."""
    reference = make_reference(**THIN)
    ours = make_ours(reference).double()
    assert max(compare(reference.double(), ours, pictures(*size, batch=1).double(), tile=True)) < TOLERANCE


def test_tiling_matters_and_is_off_by_default():
    ours = make_ours(make_reference(**THIN))
    z = torch.randn(1, 4, 18, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        whole, tiled = ours.decode(z), ours.decode(z, tile=True)
        assert torch.equal(ours.decode(z[:, :, :16]), ours.decode(z[:, :, :16], tile=True))
    assert relative(tiled, whole) > 1e-6
    assert (tiled - whole).abs().mean() < 0.25  # the same picture all the same


def test_rows_beyond_a_multiple_of_sixteen_are_dropped():
    ours = make_ours(make_reference(**THIN))
    pixels = pictures(259, 45, batch=1)
    with torch.no_grad():
        for tile in (False, True):
            assert torch.equal(ours.encode(pixels, tile=tile)[0], ours.encode(pixels[..., :256, :32])[0])


def test_bfloat16_is_as_exact_as_the_reference():
    """Two 16-bit runs round differently, so both are measured against the same weights in float32."""
    reference = make_reference().to(torch.bfloat16)
    ours = make_ours(reference)
    exact = make_reference()
    exact.load_state_dict({k: v.float() for k, v in reference.state_dict().items()})
    pixels = pictures(64, 48).to(torch.bfloat16)
    with torch.no_grad():
        truth = exact.encode(pixels.float()[:, :, None]).latent_dist.mode()
        theirs = reference.encode(pixels[:, :, None]).latent_dist.mode()
        mine = ours.encode(pixels)[0]
        assert mine.dtype == torch.bfloat16
        assert relative(mine.float(), truth[:, :, 0]) < max(0.02, 1.5 * relative(theirs.float(), truth))
        z = truth.to(torch.bfloat16)
        picture, other = exact.decode(z.float()).sample, reference.decode(z).sample.float()
        assert relative(ours.decode(z[:, :, 0]).float(), picture[:, :, 0]) < max(0.02, 1.5 * relative(other, picture))


def test_channels_last_gives_the_same_picture():
    reference = make_reference()
    ours = make_ours(reference)
    ours.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    assert max(compare(reference, ours, pictures(48, 64).to(memory_format=torch.channels_last))) < TOLERANCE


def test_adding_in_place_keeps_gradients():
    """`reconstruct` and the encoder, by the gradient that diffusers gives for the same loss."""
    reference = make_reference()
    ours = make_ours(reference)
    pixels = [pictures(32, 32, batch=1).requires_grad_() for _ in range(2)]
    ours.reconstruct(ours.encode(pixels[0])[0]).square().mean().backward()
    z = reference.encode(pixels[1][:, :, None]).latent_dist.mean
    reference.decoder(reference.post_quant_conv(z), feat_cache=[None] * 99, first_chunk=True).square().mean().backward()
    mine, theirs = (each.grad for each in pixels)
    assert mine is not None and theirs is not None
    assert relative(mine, theirs) < 1e-4


def test_half_of_an_averaged_shortcut_is_silent_where_time_is_halved():
    """What distinguishes it from plain pooling: of two channels that one becomes, the first is an absent frame's."""
    x = pictures(4, 6, channels=3)
    shortcut = add_averaged(torch.zeros(2, 6, 2, 3), x, frames=2)
    assert torch.equal(shortcut[:, ::2], torch.zeros(2, 3, 2, 3))
    assert torch.allclose(shortcut[:, 1::2], torch.nn.functional.avg_pool2d(x, 2), atol=1e-6)


def test_official_weights_load_strictly_and_draw_the_same():
    ours = make_ours(make_reference())
    other = make_reference(seed=1)
    other.load_state_dict(to_official_weights(ours.state_dict(), ours.config), strict=True)
    assert max(compare(other, ours, pictures(32, 32))) < TOLERANCE
    back = to_image_weights(other.state_dict())
    assert back.keys() == ours.state_dict().keys()
    assert all(torch.equal(back[k], v) for k, v in ours.state_dict().items())


def test_the_full_size_network():
    """The released geometry by shapes: 337.7 M stored numbers, of which 6.8 M are time convolutions."""

    def count(module: torch.nn.Module) -> int:
        return sum(p.numel() for p in module.parameters())

    with torch.device("meta"):
        reference, ours = Reference(), AutoencoderKLQwenImage21(VAE21Config())
    assert [count(m) for m in (reference, reference.encoder, reference.decoder)] == [337740404, 78675680, 259044052]
    assert [count(m) for m in (ours, ours.encoder, ours.decoder)] == [330_987_188, 77_900_192, 253_066_324]
    shapes = {name: tensor.shape for name, tensor in to_image_weights(reference.state_dict()).items()}
    assert shapes == {name: tensor.shape for name, tensor in ours.state_dict().items()}
    official = to_official_weights(ours.state_dict(), ours.config)
    assert {k: v.shape for k, v in official.items()} == {k: v.shape for k, v in reference.state_dict().items()}
    with torch.device("meta"):
        z = ours.encode(torch.zeros(1, 4, 64, 96))[0]
        assert z.shape == (1, 64, 4, 6) and ours.decode(z).shape == (1, 4, 64, 96)


def test_config_reads_the_official_file_and_refuses_what_it_cannot_run():
    official = dict(Reference(base_dim=4, decoder_base_dim=4).config)  # the rest at its published value
    mine = VAE21Config(base_dim=4, decoder_base_dim=4)
    assert VAE21Config.from_dict({**official, "_class_name": "AutoencoderKLQwenImage21"}) == mine
    for wrong, word in (
        ({"attn_scales": [0.5]}, "attn_scales"),
        ({"is_residual": False}, "is_residual"),
        ({"patch_size": 2}, "patch_size"),
        ({"z_dim": 4}, "z_dim"),
        ({"dim_mult": [1, 2]}, "temperal_downsample"),
        ({"dim_mult": [1, 2, 6, 8, 8]}, "quadruple"),
        ({"dim_mult": [1, 2, 4, 8, 16]}, "last two"),
    ):
        with pytest.raises(ValueError, match=word):
            VAE21Config.from_dict(wrong)
