"""Qwen-Image-2.1's transformer with what a GPU has for it: attention by the best there is, packed products."""

from __future__ import annotations

import pytest
import torch

from lanting.attach.gpu import attach_gpu, detach_gpu
from lanting.kernels.gpu import attention
from lanting.nn.linears import Int8Linear
from lanting.nn.single_stream import QwenImage21Transformer, SingleStreamConfig, keep_prefix
from lanting.nn.swap import swap

NET = SingleStreamConfig(2, 2, 32, 24, 8, 8, 1, 3, (8, 12, 12))


@pytest.fixture
def net(device):
    torch.manual_seed(0)
    net = QwenImage21Transformer(NET).eval().requires_grad_(False)
    for weight in net.parameters():
        weight.normal_(1.0 if weight.ndim == 1 else 0.0, 0.1)
    return net.to(device)


def question(device, padded):
    torch.manual_seed(1)
    latents, words = torch.randn(2, 12 + 6, 8, device=device), torch.randn(2, 7, 24, device=device)
    mask = torch.ones(2, 7, dtype=torch.bool, device=device)
    mask[1, 5:] = False
    time = torch.tensor([0.7, 0.3], device=device)
    return (latents, time, words, mask if padded else None, ((1, 3, 4), (1, 2, 3)), 12), {"places": (2,)}


@pytest.mark.parametrize("padded", [False, True])
def test_attention_is_chosen_and_given_back(net, device, padded, monkeypatch):
    asked, choices = [], attention.choices()
    monkeypatch.setattr(attention, "choices", lambda: lambda *x: asked.append(x[0].shape[1]) or choices(*x))
    given, more = question(device, padded)
    plain = net(*given, **more)
    attach_gpu(net)
    with keep_prefix(net):
        found = [net(*given, **more) for _ in range(2)]
    assert torch.equal(*found)
    assert (found[0] - plain).abs().max() < (1e-5 if device.type == "cpu" else 1e-2) * plain.abs().max()
    target = [] if padded else [12] * 2  # text and what is padded has masks, and is torch's
    assert sorted(asked) == sorted([6, *target, *target])  # the picture once: nobody reads the last block's prefix
    detach_gpu(net)
    assert torch.equal(net(*given, **more), plain)


def test_packed_linears_of_blocks_are_the_kernels(net, device):
    given, more = question(device, False)
    swap(net.transformer_blocks, torch.nn.Linear, lambda path, old: Int8Linear.from_dense(old.weight, old.bias))
    plain = net(*given, **more)
    attach_gpu(net)
    made = [module for module in net.modules() if isinstance(module, Int8Linear)]
    assert len(made) == 14 and all(module.product is not None for module in made)
    found = net(*given, **more)
    assert 0 < (found - plain).abs().max() < 0.05 * plain.abs().max()  # activations are rounded to 8 bits
