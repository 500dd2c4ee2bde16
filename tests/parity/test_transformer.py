"""Our transformer and ControlNet against diffusers' on the same random weights."""

from __future__ import annotations

import pytest
import torch
from diffusers import QwenImageTransformer2DModel
from diffusers.models.controlnets.controlnet_qwenimage import QwenImageControlNetModel

from lanting.nn.controlnet import ControlNetConfig, QwenImageControlNet
from lanting.nn.mmdit import QwenImageTransformer, TransformerConfig, sinusoid
from lanting.nn.rope import tables

TINY = {
    "patch_size": 2,
    "in_channels": 64,
    "out_channels": 16,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 24,
    "axes_dims_rope": (4, 6, 6),
}
VARIANTS = {
    "plain": {},
    "edit-2511": {"zero_cond_t": True},
    "layered": {"use_additional_t_cond": True, "use_layer3d_rope": True},
}


def twins(**config):
    """(theirs, ours) with the same weights, every one of them random so that no path is silent."""
    torch.manual_seed(0)
    theirs = QwenImageTransformer2DModel(**{**TINY, "num_layers": 3, **config}).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    ours = QwenImageTransformer(TransformerConfig.from_dict(theirs.config)).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


def both(theirs, ours, grids, lengths, dtype=torch.float32, control=None):
    """Run the pair on a batch of prompts of `lengths` tokens over `grids`; returns (theirs, ours)."""
    generator = torch.Generator().manual_seed(1)
    tokens = sum(f * h * w for f, h, w in grids)
    batch, longest = len(lengths), max(lengths)
    x = torch.randn(batch, tokens, 64, generator=generator).to(dtype)
    text = torch.randn(batch, longest, 24, generator=generator).to(dtype)
    mask = torch.tensor([[i < n for i in range(longest)] for n in lengths])
    t = torch.tensor([0.7, 0.31][:batch])
    extra = {"additional_t_cond": torch.zeros(batch, dtype=torch.long)} if ours.config.use_layer3d_rope else {}
    target = grids[0][1] * grids[0][2] * (len(grids) - 1 if ours.config.use_layer3d_rope else 1)
    with torch.no_grad():
        want = theirs(
            hidden_states=x,
            timestep=t.to(dtype),
            encoder_hidden_states=text,
            encoder_hidden_states_mask=None if mask.all() else mask,
            img_shapes=[list(grids)] * batch,
            controlnet_block_samples=control,
            return_dict=False,
            **extra,
        )[0]
        got = ours(x, t, text, None if mask.all() else mask, grids, target, control=control or ())
    return want, got


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("lengths", [(5,), (7, 4)])
@pytest.mark.parametrize("grids", [[(1, 4, 6)], [(1, 5, 3), (1, 4, 4), (1, 7, 2)], [(1, 3, 3)] * 4])
def test_every_variant_equals_the_reference(variant, lengths, grids):
    if variant == "layered" and len(grids) == 1:
        grids = grids * 2  # a layered release always has a condition picture
    want, got = both(*twins(**VARIANTS[variant]), grids, lengths)
    assert (want - got).abs().max() <= 1e-5 * want.abs().max()


@pytest.mark.parametrize("variant", VARIANTS)
def test_bfloat16_stays_within_two_roundings(variant):
    theirs, ours = twins(**VARIANTS[variant])
    want, got = both(theirs.bfloat16(), ours.bfloat16(), [(1, 4, 6), (1, 3, 5)], (7, 4), torch.bfloat16)
    assert (want.float() - got.float()).norm() <= 1e-2 * want.float().norm()


def test_one_block_at_full_width():
    config = {
        "num_layers": 1,
        "attention_head_dim": 128,
        "num_attention_heads": 24,
        "joint_attention_dim": 24,
        "axes_dims_rope": (16, 56, 56),
    }
    torch.manual_seed(0)
    theirs = QwenImageTransformer2DModel(**{**TINY, **config}).eval()
    with torch.device("meta"):
        ours = QwenImageTransformer(TransformerConfig.from_dict(theirs.config)).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True, assign=True)
    want, got = both(theirs, ours, [(1, 8, 6), (1, 4, 4)], (9,))
    assert (want - got).abs().max() <= 1e-5 * want.abs().max()


