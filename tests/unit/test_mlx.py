"""Weights as MLX packs them, and whole models as mflux and mlx-vlm save them: names, kernels, groups, other modes.

`tests/packed/mlx.safetensors` is MLX's own (`make_mlx.py` beside it). Whole folders are made here, by mflux's names
written once more.
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lanting.core.errors import ModelError
from lanting.core.types import Request
from lanting.engine import Engine
from lanting.nn.affine import AffineLinear, pack_codes
from lanting.nn.mmdit import QwenImageTransformer, TransformerConfig
from lanting.nn.qwen_vl import QwenVL, QwenVLConfig
from lanting.nn.vae import AutoencoderKLQwenImage, VAEConfig, to_video_weights
from lanting.plan.kinds import STORED
from lanting.weights.build import build_text_encoder, build_transformer
from lanting.weights.checkpoint import open_component
from lanting.weights.configs import SCHEDULER, config_of
from lanting.weights.find import locate
from lanting.weights.forms import read_forms
from lanting.weights.home import Marker, embedded_nano, model_folder, write_marker
from lanting.weights.inspect import describe
from lanting.weights.schemes.mlx import translated
from lanting.weights.single import open_file, open_weights
from lanting.weights.sized import held_bytes, kind_of, planned_model
from lanting.weights.stored import Placing, expand

PACKED = Path(__file__).parent.parent / "packed" / "mlx.safetensors"
FLOAT = Placing(torch.float32, torch.device("cpu"))
SHAPE = TransformerConfig(2, 4, 32, 128, axes_dims_rope=(4, 14, 14))
TEXT = {
    "vocab_size": 8448,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "rope_scaling": {"mrope_section": [16, 24, 24], "rope_type": "default"},
}
SIGHT = {"depth": 1, "hidden_size": 160, "intermediate_size": 100, "num_heads": 2, "out_hidden_size": 128}
READER = {"model_type": "qwen2_5_vl", "image_token_id": 151655, "text_config": TEXT, "vision_config": SIGHT}
CODEC = VAEConfig(base_dim=8, num_res_blocks=1)
ONE = "transformer_blocks.0.attn.to_q"
State = dict[str, Tensor]


def test_values_are_mlxs(tmp_path):
    """Of every number of bits and every group, and of the modes with 8-bit scales."""
    every = load_file(PACKED)
    names = {name.removesuffix(".values") for name in every if name.endswith(".values")}
    assert len(names) == 12
    groups = {name: {"group_size": int(name.split("-")[1])} for name in names}
    (tmp_path / "config.json").write_text(json.dumps({"quantization": {"group_size": 64, "bits": 4, **groups}}))
    save_file({k: v for k, v in every.items() if not k.endswith(".values")}, tmp_path / "model.safetensors")
    checkpoint = open_component(tmp_path)
    forms = read_forms(checkpoint)
    assert forms.keys() == names
    for name in sorted(names):
        assert torch.equal(expand(forms[name], checkpoint, FLOAT), every[f"{name}.values"]), name


# ---------------------------------------------------------------- mflux's folders
def quantized(weight: Tensor, bits: int) -> tuple[State, Tensor]:
    """Parts and values of a weight, rounded to the nearest code of its group of 64."""
    grouped = weight.float().unflatten(1, (-1, 64))
    low, high = grouped.amin(2), grouped.amax(2)
    scale, bias = ((high - low) / (2**bits - 1)).bfloat16(), low.bfloat16()
    codes = ((grouped - bias[:, :, None]) / scale[:, :, None]).round().clamp(0, 2**bits - 1)
    values = codes * scale[:, :, None].float() + bias[:, :, None].float()
    words = pack_codes(codes.flatten(1), bits).view(torch.uint32)
    return {"weight": words, "scales": scale, "biases": bias}, values.flatten(1)


def mlx_saved(state: State, bits: int, leave: tuple[str, ...] = ()) -> tuple[State, State]:
    """All Linears and embeddings whose rows are whole groups packed, kernels with their channels last."""
    written, meant = {}, {}
    for name, tensor in state.items():
        written[name], meant[name] = tensor.bfloat16(), tensor.bfloat16().float()
        if tensor.ndim == 2 and tensor.shape[1] % 64 == 0 and not name.startswith(leave):
            path = name.removesuffix(".weight")
            parts, meant[name] = quantized(tensor, 8 if bits == 4 and ".img_mod." in name else bits)
            written |= {f"{path}.{part}": each for part, each in parts.items()}
        elif tensor.ndim > 3:
            written[name] = tensor.bfloat16().movedim(1, -1)
    return written, meant


def network_name(name: str) -> str:
    name = name.replace("img_mod.1.", "img_mod_linear.").replace("txt_mod.1.", "txt_mod_linear.")
    name = name.replace(".to_out.0.", ".attn_to_out.0.")
    return re.sub(
        r"(img|txt)_mlp\.net\.(0\.proj|2)\.", lambda m: f"{m[1]}_ff.mlp_{'out' if m[2] == '2' else 'in'}.", name
    )


def reader_name(name: str) -> str:
    name = name.replace("merger.mlp.0.", "merger.mlp_0.").replace("merger.mlp.2.", "merger.mlp_1.")
    return name.replace("model.", "encoder.", 1) if name.startswith("model.") else f"encoder.{name}"


def codec_name(name: str) -> str:
    """Of a VAE with one ResNet and one resampler in each block of the encoder, two ResNets in the decoder's."""
    if found := re.match(r"encoder\.down_blocks\.(\d+)\.(resample)?", name):
        block, resampler = divmod(int(found[1]), 2)
        part = "downsamplers.0." if resampler else "resnets.0."
        name = f"encoder.down_blocks.{block}.{part}{name.split('.', 3)[3]}"
    name = re.sub(r"^decoder\.up_blocks\.(\d)", r"decoder.up_block\1", name)
    name = name.replace(".conv_shortcut.", ".skip_conv.").replace(".resample.1.", ".resample_conv.")
    if name.endswith(".gamma"):
        return name.replace(".gamma", ".weight")
    kernels = ("conv_in", "conv_out", "conv1", "conv2", "skip_conv", "quant_conv", "post_quant_conv", "time_conv")
    parts = name.split(".")
    return ".".join([*parts[:-1], "conv3d", parts[-1]]) if parts[-2] in kernels else name


