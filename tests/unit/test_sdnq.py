"""Weights as SDNQ saves them: to the bit what it says they are worth, and whole folders that draw as their values do.

`tests/packed/sdnq.safetensors` and its twin are SDNQ's own (`make_sdnq.py` beside them). Folders are made here.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lanting.core.errors import ModelError
from lanting.nn.affine import AffineLinear
from lanting.nn.linears import Fp8Linear, Int8Linear, PackedLinear
from lanting.nn.lowrank import LowRankLinear
from lanting.nn.mmdit import QwenImageTransformer, TransformerConfig
from lanting.nn.numbers import NumberLinear, number_type, pack_runs, unpack_runs, worth
from lanting.nn.qwen_vl import QwenVL, QwenVLConfig
from lanting.nn.rotate import rotate_blocks
from lanting.weights.build import build_text_encoder, build_transformer, store_transformer
from lanting.weights.checkpoint import open_component
from lanting.weights.forms import read_forms, shapes
from lanting.weights.headers import read_metadata
from lanting.weights.inspect import describe
from lanting.weights.single import open_file, open_weights
from lanting.weights.sized import held_bytes
from lanting.weights.stored import Placing, expand

PACKED = Path(__file__).parent.parent / "packed"
FLOAT = Placing(torch.float32, torch.device("cpu"))
SHAPE = TransformerConfig(2, 4, 32, 128, axes_dims_rope=(4, 14, 14))
CONFIG = {**asdict(SHAPE), "axes_dims_rope": [4, 14, 14], "_class_name": "QwenImageTransformer2DModel"}
ONE = "transformer_blocks.0.attn.to_q"
State = dict[str, Tensor]


@pytest.mark.parametrize("file", ["sdnq", "sdnq-kernels"])
def test_values_are_sdnqs(file, tmp_path):
    every = load_file(PACKED / f"{file}.safetensors")
    names = {name.removesuffix(".values") for name in every if name.endswith(".values")}
    assert len(names) == {"sdnq": 40, "sdnq-kernels": 6}[file]
    packing = json.loads(read_metadata(PACKED / f"{file}.safetensors")["quantization_config"])
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": packing}))
    save_file({k: v for k, v in every.items() if not k.endswith(".values")}, tmp_path / "model.safetensors")
    checkpoint = open_component(tmp_path)
    forms = read_forms(checkpoint)
    assert forms.keys() == names
    for name in sorted(names):
        meant, found = every[f"{name}.values"], expand(forms[name], checkpoint, FLOAT)
        assert forms[name].shape == tuple(meant.shape), name
        if "rotated" in name or "thin" in name:  # products, whose sums are taken in another order
            torch.testing.assert_close(found, meant, rtol=1e-5, atol=1e-6)
        else:
            assert torch.equal(found, meant), name


def test_rows_alone(tmp_path):
    """Some rows of a weight, as a table of words is read, are those of the whole."""
    for numbers, rotate in (("uint5", 0), ("int3", 16), ("float6_e3m2fn", 0)):
        layer = NumberLinear(32, 8, False, numbers, 16, rotate)
        layer.weight = torch.randint(256, layer.weight.shape, dtype=torch.uint8)
        layer.weight_scale = torch.rand(8, 2)
        layer.weight_offset = None if layer.weight_offset is None else torch.randn(8, 2)
        rows = torch.tensor([5, 0, 5])
        torch.testing.assert_close(layer.lookup(rows, torch.float32), layer.dense(torch.float32)[rows])
        x = torch.randn(3, 32)
        torch.testing.assert_close(layer(x), x @ layer.dense(torch.float32).T, atol=1e-5, rtol=1e-4)


# ---------------------------------------------------------------- whole folders
def as_numbers(weight: Tensor, name: str, group: int) -> tuple[State, Tensor]:
    """Parts and values of a weight (out, in) of random codes, about as large as it was."""
    told = number_type(name)
    assert told is not None
    (rows, columns), codes = weight.shape, torch.randint(1 << told.bits, weight.shape, dtype=torch.uint8)
    numbers = worth(codes, told)
    scale = torch.rand(rows, columns // group, 1) * 0.1 / numbers.std()
    values = numbers.unflatten(1, (-1, group)) * scale
    parts = {"weight": pack_runs(codes.view(1, -1), told.bits).flatten(), "scale": scale}
    if not told.signed:
        parts["zero_point"] = -values.mean(2, keepdim=True)
        values = values + parts["zero_point"]
    return parts, values.flatten(1)


def grouped(state: State) -> tuple[State, State, dict[str, Any]]:
    """A mix of types, as the dynamic mode chooses it: most are uint4, others are listed."""
    kinds = {".to_q": "int5", ".img_mlp.net.2": "uint6", ".txt_mod.1": "float6_e3m2fn", ".to_k": "float4_e2m2fnu"}
    packing: dict[str, Any] = {"weights_dtype": "uint4", "modules_dtype_dict": {}, "use_svd": False}
    written, meant = dict(state), dict(state)
    for name, tensor in state.items():
        if not name.startswith("transformer_blocks.") or tensor.ndim != 2:
            continue
        path = name.removesuffix(".weight")
        kind = next((kind for end, kind in kinds.items() if path.endswith(end)), "uint4")
        if kind != "uint4":
            packing["modules_dtype_dict"].setdefault(kind, []).append(name)
        parts, meant[name] = as_numbers(tensor, kind, 64)
        written |= {f"{path}.{part}": each for part, each in parts.items()}
    return written, meant, packing


def thin(state: State) -> tuple[State, State, dict[str, Any]]:
    """uint4 with a low rank, rotated, and for kernels, which transpose the thin matrices."""
    packing = {"weights_dtype": "uint4", "use_svd": True, "use_hadamard": True, "hadamard_group_size": 64}
    written, meant = dict(state), dict(state)
    for name, tensor in state.items():
        if not name.startswith("transformer_blocks.") or tensor.ndim != 2:
            continue
        path, (rows, columns) = name.removesuffix(".weight"), tensor.shape
        parts, values = as_numbers(tensor, "uint4", 32)
        up, down = torch.randn(rows, 4) / 20, torch.randn(4, columns) / 20
        parts |= {"svd_up": up.T.contiguous(), "svd_down": down.T.contiguous()}
        meant[name] = rotate_blocks(values + up @ down, 64)
        written |= {f"{path}.{part}": each for part, each in parts.items()}
    return written, meant, packing | {"use_quantized_matmul": True}


def kernels(state: State) -> tuple[State, State, dict[str, Any]]:
    """int8 in rows, transposed; two modules that were left so, and one in 8-bit floats."""
    left, floats = "*.add_q_proj.weight", f"{ONE}.weight"
    packing = {"weights_dtype": "int8", "use_quantized_matmul": True, "modules_to_not_use_matmul": [left]}
    written, meant = dict(state), dict(state)
    for name, tensor in state.items():
        if not name.startswith("transformer_blocks.") or tensor.ndim != 2:
            continue
        path, scale = name.removesuffix(".weight"), tensor.abs().amax(1, keepdim=True) / 127
        codes = (tensor / scale).to(torch.float8_e4m3fn) if name == floats else (tensor / scale).round().to(torch.int8)
        meant[name], turned = codes.float() * scale, not name.endswith(left[1:])
        written |= {name: codes.T if turned else codes, f"{path}.scale": scale.T if turned else scale}
    return written, meant, packing | {"modules_dtype_dict": {"float8_e4m3fn": [floats]}}


SCHEMES = {
    "types": (grouped, {AffineLinear, NumberLinear}),
    "thin": (thin, {LowRankLinear, AffineLinear}),
    "kernels": (kernels, {Int8Linear, Fp8Linear}),
}


@pytest.fixture(scope="module")
def plain() -> State:
    torch.manual_seed(0)
    return QwenImageTransformer(SHAPE).state_dict()


def write(folder: Path, state: State, packing: dict[str, Any], config: dict[str, Any] = CONFIG) -> Path:
    folder.mkdir(exist_ok=True)
    told = config | {"quantization_config": {"quant_method": "sdnq", **packing}}
    (folder / "config.json").write_text(json.dumps(told))
    save_file({name: each.contiguous() for name, each in state.items()}, folder / "model.safetensors")
    return folder


def step(net: nn.Module) -> Tensor:
    make = torch.Generator().manual_seed(5)
    latents = torch.randn(1, 6, SHAPE.in_channels, generator=make)
    words = torch.randn(1, 4, SHAPE.joint_attention_dim, generator=make)
    with torch.no_grad():
        return net(latents, torch.tensor([0.7]), words, None, [(1, 2, 3)], 6)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_folder_draws_as_its_values_do(scheme, plain, tmp_path):
    make, classes = SCHEMES[scheme]
    torch.manual_seed(1)
    written, meant, packing = make(plain)
    checkpoint = open_weights(write(tmp_path / "transformer", written, packing), "transformer")
    net = build_transformer(checkpoint, CONFIG, FLOAT)
    packed = [part for part in net.modules() if isinstance(part, PackedLinear)]
    assert {type(part) for part in packed} == classes
    exact = QwenImageTransformer(SHAPE).eval()
    exact.load_state_dict({name: each.float() for name, each in meant.items()})
    torch.testing.assert_close(step(net), step(exact), atol=5e-5, rtol=1e-4)
    assert shapes(checkpoint) == {name: tuple(each.shape) for name, each in plain.items()}
    assert len(read_forms(checkpoint)) == 28
    told = describe(str(tmp_path / "transformer"))
    assert told.problems == () and told.parts[0].parameters == sum(each.numel() for each in plain.values())
    assert "SDNQ" in " ".join(told.parts[0].dtypes)
    half = build_transformer(checkpoint, CONFIG, Placing(torch.bfloat16, torch.device("cpu")))
    counted = sum(held_bytes(checkpoint, read_forms(checkpoint)).values())
    assert counted == pytest.approx(sum(each.nbytes for each in half.state_dict().values()), rel=0.03)


def test_blocks_are_read_one_by_one(plain, tmp_path):
    """What streams asks for one tensor of a Linear and gets all of its parts."""
    torch.manual_seed(1)
    written, _, packing = thin(plain)
    checkpoint = open_weights(write(tmp_path / "transformer", written, packing), "transformer")
    found = store_transformer(checkpoint, CONFIG, FLOAT).read([f"{ONE}.up"])
    inner = ("residual.weight", "residual.weight_scale", "residual.weight_offset")
    assert found.keys() == {f"{ONE}.{part}" for part in (*inner, "up", "down")}
    assert found[f"{ONE}.residual.weight"].shape == (128, 64) and found[f"{ONE}.up"].shape == (128, 4)


def test_what_people_are_told(plain, tmp_path):
    torch.manual_seed(1)
    for name, make in (("a", grouped), ("b", thin)):
        written, _, packing = make(plain)
        words = {form.words() for form in read_forms(open_component(write(tmp_path / name, written, packing))).values()}
        if name == "a":
            assert {"uint4 in groups of 64, SDNQ", "int5 in groups of 64, SDNQ"} < words
        else:
            assert words == {"uint4 in groups of 32 rotated, low-rank 4, SDNQ"}


def test_a_reader_whose_rows_are_no_whole_bytes(tmp_path):
    """transformers' own names in the config, and a picture tower whose Linears have 100 inputs."""
    text = {"vocab_size": 64, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 1}
    text |= {"num_attention_heads": 1, "num_key_value_heads": 1, "rope_scaling": {"mrope_section": [16, 24, 24]}}
    sight = {"depth": 1, "hidden_size": 160, "intermediate_size": 100, "num_heads": 2, "out_hidden_size": 128}
    config = {"model_type": "qwen2_5_vl", "image_token_id": 9, "text_config": text, "vision_config": sight}
    torch.manual_seed(0)
    state = QwenVL(QwenVLConfig.from_dict(config), vision=True, head=False).state_dict()
    listed = ["model.language_model.layers.0.mlp.up_proj.weight", "model.visual.blocks.0.mlp.down_proj.weight"]
    written, meant = dict(state), {}
    for name in ("model.layers.0.mlp.up_proj.weight", "visual.blocks.0.mlp.down_proj.weight"):
        parts, meant[name] = as_numbers(state[name], "uint6", 4)
        written |= {f"{name.removesuffix('.weight')}.{part}": each for part, each in parts.items()}
    packing = {"weights_dtype": "uint4", "modules_dtype_dict": {"minimum_6bit": [], "uint6": listed}}
    checkpoint = open_weights(write(tmp_path / "text_encoder", written, packing, config), "text_encoder")
    net = build_text_encoder(checkpoint, config, FLOAT, head=False)
    for name, values in meant.items():
        layer = net.get_submodule(name.removesuffix(".weight"))
        assert isinstance(layer, NumberLinear)
        torch.testing.assert_close(layer.dense(torch.float32), values, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "packing", "said"),
    [
        ({}, {"quant_method": "other"}, "SDNQ, without the config"),
        ({}, {"use_codebook": True}, "contradicts itself"),
        ({f"{ONE}.zero_point": None}, {"use_codebook": True}, "contradicts itself"),
        ({f"{ONE}.scale_2": torch.ones(1)}, {}, "SDNQ with scales of few bits"),
        ({}, {"modules_dtype_dict": {"int12": [f"{ONE}.weight"]}}, "SDNQ's int12"),
        ({}, {"modules_dtype_dict": {"uint5": [f"{ONE}.weight"]}}, "contradicts itself"),
        ({}, {"modules_dtype_dict": {"int8": [f"{ONE}.weight"]}}, "contradicts itself"),
        ({f"{ONE}.zero_point": None}, {}, "contradicts itself"),
        ({f"{ONE}.zero_point": torch.ones(128, 1, 1)}, {}, "contradicts itself"),
        ({f"{ONE}.scale": torch.ones(128, 3, 1), f"{ONE}.zero_point": torch.ones(128, 3, 1)}, {}, "contradicts itself"),
        ({f"{ONE}.svd_up": torch.ones(128, 4)}, {}, "contradicts itself"),
        ({f"{ONE}.svd_up": torch.ones(128, 4), f"{ONE}.svd_down": torch.ones(5, 128)}, {}, "contradicts itself"),
        ({}, {"use_hadamard": True, "hadamard_group_size": 128}, "rotated in blocks of 128"),
        (
            {"img_in.weight": torch.zeros(128, 64).byte(), "img_in.scale": torch.ones(64, 1, 1)},
            {},
            "contradicts itself",
        ),
    ],
)
def test_what_would_draw_noise_is_refused(change, packing, said, plain, tmp_path):
    torch.manual_seed(1)
    written, meant = dict(plain), as_numbers(plain[f"{ONE}.weight"], "uint4", 64)[0]
    written |= {f"{ONE}.{part}": each for part, each in meant.items()} | change
    kept = {name: each for name, each in written.items() if each is not None}
    folder = write(tmp_path / "transformer", kept, {"weights_dtype": "uint4", **packing})
    with pytest.raises(ModelError, match=said):
        build_transformer(open_weights(folder, "transformer"), CONFIG, FLOAT)


def test_a_file_without_its_config(plain, tmp_path):
    torch.manual_seed(1)
    folder = write(tmp_path / "transformer", *grouped(plain)[::2])
    with pytest.raises(ModelError, match="without the config"):
        read_forms(open_file(folder / "model.safetensors")["transformer"])
    told = json.loads((folder / "config.json").read_text())
    (folder / "quantization_config.json").write_text(json.dumps(told.pop("quantization_config")))
    (folder / "config.json").write_text(json.dumps(told))
    assert len(read_forms(open_component(folder))) == 28, "SDNQ writes it beside, too"


def test_runs_come_back():
    for bits in range(2, 9):
        codes = torch.randint(1 << bits, (5, 48), dtype=torch.uint8)
        assert torch.equal(unpack_runs(pack_runs(codes, bits), bits), codes)
        assert pack_runs(codes, bits).shape == (5, 6 * bits)
    assert number_type("int9") is None and number_type("float4_e3m2fn") is None and number_type("bfloat16") is None