@pytest.mark.parametrize("nets", [1, 2])
def test_control_residuals_are_spread_over_the_blocks(nets):
    theirs, ours = twins()
    residuals = [torch.randn(1, 24, 32, generator=torch.Generator().manual_seed(i)) for i in range(nets)]
    want, got = both(theirs, ours, [(1, 4, 6)], (5,), control=residuals)
    plain, _ = both(theirs, ours, [(1, 4, 6)], (5,))
    assert (want - got).abs().max() <= 1e-5 * want.abs().max()
    assert (want - plain).abs().max() > 0.1


@pytest.mark.parametrize("extra", [0, 4])
def test_controlnet_equals_the_reference(extra):
    torch.manual_seed(0)
    theirs = QwenImageControlNetModel(**TINY, num_layers=2, extra_condition_channels=extra).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    ours = QwenImageControlNet(ControlNetConfig.from_dict(theirs.config)).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x, hint, text = torch.randn(2, 24, 64), torch.randn(2, 24, 64 + extra), torch.randn(2, 6, 24)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]]).bool()
    t = torch.tensor([0.7, 0.2])
    with torch.no_grad():
        want = theirs(x, hint, 0.6, text, mask, t, [[(1, 4, 6)]] * 2, return_dict=False)
        want = want[0] if isinstance(want[0], (list, tuple)) else want
        got = [0.6 * residual for residual in ours(x, hint, t, text, mask, [(1, 4, 6)])]
    assert len(want) == len(got) == 2
    for a, b in zip(want, got, strict=True):
        assert (a - b).abs().max() <= 1e-5 * a.abs().max()


def test_parameter_counts_of_the_releases():
    with torch.device("meta"):
        base = QwenImageTransformer(TransformerConfig())
        layered = QwenImageTransformer(TransformerConfig(use_additional_t_cond=True, use_layer3d_rope=True))
    assert sum(p.numel() for p in base.parameters()) == 20_430_401_088
    assert sum(p.numel() for p in layered.parameters()) == 20_430_407_232
    assert len(base.state_dict()) == 1933


def test_sinusoid_golden_values():
    at = [0, 1, 127, 128, 129, 255]
    want = {
        0.5: [-0.883849, 0.945946, 0.998557, -0.467772, 0.324325, 0.053705],
        1.0: [0.562379, 0.789627, 0.994232, 0.826880, 0.613588, 0.107254],
    }
    for t, values in want.items():
        assert torch.allclose(sinusoid(torch.tensor(t))[at], torch.tensor(values), atol=2e-6)


def test_rope_golden_values():
    text, image = tables(((1, 4, 5), (1, 3, 3)), 3, (16, 56, 56), layered=False)
    slowest = (
        image[:, 0],
        image[:, 8],
        image[:, 36],
    )  # frequency 1 of frame, row and column: the position itself
    assert slowest[0].tolist() == [0.0] * 20 + [1.0] * 9
    assert slowest[1][:20:5].tolist() == [-2, -1, 0, 1] and slowest[1][20::3].tolist() == [-2, -1, 0]
    assert slowest[2][:5].tolist() == [-3, -2, -1, 0, 1] and slowest[2][20:23].tolist() == [-2, -1, 0]
    assert text[:, 0].tolist() == [2, 3, 4]
    assert torch.allclose(image[0, 9].cos(), torch.tensor(0.131047), atol=1e-6)
    assert torch.allclose(image[0, 9].sin(), torch.tensor(-0.991376), atol=1e-6)


def test_long_prompts_pass_the_reference_table_end():
    """diffusers' tables end at 4096 positions and fail there with a shape error; ours are computed as needed."""
    text, _ = tables(((1, 64, 64),), 4200, (16, 56, 56), layered=False)
    assert text.shape == (4200, 64) and text[-1, 0] == 32 + 4199