def codec_state() -> State:
    """As published: five axes, and gammas flat as mflux has them."""
    state = to_video_weights(AutoencoderKLQwenImage(CODEC).state_dict(), CODEC)
    return {name: each.flatten() if name.endswith(".gamma") else each for name, each in state.items()}


NAMES = {"transformer": network_name, "text_encoder": reader_name, "vae": codec_name}


def save_mflux(folder: Path, states: dict[str, State], bits: int) -> dict[str, State]:
    """A folder as `mflux-save` leaves it; returns the values."""
    meant: dict[str, State] = {}
    for component, state in states.items():
        written, meant[component] = mlx_saved(state, bits)
        renamed = {NAMES[component](name): each.contiguous() for name, each in written.items()}
        if component == "text_encoder":
            renamed |= {f"encoder.{part}rotary_emb.inv_freq": torch.ones(64) for part in ("", "layers.0.self_attn.")}
        place = folder / component
        place.mkdir(parents=True)
        half, notes = len(renamed) // 2, {"quantization_level": str(bits), "mflux_version": "0.24.0"}
        shards = [dict(list(renamed.items())[:half]), dict(list(renamed.items())[half:])]
        for number, shard in enumerate(shards):
            save_file(shard, place / f"{number}.safetensors", notes)
        where = {name: f"{number}.safetensors" for number, shard in enumerate(shards) for name in shard}
        (place / "model.safetensors.index.json").write_text(json.dumps({"metadata": notes, "weight_map": where}))
    shutil.copytree(embedded_nano() / "tokenizer", folder / "tokenizer")
    return meant


@pytest.fixture(scope="module")
def states() -> dict[str, State]:
    torch.manual_seed(0)
    nets = QwenImageTransformer(SHAPE), QwenVL(QwenVLConfig.from_dict(READER), vision=True, head=False)
    return {"transformer": nets[0].state_dict(), "text_encoder": nets[1].state_dict(), "vae": codec_state()}


@pytest.fixture(autouse=True)
def _own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LANTING_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))


def save_plain(folder: Path, values: dict[str, State]) -> Path:
    """The values as a folder of diffusers'."""
    configs = {
        "transformer": {**asdict(SHAPE), "_class_name": "QwenImageTransformer2DModel"},
        "text_encoder": READER,
        "vae": {**asdict(CODEC), "_class_name": "AutoencoderKLQwenImage"},
    }
    for component, config in configs.items():
        (folder / component).mkdir(parents=True)
        (folder / component / "config.json").write_text(json.dumps(config))
        save_file({k: v.contiguous() for k, v in values[component].items()}, folder / component / "model.safetensors")
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULER))
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "QwenImagePipeline"}))
    shutil.copytree(embedded_nano() / "tokenizer", folder / "tokenizer")
    return folder


def draw(folder: Path) -> np.ndarray:
    with Engine.open(str(folder), device="cpu", dtype="float32", quant="none") as engine:
        return np.asarray(engine.run(Request("a red sign", size=(64, 64), steps=2, seed=3)).images[0])


def dense(net: nn.Module, path: str) -> Tensor:
    layer = net.get_submodule(path)
    assert isinstance(layer, AffineLinear)
    return layer.dense(torch.float32)


