"""Qwen-Image-2.1 from files as ComfyUI has them: names under a prefix, two Linears of a block in one, no config."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import tiny
import tiny21
import torch
from safetensors.torch import load_file, save_file

from fakehub import FakeHub, serve
from lanting import Engine, Request
from lanting.cli.main import main
from lanting.core.errors import ModelError
from lanting.nn.qwen3_vl import Qwen3VL, Qwen3VLConfig
from lanting.nn.single_stream import QwenImage21Transformer, SingleStreamConfig
from lanting.nn.vae21 import AutoencoderKLQwenImage21, VAE21Config
from lanting.specs import get_spec
from lanting.weights.checkpoint import Checkpoint
from lanting.weights.configs import config_of
from lanting.weights.find import release_of
from lanting.weights.forms import read_forms
from lanting.weights.headers import TensorInfo
from lanting.weights.inspect import describe
from lanting.weights.linear_names import transformer_linears
from lanting.weights.lora_doctor import examine
from lanting.weights.lora_names import Layers, parse
from lanting.weights.single import open_file

PREFIX = "model.diffusion_model."
WORDS = Request(prompt="a sign", steps=2, seed=7, size=(96, 96))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny21.save_folder(tmp_path_factory.mktemp("models") / "two-one")


def fused(state):
    """diffusers' names as ComfyUI writes them: gate above value."""
    made = {}
    for name, tensor in state.items():
        if ".img_mlp.proj." in name:
            gate = state[name.replace(".proj.", ".gate_layer.")]
            made[name.replace(".proj.", ".gate_up.")] = torch.cat([gate, tensor])
        elif ".img_mlp.gate_layer." not in name:
            made[name] = tensor
    return made


@pytest.fixture(scope="module")
def file(folder, tmp_path_factory):
    (weights,) = (folder / "transformer").glob("*.safetensors")
    path = tmp_path_factory.mktemp("files") / "qwen_image_2.1_turbo.safetensors"
    save_file({PREFIX + name: tensor for name, tensor in fused(load_file(weights)).items()}, path)
    return path


def test_a_file_draws_what_the_folder_draws(folder, file):
    whole = Engine.open(str(folder), device="cpu", dtype="float32").run(WORDS)
    parts = {"text_encoder": str(folder / "text_encoder"), "vae": str(folder / "vae")}
    engine = Engine.open(str(file), device="cpu", dtype="float32", parts=parts)
    assert engine.spec.name == "qwen-image-2.1-turbo" and "licence" in engine.notes[0]
    assert np.array_equal(np.asarray(engine.run(WORDS).images[0]), np.asarray(whole.images[0]))


def test_the_rest_may_come_from_nowhere(file, monkeypatch, tmp_path):
    monkeypatch.setenv("LANTING_HOME", str(tmp_path))
    with pytest.raises(ModelError, match=r"lanting pull qwen-image-2\.1-turbo"):
        Engine.open(str(file))


def test_packed_halves_have_their_scales(tmp_path):
    """One scale for a weight belongs to both halves, scales of rows are parted, and so is a note on the layer."""
    name, rows = "transformer_blocks.0.img_mlp.gate_up", torch.arange(8.0)[:, None]
    weight = torch.randn(8, 4)
    for scale in (torch.tensor(0.5), rows):
        state = {
            "txt_in.text_norm.weight": torch.ones(4),
            f"{name}.weight": weight.to(torch.float8_e4m3fn),
            f"{name}.weight_scale": scale,
        }
        note = {"format_version": "1.0", "layers": {name: {"format": "float8_e4m3fn"}}}
        save_file(state, tmp_path / "x.safetensors", {"_quantization_metadata": json.dumps(note)})
        found = open_file(tmp_path / "x.safetensors")["transformer"]
        forms = read_forms(found)
        for half, place in (("gate_layer", slice(0, 4)), ("proj", slice(4, 8))):
            path = name.replace("gate_up", half)
            assert forms[path].shape == (4, 4) and forms[path].kind == "fp8 e4m3"
            read = found.read([f"{path}.weight", f"{path}.weight_scale"])
            assert torch.equal(read[f"{path}.weight"].float(), state[f"{name}.weight"].float()[place])
            assert torch.equal(read[f"{path}.weight_scale"], scale[place] if scale.ndim else scale)


