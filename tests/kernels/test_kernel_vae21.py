"""Qwen-Image-2.1's autoencoder through native kernels against torch, on the same weights."""

from __future__ import annotations

import pytest
import torch

from lanting.attach.vae import attach_vae, detach_vae
from lanting.nn.vae21 import AutoencoderKLQwenImage21, VAE21Config
from lanting.plan.activations21 import laid_bytes
from lanting.plan.geometry import Vae21

CONFIG = VAE21Config.from_dict(
    {
        "base_dim": 8,
        "decoder_base_dim": 12,
        "z_dim": 8,
        "num_res_blocks": 1,
        "latents_mean": [0.0] * 8,
        "latents_std": [1.0] * 8,
    }
)


@pytest.fixture(scope="module")
def nets():
    """The same weights in float32 and bfloat16."""
    torch.manual_seed(0)
    net = AutoencoderKLQwenImage21(CONFIG).eval().requires_grad_(False)
    for name, weight in net.named_parameters():
        if name.endswith("gamma"):
            weight.uniform_(0.5, 1.5)
        else:
            weight.normal_(0, 0.9 / weight[0].numel() ** 0.5 if weight.ndim > 1 else 0.1)
    half = AutoencoderKLQwenImage21(CONFIG).eval().requires_grad_(False)
    half.load_state_dict(net.state_dict())
    return {torch.float32: net, torch.bfloat16: half.bfloat16()}


def both(net, tile=False):
    weight = next(net.parameters())
    torch.manual_seed(1)
    pixels, latents = torch.rand(1, 4, 96, 64) * 2 - 1, torch.randn(1, 8, 6, 4)
    with torch.no_grad():
        encoded = net.encode(pixels.to(weight.dtype), tile=tile)[0]
        return encoded.float(), net.reconstruct(latents.to(weight.dtype)).float()


def far(found, wanted):
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_as_exact_as_torch(nets, dtype):
    exact, net = both(nets[torch.float32]), nets[dtype]
    plain = both(net)
    assert attach_vae(net)
    found = both(net)
    detach_vae(net)
    for ours, theirs, wanted in zip(found, plain, exact, strict=True):
        assert far(ours, wanted) < (1e-5 if dtype == torch.float32 else 1.2 * far(theirs, wanted))
        assert not torch.equal(ours, theirs)  # the kernels did compute
    assert all(torch.equal(a, b) for a, b in zip(both(net), plain, strict=True))


def copies(net):
    return sum(layer.__dict__["laid"][1].data.nbytes for layer in net.modules() if "laid" in layer.__dict__)


def test_copies_are_kept_or_made_anew_and_known_to_the_plan():
    config = VAE21Config.from_dict({"base_dim": 16, "decoder_base_dim": 32, "z_dim": 64, "num_res_blocks": 1})
    net = AutoencoderKLQwenImage21(config).eval().requires_grad_(False)
    z, pixels = torch.randn(1, 64, 2, 2), torch.rand(1, 4, 32, 32)
    told = Vae21(base_dim=16, decoder_base_dim=32, num_res_blocks=1)
    attach_vae(net, keep=False)
    passing = net.reconstruct(z)
    assert copies(net) == 0
    attach_vae(net)
    assert torch.equal(net.reconstruct(z), passing)
    last = 32 * 12 * 16 * 4  # 4 channels out are laid out as 16
    assert copies(net) == laid_bytes(told, False) + last
    net.encode(pixels)
    assert copies(net) == laid_bytes(told, True) + last