@pytest.mark.parametrize("bits", [4, 6])
def test_a_folder_of_mflux_draws_as_its_values_do(bits, states, tmp_path):
    values = save_mflux(tmp_path / f"Qwen-Image-mflux-q{bits}", states, bits)
    found = draw(tmp_path / f"Qwen-Image-mflux-q{bits}")
    far = np.abs(found.astype(float) - draw(save_plain(tmp_path / "qwen-image-plain", values))).mean()
    assert far < (3 if bits == 4 else 0.01), "4 bits may be multiplied by kernels with inputs of 8 bits"
    assert found.std() > 10


def test_what_people_and_plans_are_told(states, tmp_path):
    folder = tmp_path / "Qwen-Image-Edit-2509-mflux-q4"
    save_mflux(folder, states, 4)
    told = describe(str(folder))
    assert told.release == "qwen-image-edit-2509" and not told.problems
    kinds = {part.name: part for part in told.parts}
    assert {"uint4 in groups of 64, MLX", "uint8 in groups of 64, MLX"} <= set(kinds["transformer"].dtypes)
    for component, state in states.items():
        assert kinds[component].parameters == sum(each.numel() for each in state.values()), component
    assert str(folder) in told.runs
    model = planned_model(locate(str(folder)))
    assert model.reader_kind == "uint4" and model.kind is None
    checkpoint = open_weights(folder / "transformer", "transformer")
    counted = sum(held_bytes(checkpoint, read_forms(checkpoint)).values())
    net = build_transformer(
        checkpoint, config_of("transformer", checkpoint), Placing(torch.bfloat16, torch.device("cpu"))
    )
    assert counted == sum(each.nbytes for each in net.state_dict().values())


def test_the_reader_sees(states, tmp_path):
    """The picture tower's kernel is turned, its Linears are packed where whole groups fill them."""
    values = save_mflux(tmp_path / "m", states, 8)["text_encoder"]
    checkpoint = open_weights(tmp_path / "m" / "text_encoder", "text_encoder")
    net = build_text_encoder(checkpoint, config_of("text_encoder", checkpoint), FLOAT, head=False)
    kernel = "visual.patch_embed.proj.weight"
    assert torch.equal(net.state_dict()[kernel], values[kernel])
    assert "visual.merger.mlp.2" in read_forms(checkpoint)


def test_older_saves(states, tmp_path):
    """Without an index, with the first names of the modulation, and without the bias that some versions lost."""
    written, meant = mlx_saved(states["transformer"], 6)
    place = tmp_path / "transformer"
    place.mkdir()
    renamed = {
        network_name(name): each.contiguous() for name, each in written.items() if name != "norm_out.linear.bias"
    }
    renamed = {re.sub(r"(img|txt)_mod_linear", r"\1_norm1.mod_linear", name): each for name, each in renamed.items()}
    half = len(renamed) // 2
    save_file(dict(list(renamed.items())[:half]), place / "0.safetensors")
    save_file(dict(list(renamed.items())[half:]), place / "1.safetensors")
    checkpoint = open_weights(place, "transformer")
    net = build_transformer(checkpoint, config_of("transformer", checkpoint), FLOAT)
    assert not net.state_dict()["norm_out.linear.bias"].any()
    assert torch.equal(dense(net, ONE), meant[f"{ONE}.weight"])