def test_what_has_no_halves_is_a_sentence(tmp_path):
    state = {"txt_in.text_norm.weight": torch.ones(4), "transformer_blocks.0.img_mlp.gate_up.weight": torch.ones(3, 4)}
    save_file(state, tmp_path / "x.safetensors")
    with pytest.raises(ModelError, match="has no halves"):
        open_file(tmp_path / "x.safetensors")


def shapes_of(net):
    """A checkpoint that has names and shapes, and no file."""
    infos = {name: TensorInfo("BF16", tuple(t.shape), 0, 2 * t.numel()) for name, t in net.state_dict().items()}
    return Checkpoint("a file", dict.fromkeys(infos, tiny21.Path("x")), infos)


def test_configs_are_read_off_the_tensors_of_the_release():
    with torch.device("meta"):
        nets = QwenImage21Transformer(SingleStreamConfig()), AutoencoderKLQwenImage21(VAE21Config())
        reader = Qwen3VL(Qwen3VLConfig())
    transformer, vae = (shapes_of(net) for net in nets)
    assert SingleStreamConfig.from_dict(config_of("transformer", transformer)) == SingleStreamConfig()
    assert VAE21Config.from_dict(config_of("vae", vae)) == VAE21Config()
    assert Qwen3VLConfig.from_dict(config_of("text_encoder", shapes_of(reader))) == Qwen3VLConfig()
    assert release_of(tiny21.Path("mine.safetensors"), transformer)[0] == get_spec("qwen-image-2.1")


def test_a_lora_may_name_the_fused_layer():
    names = ("transformer_blocks.0.img_mlp.gate_layer", "transformer_blocks.0.img_mlp.proj")
    layers = Layers(dict.fromkeys(names, (12, 4)))
    for key in (
        "diffusion_model.transformer_blocks.0.img_mlp.gate_up",
        "lora_unet_transformer_blocks_0_img_mlp_gate_up",
    ):
        name = parse(f"{key}.lora_up.weight")
        assert name is not None
        found = layers.find(name)
        assert [(one.path, one.rows, one.height) for one in found] == [
            (names[0], (0, 12), 24),
            (names[1], (12, 24), 24),
        ]


def test_a_lora_file_is_told_from_those_of_the_first_network(tmp_path):
    state = {}
    for layer, (out, inner) in transformer_linears({"_class_name": "QwenImage21Transformer2DModel"}).items():
        if ".attn." in layer:
            state[f"{layer}.lora_down.weight"] = torch.ones(1, inner, dtype=torch.bfloat16)
            state[f"{layer}.lora_up.weight"] = torch.ones(out, 1, dtype=torch.bfloat16)
    save_file(state, tmp_path / "x.safetensors")
    told = examine(str(tmp_path / "x.safetensors"))
    assert told.fits == ("qwen-image-2.1", "qwen-image-2.1-turbo") and told.matched == 2 * 4 * 32


def test_show_tells_what_they_are(folder, file):
    whole, one = describe(str(folder)), describe(str(file))
    assert [part.kind.name for part in whole.parts] == ["transformer", "vae", "text_encoder"]
    assert whole.release == "qwen-image-2.1" and not whole.problems and "licence" in whole.notes[-1]
    assert one.release == "qwen-image-2.1-turbo" and one.parts[0].kind.detail == "2 blocks of one stream"
    assert "licence" in describe("qwen-image-2.1").notes[-1]


def test_pull_says_the_licence_first(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("LANTING_HOME", str(tmp_path))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    files = {"model_index.json": b"{}", "transformer/diffusion_pytorch_model.safetensors": bytes(3000)}
    with serve(FakeHub("Qwen/Qwen-Image-2.1", files)) as hub:
        assert main(["pull", "qwen-image-2.1", "--endpoint", hub.endpoint, "--dry-run"]) == 0
    assert "allow research only" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["first", "second"])
def test_positions_must_fill_a_head(name, folder, tmp_path):
    made = tiny.save_folder(tmp_path / name) if name == "first" else shutil.copytree(folder, tmp_path / name)
    config = made / "transformer" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"axes_dims_rope": [4, 8, 8]}))
    with pytest.raises(ModelError, match="must add up to"):
        Engine.open(str(made), device="cpu").run(WORDS)
