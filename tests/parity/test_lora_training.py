"""What a LoRA learns is what diffusers and PEFT would teach it: the same gradients, and a file that diffusers loads.

Tolerance: 1e-5 of the largest gradient, float32, small random checkpoints.
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import tiny21
import torch
from diffusers import QwenImagePipeline
from peft import LoraConfig

from lanting.nn.mmdit import QwenImageTransformer
from lanting.specs import get_spec
from lanting.train.lora.dataset import DatasetOptions, read_folder
from lanting.train.lora.job import LoraJob, LoraTraining
from lanting.train.lora.net import LoraNet
from lanting.train.lora.run import LoraRun, export
from lanting.weights.find import locate

RANK, ALPHA = 3, 6.0
LINEARS = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
GRIDS = ((1, 4, 5), (1, 2, 3))


def learning(theirs: Any) -> LoraNet:
    """Our network with the same weights, and LoRAs whose both halves are random."""
    net: QwenImageTransformer = tiny.our_transformer(theirs)
    made = LoraNet(SimpleNamespace(net=net, device=torch.device("cpu"), streamer=None), RANK, ALPHA, "attention", 0)
    draw = torch.Generator().manual_seed(1)
    for one in made.loras.values():
        one.up.data = torch.randn(one.up.shape, generator=draw) * 0.2
    return made


def given(net: QwenImageTransformer) -> tuple[torch.Tensor, ...]:
    """Target and one reference, two prompts; the velocity that is asked for."""
    draw, config = torch.Generator().manual_seed(2), net.config
    latents = torch.randn(2, 26, config.in_channels, generator=draw)
    words = torch.randn(2, 7, config.joint_attention_dim, generator=draw)
    return latents, words, torch.tensor([0.25, 0.7]), torch.randn(2, 20, config.in_channels, generator=draw)


@pytest.mark.parametrize("release", ["qwen-image", "qwen-image-edit-2511"])
def test_gradients_are_those_of_peft(release):
    theirs = tiny.transformer(release)
    ours = learning(theirs)
    latents, words, times, wanted = given(ours.net)
    loss = (ours(latents, times, words, None, GRIDS, 20)[:, :20] - wanted).square().mean()
    ours.learn(loss)

    theirs.add_adapter(LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=[rf"attn.{name}" for name in LINEARS]))
    halves = {path: theirs.get_submodule(path) for path in ours.loras}
    with torch.no_grad():
        for path, one in ours.loras.items():
            halves[path].lora_A["default"].weight.copy_(one.down)
            halves[path].lora_B["default"].weight.copy_(one.up)
    found = theirs(
        hidden_states=latents,
        encoder_hidden_states=words,
        encoder_hidden_states_mask=torch.ones(2, 7, dtype=torch.bool),
        timestep=times,
        img_shapes=[list(GRIDS)] * 2,
        return_dict=False,
    )[0]
    error = (found[:, :20] - wanted).square().mean()
    error.backward()
    assert torch.allclose(loss, error, rtol=1e-5)
    for name, theirs_name in (("down", "lora_A"), ("up", "lora_B")):
        pairs = [
            (getattr(one, name).grad, getattr(halves[path], theirs_name)["default"].weight.grad)
            for path, one in ours.loras.items()
        ]
        pairs = [(a, b) for a, b in pairs if b is not None]
        assert len(pairs) > 0.8 * len(ours.loras)
        largest = max(b.abs().max() for _, b in pairs)
        assert all((a - b).abs().max() <= 1e-5 * largest for a, b in pairs), name


def test_diffusers_loads_the_file(tmp_path):
    """Its alpha is no rank, and nobody has to be told."""
    theirs = tiny.transformer()
    ours = learning(theirs)
    path = export(ours, tmp_path / "mine.safetensors", {"lanting.trigger": "zxq"})
    latents, words, times, _ = given(ours.net)
    asked = {
        "hidden_states": latents,
        "encoder_hidden_states": words,
        "encoder_hidden_states_mask": torch.ones(2, 7, dtype=torch.bool),
        "timestep": times,
        "img_shapes": [list(GRIDS)] * 2,
        "return_dict": False,
    }
    with torch.no_grad():
        plain = theirs(**asked)[0]
        QwenImagePipeline.load_lora_into_transformer(
            QwenImagePipeline.lora_state_dict(str(path)), transformer=theirs, adapter_name="mine"
        )
        found, wanted = theirs(**asked)[0], ours(latents, times, words, None, GRIDS, 20)
    assert (found - wanted).abs().max() <= 0.02 * (wanted - plain).abs().max()  # the file is bfloat16


def test_one_stream_learns_too(tmp_path):
    """Qwen-Image-2.1, with a reference: its words and references stand before the target."""
    model = tiny21.save_folder(tmp_path / "model")
    data = tmp_path / "set"
    (data / "references").mkdir(parents=True)
    for i in range(2):
        tiny.picture(64, 64, seed=i).save(data / f"{i}.png")
        tiny.picture(64, 64, seed=i + 5).save(data / "references" / f"{i}.png")
    found = locate(str(model))
    assert found.spec.name == get_spec("qwen-image-2.1").name
    small = replace(found.spec.defaults, vl_area=64 * 64, vae_area=64 * 64)  # of references; else a megapixel each
    found = replace(found, spec=replace(found.spec, defaults=small))
    examples = read_folder(data, DatasetOptions(caption="make it so"), found.spec.defaults)
    run = LoraRun(steps=6, rank=4, batch=2, lr=1e-2, warmup=1, probe_every=3, targets="all")
    job = LoraJob(found, examples, tmp_path / "one.safetensors", run, device="cpu", dtype="float32")
    probes = [r.probe for r in LoraTraining(job).run(lambda done, count: None) if r.probe is not None]
    assert len(probes) == 3 and probes[-1] < 0.98 * probes[0]
