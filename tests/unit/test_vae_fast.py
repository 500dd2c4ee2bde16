"""The autoencoder through native kernels draws what it draws without them.

In float32 that is rounding. In bfloat16 both ways have errors of their own against float32, most of them from storing
activations: ours stores fewer and rounds what Winograd's sums are made of, so it may not err more than a fifth above
torch's, and usually errs less.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lanting.attach import vae as fast
from lanting.attach.vae import attach_vae, detach_vae
from lanting.kernels import library
from lanting.nn.vae import AutoencoderKLQwenImage, VAEConfig
from lanting.train.vae import nano_config, shipped_vae

SMALL = VAEConfig(base_dim=32, num_res_blocks=1)  # widths 32 to 128: one, two and three vectors of results
NANO = Path(fast.__file__).parents[1] / "nano"
SIZES = [(8, 8), (24, 40), (72, 136)]  # pixels; the last is wider than a strip, with a last row of half tiles
pytestmark = pytest.mark.skipif(not library.ready(), reason="the kernels are not built")


def net(config: VAEConfig = SMALL) -> AutoencoderKLQwenImage:
    """With weights that bfloat16 holds exactly, and gammas that are not all one."""
    torch.manual_seed(0)
    made = AutoencoderKLQwenImage(config).eval().requires_grad_(False)
    for name, each in made.named_parameters():
        each.mul_(torch.rand_like(each) + 0.5) if name.endswith("gamma") else None
        each.copy_(each.bfloat16())
    return made


def pixels(size: tuple[int, int], channels: int = 3, items: int = 1) -> Tensor:
    return torch.rand(items, channels, *size, generator=torch.Generator().manual_seed(1)) * 2 - 1


def both(vae: AutoencoderKLQwenImage, x: Tensor, *, tile: bool = False) -> list[Tensor]:
    """Mean and log-variance of a picture, and the picture of that mean before it is clamped or in tiles."""
    x = x.to(next(vae.parameters()).dtype)
    mean, logvar = vae.encode(x, tile=tile)
    latents = torch.randn(mean.shape, generator=torch.Generator().manual_seed(2)).to(x.dtype)
    return [each.float() for each in (mean, logvar, vae.decode(latents, tile=tile))]


def rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item()


def assert_as_exact(plain: AutoencoderKLQwenImage, x: Tensor, *, tile: bool = False) -> None:
    """The plain network in float64, against itself in float32 with kernels, and in bfloat16 with and without. torch in
    float32 is 2e-6 to 3e-6 off as well, by processor."""
    exact = both(copy.deepcopy(plain).double(), x, tile=tile)
    half, attached = copy.deepcopy(plain).bfloat16(), copy.deepcopy(plain)
    theirs = both(half, x, tile=tile)
    assert attach_vae(attached)
    assert attach_vae(half)
    single, ours = both(attached, x, tile=tile), both(half, x, tile=tile)
    for wanted, one, two, three in zip(exact, single, theirs, ours, strict=True):
        assert one.shape == three.shape == wanted.shape
        assert rms(one - wanted) <= 3e-6 * rms(wanted)
        assert 0 < rms(three - wanted) <= 1.2 * rms(two - wanted)


@pytest.mark.parametrize("size", SIZES)
def test_as_exact_as_without(size):
    assert_as_exact(net(), pixels(size))


def test_a_batch():
    assert_as_exact(net(), pixels((16, 24), items=2))


def test_four_channels():
    assert_as_exact(net(replace(SMALL, input_channels=4)), pixels((32, 16), channels=4))


def test_in_tiles():
    assert_as_exact(net(), pixels((264, 40)), tile=True)


def test_full_width():
    assert_as_exact(net(VAEConfig(num_res_blocks=1)), pixels((32, 40)))


def test_weights_that_were_trained():
    vae = AutoencoderKLQwenImage(nano_config()).eval().requires_grad_(False)
    vae.load_state_dict({name: each.bfloat16().float() for name, each in shipped_vae(NANO).items()})
    assert_as_exact(vae, pixels((64, 48)))


def test_weights_and_names_stay():
    vae = net()
    before = {name: each.clone() for name, each in vae.state_dict().items()}
    attach_vae(vae)
    both(vae, pixels((16, 16)))
    assert list(before) == list(vae.state_dict())
    assert all(torch.equal(before[name], each) for name, each in vae.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_detached_every_bit_is_as_before(dtype):
    vae = net().to(dtype)
    before = both(vae, pixels((24, 40)))
    attach_vae(vae)
    both(vae, pixels((24, 40)))
    detach_vae(vae)
    assert all(torch.equal(one, two) for one, two in zip(before, both(vae, pixels((24, 40))), strict=True))


def test_without_kernels_nothing_is_attached(monkeypatch):
    monkeypatch.setattr(fast, "ready", lambda: False)
    vae = net()
    before = both(vae, pixels((16, 16)))
    assert not attach_vae(vae)
    assert all(torch.equal(one, two) for one, two in zip(before, both(vae, pixels((16, 16))), strict=True))


def test_the_input_stays():
    vae = net()
    attach_vae(vae)
    x, z = pixels((16, 16)).contiguous(memory_format=torch.channels_last), torch.randn(1, 16, 4, 4)
    kept = x.clone(), z.clone()
    vae.encode(x), vae.decode(z)
    assert torch.equal(x, kept[0])
    assert torch.equal(z, kept[1])


def test_new_weights_are_used():
    """Loaded, moved to another dtype or changed in place, after the kernels laid out the old ones."""
    vae, other = net(), net(replace(SMALL, dropout=0.5))
    for each in other.parameters():
        each.mul_(1.25)
    attach_vae(vae)
    z = torch.randn(1, 16, 4, 4)
    vae.decode(z)
    vae.load_state_dict(other.state_dict())
    torch.testing.assert_close(vae.decode(z), other.decode(z), rtol=0, atol=1e-5)
    vae.bfloat16()
    assert rms(vae.decode(z.bfloat16()).float() - other.decode(z)) < 0.02


def test_gradients_are_torchs():
    vae = net()
    attach_vae(vae)
    z = torch.randn(1, 16, 2, 2, requires_grad=True)
    vae.reconstruct(z).square().mean().backward()
    assert z.grad is not None
    assert z.grad.abs().max() > 0


def test_between_torchs_convolutions_where_those_are_faster(monkeypatch):
    monkeypatch.setattr(fast, "multiplies_tiles", lambda: True)
    assert_as_exact(net(), pixels((24, 40)))


def test_one_by_one_convolutions_where_nothing_multiplies_bfloat16(monkeypatch):
    """In parts, the last of which is smaller."""
    own = library.instruction_set()
    layer = torch.nn.Conv2d(48, 40, 1).bfloat16().requires_grad_(False)
    x = torch.randn(2, 48, 9, 7).bfloat16()
    exact, theirs = layer.float()(x.float()), layer.bfloat16()(x)
    monkeypatch.setattr(fast, "ROWS", 50)
    seen = 0
    for name in library.known_sets():
        library.use(name)
        try:
            found = fast.pointwise(layer, x)
        finally:
            library.use(own)
        assert found.shape == theirs.shape
        assert rms(found.float() - exact) <= 1.2 * rms(theirs.float() - exact)
        seen += 1
    assert seen
    nothing = torch.nn.Identity()
    assert fast.pointwise(nothing, x) is x
