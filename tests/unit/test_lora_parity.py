"""The same LoRA file in diffusers: through its own loader where peft is installed, and over merged weights always."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lanting.nn.lora import detach
from lanting.weights.linear_names import transformer_linears
from lanting.weights.lora import attach_loras
from lanting.weights.lora_file import open_lora

CPU = torch.device("cpu")
RANK = 4
FILES = {  # prefix, down, up, alpha
    "lightning": ("", "lora_down.weight", "lora_up.weight", 2.0),
    "diffusers": ("transformer.", "lora_A.weight", "lora_B.weight", None),
    "diffusers with notes": ("transformer.", "lora_A.weight", "lora_B.weight", None),
    "bare": ("", "lora_A.default.weight", "lora_B.default.weight", None),
    "ai-toolkit": ("diffusion_model.", "lora_A.weight", "lora_B.weight", None),
    "kohya": ("lora_unet_", "lora_down.weight", "lora_up.weight", 3.0),
}


@pytest.fixture(scope="module")
def theirs():
    return tiny.transformer()


def linears(net: nn.Module) -> dict[str, nn.Linear]:
    return {name: module for name, module in net.named_modules() if isinstance(module, nn.Linear)}


def write(path: Path, net: nn.Module, kind: str, seed: int) -> Path:
    """A LoRA over every Linear."""
    prefix, down, up, alpha = FILES[kind]
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, module in linears(net).items():
        stem = prefix + (name.replace(".", "_") if kind == "kohya" else name)
        tensors[f"{stem}.{down}"] = torch.randn(RANK, module.in_features, generator=generator) * 0.1
        tensors[f"{stem}.{up}"] = torch.randn(module.out_features, RANK, generator=generator) * 0.1
        if alpha is not None:
            tensors[f"{stem}.alpha"] = torch.tensor(alpha)
    notes = {"format": "pt"}
    if "notes" in kind:
        told = {"r": RANK, "lora_alpha": 6, "target_modules": sorted(linears(net))}
        notes["lora_adapter_metadata"] = json.dumps({f"transformer.{key}": value for key, value in told.items()})
    save_file(tensors, str(path), metadata=notes)
    return path


def both(theirs, ours) -> tuple[torch.Tensor, torch.Tensor]:
    """(theirs, ours) of one batch of two prompts."""
    generator = torch.Generator().manual_seed(1)
    x, text = torch.randn(2, 24, 64, generator=generator), torch.randn(2, 7, tiny.JOINT, generator=generator)
    t, grids = torch.tensor([0.7, 0.31]), [(1, 4, 6)]
    with torch.no_grad():
        want = theirs(x, text, None, t, [grids] * 2, return_dict=False)[0]
        return want, ours(x, t, text, None, grids, 24)


def shapes(net: nn.Module) -> dict[str, tuple[int, int]]:
    return {name: (module.out_features, module.in_features) for name, module in linears(net).items()}


@pytest.mark.parametrize("kind", FILES)
def test_two_files_equal_the_reference_over_merged_weights(theirs, tmp_path, kind):
    ours, merged = tiny.our_transformer(theirs), tiny.transformer()
    prefix, down, up, alpha = FILES[kind]
    scale = 6.0 / RANK if "notes" in kind else 1.0 if alpha is None else alpha / RANK
    loras = []
    for seed, strength in enumerate((0.8, -0.5)):
        path = write(tmp_path / f"{seed}.safetensors", theirs, kind, seed)
        loras.append(open_lora(path, shapes(ours), "", strength))
        tensors = load_file(str(path))
        for name, module in linears(merged).items():
            stem = prefix + (name.replace(".", "_") if kind == "kohya" else name)
            module.weight.data += strength * scale * tensors[f"{stem}.{up}"] @ tensors[f"{stem}.{down}"]
    assert attach_loras(ours, loras, torch.float32, CPU) == len(linears(theirs))
    want, got = both(merged, ours)
    assert (want - got).abs().max() <= 1e-5 * want.abs().max()


@pytest.mark.parametrize("kind", FILES)
def test_one_file_equals_diffusers_own_loader(theirs, tmp_path, kind):
    pytest.importorskip("peft", reason="diffusers loads LoRAs through peft")
    reference = tiny.transformer()
    pipe = tiny.pipeline("text_to_image", transformer=reference, vae=tiny.vae())
    path = write(tmp_path / "one.safetensors", theirs, kind, 3)
    pipe.load_lora_weights(str(tmp_path), weight_name=path.name, adapter_name="one")
    pipe.set_adapters(["one"], [0.7])
    ours = tiny.our_transformer(theirs)
    plain, _ = both(theirs, ours)
    attach_loras(ours, [open_lora(path, shapes(ours), "", 0.7)], torch.float32, CPU)
    want, got = both(reference, ours)
    assert (want - got).abs().max() <= 1e-5 * want.abs().max()
    assert (want - plain).abs().max() > 0.05 * want.abs().max()
    detach(ours)
    again, _ = both(theirs, ours)
    assert torch.equal(again, plain)


def test_a_lora_that_diffusers_writes_is_read(theirs, tmp_path):
    peft = pytest.importorskip("peft", reason="diffusers writes LoRAs through peft")
    reference = tiny.transformer()
    names = ["to_q", "to_out.0", "img_mod.1", "net.2"]
    reference.add_adapter(peft.LoraConfig(r=RANK, lora_alpha=6, target_modules=names, init_lora_weights=False))
    reference.save_lora_adapter(tmp_path, weight_name="mine.safetensors")
    ours = tiny.our_transformer(theirs)
    attach_loras(ours, [open_lora(tmp_path / "mine.safetensors", shapes(ours))], torch.float32, CPU)
    want, got = both(reference, ours)
    assert (want - got).abs().max() <= 1e-5 * want.abs().max()


def test_their_config_tells_all_linears(theirs, tmp_path):
    theirs.save_pretrained(tmp_path)
    assert transformer_linears(json.loads((tmp_path / "config.json").read_text())) == shapes(theirs)
