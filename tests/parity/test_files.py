"""Files in ComfyUI's names and types against diffusers' own readers of them."""

from __future__ import annotations

import re

import pytest
import tiny
import torch
from diffusers import QwenImageTransformer2DModel
from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers
from safetensors.torch import load_file, save_file

from lanting.nn.mmdit import TransformerConfig
from lanting.weights.build import build_transformer, build_vae
from lanting.weights.checkpoint import read_json
from lanting.weights.configs import config_of
from lanting.weights.single import open_file, wan_names
from lanting.weights.stored import Placing

CPU = torch.device("cpu")


def wan_state(theirs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """diffusers' tensors under Wan's names, written here by hand, independently of our table."""
    parts = {"norm1": "residual.0", "conv1": "residual.2", "norm2": "residual.3", "conv2": "residual.6"}
    state = {}
    for name, tensor in theirs.items():
        for ours, wan in parts.items():
            name = name.replace(f".{ours}.", f".{wan}.")
        name = name.replace("conv_shortcut", "shortcut").replace("down_blocks", "downsamples")
        name = name.replace("conv_in", "conv1").replace("conv_out", "head.2").replace("norm_out", "head.0")
        for place, wan in (("resnets.0", "0"), ("attentions.0", "1"), ("resnets.1", "2")):
            name = name.replace(f"mid_block.{place}", f"middle.{wan}")
        found = re.match(r"decoder\.up_blocks\.(\d)\.(?:resnets\.(\d)|upsamplers\.0)\.(.*)", name)
        if found:
            name = f"decoder.upsamples.{int(found[1]) * 4 + int(found[2] or 3)}.{found[3]}"
        name = re.sub(r"^quant_conv", "conv1", name)
        state[re.sub(r"^post_quant_conv", "conv2", name)] = tensor
    return state


@pytest.fixture(scope="module")
def official_vae():
    from diffusers import AutoencoderKLQwenImage

    torch.manual_seed(0)
    return AutoencoderKLQwenImage(base_dim=4).eval()


def test_wan_names_as_diffusers_converts_them(official_vae):
    """All 194 tensors of the released autoencoder's layout, by diffusers' converter and by ours."""
    state = wan_state(official_vae.state_dict())
    assert len(state) == 194
    marked = {name: torch.tensor(float(number)) for number, name in enumerate(state)}
    theirs = {name: float(value) for name, value in convert_wan_vae_to_diffusers(dict(marked)).items()}
    assert {ours: float(marked[wan]) for ours, wan in wan_names(state).items()} == theirs


def test_a_wan_named_vae_file_decodes_the_same(official_vae, tmp_path):
    save_file({n: t.contiguous() for n, t in wan_state(official_vae.state_dict()).items()}, tmp_path / "v.safetensors")
    checkpoint = open_file(tmp_path / "v.safetensors")["vae"]
    config = config_of("vae", checkpoint)
    assert all(list(value) == config[key] if isinstance(value, tuple | list) else value == config[key]
               for key, value in official_vae.config.items() if key in config and key[0] != "_")  # fmt: skip
    ours = build_vae(checkpoint, config, Placing(torch.float32, CPU))
    latents = torch.randn(1, 16, 4, 6)
    with torch.no_grad():
        wanted = official_vae.decode(latents[:, :, None]).sample[:, :, 0]
        torch.testing.assert_close(ours.decode(latents), wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_a_transformer_file_as_diffusers_loads_it(prefix, dtype, tmp_path):
    """Lossless 16 bits and the plain 8-bit cast: the same velocities as diffusers' single-file loader gives."""
    net = tiny.transformer("qwen-image-edit-2511")
    net.save_pretrained(tmp_path / "config")
    state = load_file(next((tmp_path / "config").glob("*.safetensors")))
    low = {prefix + name: tensor.to(dtype) for name, tensor in state.items()}
    save_file(low, tmp_path / "bare.safetensors")
    stripped = {name.removeprefix(prefix): tensor for name, tensor in low.items()}  # theirs knows no prefix
    save_file(stripped, tmp_path / "theirs.safetensors")
    theirs = QwenImageTransformer2DModel.from_single_file(
        str(tmp_path / "theirs.safetensors"), config=str(tmp_path / "config"), torch_dtype=torch.float32
    ).eval()
    config = read_json(tmp_path / "config" / "config.json")
    assert TransformerConfig.from_dict(config).zero_cond_t
    checkpoint = open_file(tmp_path / "bare.safetensors")["transformer"]
    ours = build_transformer(checkpoint, config, Placing(torch.float32, CPU))
    latents, words = torch.randn(1, 12, 64), torch.randn(1, 5, tiny.JOINT)
    with torch.no_grad():
        got = ours(latents, torch.tensor([0.4]), words, None, [(1, 2, 3), (1, 2, 3)], 6)
        shapes = [[(1, 2, 3), (1, 2, 3)]]
        wanted = theirs(latents, words, None, torch.tensor([0.4]), img_shapes=shapes, return_dict=False)[0]
    torch.testing.assert_close(got, wanted, atol=3e-5, rtol=1e-4)