def test_a_reader_of_mlx_vlm(states, tmp_path):
    """Its own prefixes and a config.json that names groups and what is left; a folder and a file."""
    written, meant = mlx_saved(states["text_encoder"], 4, leave=("visual.",))
    theirs = {
        name.replace("model.", "language_model.model.", 1).replace("visual.", "vision_tower.", 1): each.contiguous()
        for name, each in written.items()
    }
    config = READER | {"quantization": {"group_size": 64, "bits": 4}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(theirs, tmp_path / "model.safetensors", {"format": "mlx"})
    for checkpoint in (
        open_weights(tmp_path, "text_encoder"),
        open_file(tmp_path / "model.safetensors")["text_encoder"],
    ):
        net = build_text_encoder(checkpoint, READER, FLOAT, head=False)
        assert STORED[str(kind_of(checkpoint, read_forms(checkpoint)))].name == "uint4"
        path = "model.layers.1.mlp.down_proj"
        assert torch.equal(dense(net, path), meant[f"{path}.weight"])
        kernel = "visual.patch_embed.proj.weight"
        assert torch.equal(net.state_dict()[kernel], meant[kernel])
    for told in (describe(str(tmp_path)), describe(str(tmp_path / "model.safetensors"))):
        assert told.parts[0].kind.name == "text_encoder" and "reads pictures" in str(told.parts[0].kind.detail)


def test_names_of_21():
    """mflux' Qwen-Image-2.1: its own name for one Linear, a reader without a prefix, kernels known by their shape."""
    from lanting.weights.checkpoint import Checkpoint
    from lanting.weights.headers import TensorInfo

    def ours(**shapes: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        infos = {name: TensorInfo("BF16", shape, 0, 0) for name, shape in shapes.items()}
        return {
            n: i.shape for n, i in translated(Checkpoint("x", dict.fromkeys(infos, Path("x")), infos)).infos.items()
        }

    network = {"modulation.layers.1.weight": (64, 8), "modulation.layers.1.scales": (64, 1), "img_in.weight": (16, 4)}
    assert set(ours(**network)) == {"modulation.1.weight", "modulation.1.scales", "img_in.weight"}
    assert set(ours(**network, **{"pos_embed.cos_tables.0": (4,), "time_text_embed.time_proj.freqs": (4,)})) == set(
        ours(**network)
    )
    reader = {"embed_tokens.weight": (64, 8), "layers.0.self_attn.q_norm.weight": (8,), "norm.weight": (8,)}
    assert set(ours(**reader)) == {f"model.{name}" for name in reader}
    seeing = {f"language_model.{name}": shape for name, shape in reader.items()} | {
        "visual.patch_embed.proj.weight": (16, 2, 4, 4, 3),
        "lm_head.weight": (64, 8),
    }
    assert ours(**seeing)["visual.patch_embed.proj.weight"] == (16, 3, 2, 4, 4)
    assert set(ours(**seeing)) == {
        *(f"model.{name}" for name in reader),
        "visual.patch_embed.proj.weight",
        "lm_head.weight",
    }
    codec = {"decoder.conv_in.weight": (32, 3, 3, 64), "encoder.conv_in.weight": (8, 3, 3, 3), "norm_out.gamma": (8,)}
    assert ours(**codec) == codec | {"decoder.conv_in.weight": (32, 64, 3, 3)}
    older = {
        "decoder.conv_in.conv.weight": (32, 3, 3, 64),
        "decoder.up_blocks.0.upsampler.conv.bias": (8,),
        "decoder.up_blocks.0.resnets.1.norm1.weight": (8,),
    }
    with pytest.raises(ModelError, match="contradicts itself"):
        ours(**network, **{"modulation.1.weight": (64, 8)})
    assert set(ours(**older)) == {
        "decoder.conv_in.weight",
        "decoder.up_blocks.0.upsampler.resample.1.bias",
        "decoder.up_blocks.0.resnets.1.norm1.gamma",
    }


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({f"{ONE}.biases": None}, "of type U32"),
        ({f"{ONE}.scales": None}, "of type U32"),
        ({f"{ONE}.scales": torch.ones(128, 3)}, "of type U32"),
        ({f"{ONE}.scales": torch.ones(7, 2)}, "of type U32"),
        ({f"{ONE}.biases": torch.ones(128, 1)}, "of type U32"),
        ({f"{ONE}.weight": torch.zeros(128, 28, dtype=torch.uint32)}, "of type U32"),
        (
            {
                f"{ONE}.weight": torch.zeros(128, 8, dtype=torch.uint32),
                f"{ONE}.scales": torch.ones(128, 1),
                f"{ONE}.biases": torch.ones(128, 1),
            },
            r"shape \(128, 64\)",
        ),
        ({"transformer_blocks.1.img_mod_linear.weight": None}, "lacks"),
    ],
)
def test_what_would_draw_noise_is_refused(change, said, states, tmp_path):
    written = {network_name(name): each for name, each in mlx_saved(states["transformer"], 4)[0].items()} | change
    save_file({k: v.contiguous() for k, v in written.items() if v is not None}, tmp_path / "model.safetensors")
    checkpoint = open_component(tmp_path)
    with pytest.raises(ModelError, match=said):
        build_transformer(checkpoint, {**asdict(SHAPE)}, FLOAT)


def test_a_folder_that_lacks_parts(states, tmp_path):
    save_mflux(tmp_path / "half", {"transformer": states["transformer"]}, 4)
    with pytest.raises(ModelError, match="half holds transformer of qwen-image and nothing else"):
        locate(str(tmp_path / "half"))
    assert "nothing else" in str(describe(str(tmp_path / "half")).problems[0])


def test_one_that_was_pulled(states):
    """By its repository's name, which tells the release."""
    folder = model_folder("someone/Qwen-Image-2512-mflux-q6")
    save_mflux(folder, states, 6)
    write_marker(folder, Marker("someone/Qwen-Image-2512-mflux-q6", "main", "0" * 40, "https://example.org"))
    found = locate("someone/Qwen-Image-2512-mflux-q6")
    assert found.spec.name == "qwen-image-2512" and found.tokenizer == folder / "tokenizer"
    assert found.configs["transformer"]["num_layers"] == 2 and found.configs["vae"]["base_dim"] == 8
