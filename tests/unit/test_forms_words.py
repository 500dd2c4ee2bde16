"""Language models' packings: AWQ, GPTQ and compressed-tensors, to the bit what these packages say.

`tests/packed` holds what the packages made (`make_words.py`). Whole readers are made here, with random codes, zero
points and scales, and must read as their values do, computed in the plainest way.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lanting.attach.quant import chooser
from lanting.core.errors import ModelError
from lanting.nn.affine import AffineLinear, OrderedLinear
from lanting.nn.fourbit import DividedLinear, Nvfp4Linear
from lanting.nn.linears import Fp8Linear, Int8Linear, PackedLinear
from lanting.nn.mmdit import QwenImageTransformer, TransformerConfig
from lanting.nn.qwen_vl import QwenVL, QwenVLConfig
from lanting.plan.kinds import STORED
from lanting.weights.build import build_text_encoder, store_transformer
from lanting.weights.checkpoint import open_component
from lanting.weights.configs import config_of
from lanting.weights.forms import read_forms, shapes
from lanting.weights.home import embedded_nano
from lanting.weights.inspect import describe
from lanting.weights.single import open_file, open_weights
from lanting.weights.sized import held_bytes, kind_of
from lanting.weights.stored import Placing, expand

PACKED = Path(__file__).parent.parent / "packed"
CPU = torch.device("cpu")
FLOAT = Placing(torch.float32, CPU)
GROUP, Q = 32, "model.layers.0.self_attn.q_proj"
State = dict[str, Tensor]


@pytest.mark.parametrize(("package", "count"), [("awq", 2), ("gptq", 6), ("compressed-tensors", 10)])
def test_values_are_those_of_the_package(package, count, tmp_path):
    every = load_file(PACKED / f"{package}.safetensors")
    meant = {name.removesuffix(".values"): each for name, each in every.items() if name.endswith(".values")}
    write(tmp_path, {k: v for k, v in every.items() if not k.endswith(".values")}, {"quant_method": package})
    checkpoint = open_component(tmp_path)
    forms = read_forms(checkpoint)
    assert forms.keys() == meant.keys() and len(meant) == count
    for name, values in meant.items():
        assert forms[name].shape == tuple(values.shape), name
        assert torch.equal(expand(forms[name], checkpoint, Placing(values.dtype, CPU)), values), name
        exact = expand(forms[name], checkpoint, FLOAT)
        assert torch.equal(exact.to(values.dtype), values), f"{name} is rounded once"


# ---------------------------------------------------------------- whole readers: what is written, and what it means
def stream(codes: Tensor, bits: int) -> Tensor:
    """Codes (rows, n) one behind the other, bit by bit, in words of 32: (rows, words) int32."""
    each = (codes[:, :, None] >> torch.arange(bits) & 1).flatten(1)
    each = torch.cat([each, each.new_zeros(len(each), -each.shape[1] % 32)], 1).unflatten(1, (-1, 32))
    return ((each.long() << torch.arange(32)).sum(2) + 2**31).remainder(2**32).sub(2**31).int()


def random(tensor: Tensor, bits: int, symmetric: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (out, in), zeros and scales (out, groups)."""
    rows, columns = tensor.shape
    zeros = torch.randint(1, 2**bits, (rows, columns // GROUP))
    zeros = torch.full_like(zeros, 2 ** (bits - 1)) if symmetric else zeros
    return torch.randint(2**bits, tensor.shape), zeros, (torch.rand(zeros.shape) / 2 ** (bits + 2)).half()


def values(codes: Tensor, zeros: Tensor, scales: Tensor, place: Tensor | None = None) -> Tensor:
    place = torch.arange(codes.shape[1]) // GROUP if place is None else place
    return (codes - zeros[:, place]) * scales.float()[:, place]


def awq(tensor: Tensor) -> tuple[State, Tensor]:
    codes, zeros, scales = random(tensor, 4)
    moved = [8 * run + place for run in range(len(codes) // 8) for place in (0, 2, 4, 6, 1, 3, 5, 7)]
    parts = {"qweight": stream(codes.T[:, moved], 4), "qzeros": stream(zeros.T[:, moved], 4), "scales": scales.T}
    return parts, values(codes, zeros, scales)


def gptq(tensor: Tensor, bits: int = 4, less: int = 1, apart: bool = False, symmetric: bool = False):
    codes, zeros, scales = random(tensor, bits, symmetric)
    place = torch.arange(tensor.shape[1]) // GROUP
    place = place[torch.randperm(len(place))] if apart else place
    parts = {"qweight": stream(codes, bits).T, "qzeros": stream(zeros.T - less, bits), "scales": scales.T}
    return parts | {"g_idx": place.int()}, values(codes, zeros, scales, place)


def compressed(tensor: Tensor, symmetric: bool = True, apart: bool = False, bits: int = 4) -> tuple[State, Tensor]:
    codes, zeros, scales = random(tensor, bits, symmetric)
    place = torch.arange(tensor.shape[1]) // GROUP
    place = place[torch.randperm(len(place))] if apart else place
    parts = {"weight_packed": stream(codes, bits), "weight_scale": scales, "weight_shape": torch.tensor(tensor.shape)}
    parts |= {} if symmetric else {"weight_zero_point": stream(zeros.T, bits).T}
    parts |= {"weight_g_idx": place.int()} if apart else {}
    return parts, values(codes, zeros, scales, place)


def int8(tensor: Tensor, zeros: bool = False) -> tuple[State, Tensor]:
    codes, scale = torch.randint(-128, 128, tensor.shape), (torch.rand(len(tensor), 1) / 1024).bfloat16()
    zero = torch.randint(-128, 128, (len(tensor), 1)) if zeros else torch.zeros(1, 1)
    parts = {"weight": codes.to(torch.int8), "weight_scale": scale}
    return parts | ({"weight_zero_point": zero.to(torch.int8)} if zeros else {}), (codes - zero) * scale.float()


def fp8(tensor: Tensor, blocks: bool = False) -> tuple[State, Tensor]:
    codes, rows = tensor.float().to(torch.float8_e4m3fn), (len(tensor), 1)
    scale = torch.rand((rows[0] // 64, tensor.shape[1] // 32) if blocks else rows).bfloat16()
    spread = scale.float().repeat_interleave(64, 0).repeat_interleave(32, 1) if blocks else scale.float()
    return {"weight": codes, "weight_scale_inv" if blocks else "weight_scale": scale}, codes.float() * spread


def nvfp4(tensor: Tensor, factor: float = 0) -> tuple[State, Tensor]:
    codes, (rows, columns) = torch.randint(16, tensor.shape), tensor.shape
    scale = torch.rand(rows, columns // 16).to(torch.float8_e4m3fn)
    parts = {"weight_packed": (codes[:, ::2] | codes[:, 1::2] << 4).to(torch.uint8), "weight_scale": scale}
    table = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    scale = scale.float() * factor if factor else scale.float() / 9
    meant = table[codes & 7] * (1 - 2 * (codes >> 3)) * scale.repeat_interleave(16, 1)
    return parts | {"weight_global_scale": torch.tensor([9.0])}, meant


def modelopt(tensor: Tensor) -> tuple[State, Tensor]:
    parts, meant = nvfp4(tensor, 0.3)
    numbers = {"weight_scale_2": torch.tensor(0.3), "input_scale": torch.tensor(3.0)}
    return {"weight": parts["weight_packed"], "weight_scale": parts["weight_scale"]} | numbers, meant


G = {"quant_method": "gptq"}
SCHEMES = {  # how one Linear is written, what config.json says, what it becomes, what people are told
    "awq": (awq, {"quant_method": "awq", "version": "gemm"}, AffineLinear, "uint4 in groups of 32, AWQ"),
    "gptq": (gptq, G, AffineLinear, "uint4 in groups of 32, GPTQ"),
    "gptq, apart": (lambda t: gptq(t, apart=True), G, OrderedLinear, "uint4 in groups of 32, GPTQ"),
    "gptq, 3 bits": (lambda t: gptq(t, 3), G, AffineLinear, "uint3 in groups of 32, GPTQ"),
    "gptq, 8 bits": (lambda t: gptq(t, 8), G, AffineLinear, "uint8 in groups of 32, GPTQ"),
    "gptq, 8 bits, symmetric": (lambda t: gptq(t, 8, symmetric=True), G, Int8Linear, "int8 in groups of 32, GPTQ"),
    "gptq v2": (lambda t: gptq(t, less=0), G | {"checkpoint_format": "gptq_v2"}, AffineLinear, "groups of 32, GPTQ"),
    "w4a16": (compressed, {}, AffineLinear, "uint4 in groups of 32, compressed-tensors"),
    "w4a16, apart": (lambda t: compressed(t, False, True), {}, OrderedLinear, "compressed-tensors"),
    "w8a16": (lambda t: compressed(t, bits=8), {}, Int8Linear, "int8 in groups of 32, compressed-tensors"),
    "w8a8": (int8, {}, Int8Linear, "int8"),
    "w8a8, zeros": (lambda t: int8(t, True), {}, AffineLinear, "uint8 in groups of"),
    "fp8": (fp8, {}, Fp8Linear, "fp8 e4m3 scaled"),
    "fp8, blocks": (lambda t: fp8(t, True), {"quant_method": "fp8"}, Fp8Linear, "fp8 e4m3 scaled"),
    "modelopt": (modelopt, {"quant_method": "modelopt", "quant_algo": "NVFP4"}, Nvfp4Linear, "nvfp4, ModelOpt"),
    "nvfp4": (nvfp4, {}, DividedLinear, "nvfp4, compressed-tensors"),
}


@pytest.fixture(scope="module")
def plain() -> State:
    return load_file(embedded_nano() / "text_encoder" / "model.safetensors")


def config() -> dict[str, object]:
    return json.loads((embedded_nano() / "text_encoder" / "config.json").read_text())


def packed(state: State, scheme: str) -> tuple[State, State]:
    """All Linears of the layers, as a quantizer of language models leaves the rest."""
    torch.manual_seed(1)
    written, meant = {}, {}
    for name, tensor in state.items():
        written[name] = meant[name] = tensor
        if ".layers." in name and tensor.ndim == 2:
            del written[name]
            parts, meant[name] = SCHEMES[scheme][0](tensor)
            written |= {f"{name.removesuffix('weight')}{part}": each for part, each in parts.items()}
    return written, meant


def write(folder: Path, state: State, packing: dict[str, object] | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    save_file({name: each.contiguous() for name, each in state.items()}, folder / "model.safetensors")
    said = {} if packing is None else {"quantization_config": packing}
    (folder / "config.json").write_text(json.dumps(config() | said))
    return folder


def reads(net: nn.Module) -> Tensor:
    with torch.no_grad():
        return net(torch.arange(5, 5 + 40).view(2, 20))


def of_values(state: State) -> Tensor:
    net = QwenVL(QwenVLConfig.from_dict(config())).eval()
    net.load_state_dict({name: each.float() for name, each in state.items()})
    return reads(net)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_reader_reads_as_its_values_do(scheme, plain, tmp_path):
    _, packing, cls, told = SCHEMES[scheme]
    written, meant = packed(plain, scheme)
    folder = write(tmp_path / "text_encoder", written, packing)
    checkpoint = open_weights(folder, "text_encoder")
    wish = Placing(torch.float32, CPU, chooser("text_encoder", "int4"))  # which leaves alone what is packed
    net = build_text_encoder(checkpoint, config(), wish)
    linears = {name: part for name, part in net.named_modules() if isinstance(part, PackedLinear)}
    assert {type(part) for part in linears.values()} == {cls} and len(linears) == 14
    torch.testing.assert_close(reads(net), of_values(meant), atol=2e-5, rtol=1e-4)
    assert shapes(checkpoint) == {name: tuple(each.shape) for name, each in plain.items()}
    rows, layer = torch.tensor([5, 0, 5]), linears[Q]
    assert torch.equal(layer.dense(torch.float32), meant[f"{Q}.weight"])
    assert torch.equal(layer.lookup(rows, torch.float32), layer.dense(torch.float32)[rows])
    # people are told, and plans count what is in memory
    described = describe(str(folder))
    assert described.notes == described.problems == () and told in " ".join(described.parts[0].dtypes)
    assert described.parts[0].parameters == sum(each.numel() for each in plain.values())
    forms = read_forms(checkpoint)
    half = build_text_encoder(checkpoint, config(), Placing(torch.bfloat16, CPU)).state_dict().values()
    assert 0.98 < sum(held_bytes(checkpoint, forms).values()) / sum(each.nbytes for each in half) < 1.02
    assert str(kind_of(checkpoint, forms)) in {*STORED, "int8", "fp8"}


@pytest.mark.parametrize("scheme", ["awq", "gptq, symmetric", "w4a16, apart"])
def test_a_file_needs_no_config_where_its_tensors_tell(scheme, plain, tmp_path, monkeypatch):
    """In transformers' other namings, too."""
    monkeypatch.setitem(SCHEMES, "gptq, symmetric", (lambda t: gptq(t, symmetric=True),))
    written, meant = packed(plain, scheme)
    renamed = {name.replace("model.", "model.language_model.", 1): each for name, each in written.items()}
    folder = write(tmp_path, {name.replace("visual.", "model.visual.", 1): each for name, each in renamed.items()})
    told = describe(str(folder / "model.safetensors"))
    assert told.problems == () and told.parts[0].kind.name == "text_encoder"
    checkpoint = open_file(folder / "model.safetensors")["text_encoder"]
    sides = config_of("text_encoder", checkpoint)["text_config"]
    assert (sides["hidden_size"], sides["intermediate_size"], sides["num_hidden_layers"]) == (128, 384, 2)
    torch.testing.assert_close(
        reads(build_text_encoder(checkpoint, config(), FLOAT)), of_values(meant), atol=2e-5, rtol=1e-4
    )


def test_a_transformer_is_read_so_too(tmp_path):
    torch.manual_seed(0)
    shape = TransformerConfig(6, 4, 32, 128, axes_dims_rope=(4, 14, 14))
    state = QwenImageTransformer(shape).state_dict()
    name = "transformer_blocks.5.img_mlp.net.2"
    parts, meant = awq(state.pop(f"{name}.weight"))
    save_file(
        {f"model.diffusion_model.{key}": each.contiguous() for key, each in state.items()}
        | {f"model.diffusion_model.{name}.{part}": each.contiguous() for part, each in parts.items()},
        tmp_path / "some.safetensors",
    )
    checkpoint = open_file(tmp_path / "some.safetensors")["transformer"]
    stored = store_transformer(checkpoint, config_of("transformer", checkpoint), FLOAT)
    found = stored.read([f"{name}.weight"])
    assert found.keys() == {f"{name}.{part}" for part in ("weight", "weight_scale", "weight_offset")}
    assert torch.equal(stored.fill().get_submodule(name).dense(torch.float32), meant)


def test_older_folders_say_it_in_a_file_of_its_own(plain, tmp_path):
    parts, meant = gptq(plain[f"{Q}.weight"])
    write(tmp_path, {f"{Q}.{part}": each for part, each in parts.items()})
    (tmp_path / "quantize_config.json").write_text('{"bits": 4, "sym": false}')
    checkpoint = open_component(tmp_path)
    assert torch.equal(expand(read_forms(checkpoint)[Q], checkpoint, FLOAT), meant)


def test_zero_points_may_have_borrowed_from_each_other(tmp_path):
    """GPTQModel takes one from each in whole words, so that a zero point of 0 takes it from its neighbour."""
    torch.manual_seed(0)
    parts, _ = gptq(torch.empty(64, 64), less=0)
    zeros = torch.randint(16, (2, 64))
    parts["qzeros"] = stream(zeros, 4) - 0x11111111
    write(tmp_path, {f"{Q}.{part}": each for part, each in parts.items()}, G)
    checkpoint = open_component(tmp_path)
    (form,) = read_forms(checkpoint).values()
    half = expand(form, checkpoint, FLOAT)
    write(tmp_path, {f"{Q}.{part}": each for part, each in {**parts, "qzeros": stream(zeros, 4)}.items()}, V2)
    assert torch.equal(half, expand(read_forms(open_component(tmp_path))[Q], open_component(tmp_path), FLOAT))


V2 = G | {"checkpoint_format": "gptq_v2"}
ONES = torch.ones(8, 8, dtype=torch.int32)


@pytest.mark.parametrize(
    ("scheme", "change", "packing", "said"),
    [
        ("gptq", {}, None, "only its config.json tells"),
        ("gptq", {}, {"quant_method": "auto-round"}, "only its config.json tells"),
        ("gptq", {}, G | {"checkpoint_format": "marlin"}, "GPTQ in a layout of single kernels"),
        ("gptq", {"qzeros": None}, G, "GPTQ in a layout of single kernels"),
        ("gptq", {"qzeros": ONES}, G, "GPTQ in a layout of single kernels"),
        ("gptq", {"qweight": ONES}, G, "do not fit"),
        ("gptq", {"scales": torch.ones(4, 0).half()}, G, "do not fit"),
        ("gptq", {"g_idx": torch.zeros(128, dtype=torch.int32)}, G, "do not fit"),
        ("gptq", {"g_idx": torch.zeros(7, dtype=torch.int32)}, G, "do not fit"),
        ("gptq", {"g_idx": torch.rand(128)}, G, "do not fit"),
        ("gptq", {"scales": torch.ones(3, 128).half()}, G, "layout of single kernels"),
        ("awq", {"scales": torch.ones(4, 128, dtype=torch.int16)}, {"quant_method": "awq"}, "do not fit"),
        ("awq", {"qweight": ONES.short()}, {"quant_method": "awq"}, "AWQ in a layout of single kernels"),
        ("awq", {"qweight": ONES, "qzeros": ONES, "scales": torch.ones(128, 8).half()}, None, "AWQ / GPTQ in a layout"),
        ("w4a16", {"weight_shape": torch.tensor([128])}, {}, "do not fit"),
        ("w4a16", {"weight_shape": torch.tensor([128, 60])}, {}, "that are not full"),
        ("w4a16", {}, {"config_groups": {"group_0": {"weights": {"num_bits": 3}}}}, "that are not full"),
        ("w4a16", {"weight_scale": torch.ones(128, 3)}, {}, "do not fit"),
        ("w4a16", {"weight_zero_point": torch.ones(128, 4, dtype=torch.int32)}, {}, "do not fit"),
        ("w8a8, zeros", {"weight_zero_point": torch.ones(128, 1)}, {}, "do not fit"),
        ("nvfp4", {"weight_global_scale": torch.ones(2)}, {}, "do not fit"),
        ("nvfp4", {"weight_scale": torch.ones(128, 8)}, {}, "do not fit"),
        ("modelopt", {}, {}, "a scheme with weight_scale_2"),
        ("w8a8", {"weight_scale": None, "weight_scales": torch.rand(128)}, None, "as EETQ"),
        ("fp8", {"weight_g_idx": torch.zeros(128, dtype=torch.int32)}, {}, "groups of inputs that do not stand"),
    ],
)
def test_what_would_read_as_noise_is_refused(scheme, change, packing, said, plain, tmp_path):
    parts = {f"{Q}.{part}": each for part, each in SCHEMES[scheme][0](plain[f"{Q}.weight"])[0].items()}
    parts |= {f"{Q}.{part}": each for part, each in change.items()}
    write(tmp_path, {name: each.clone() for name, each in parts.items() if each is not None}, packing)
    with pytest.raises(ModelError, match=said):
        read_forms(open_component(tmp_path))


@pytest.mark.parametrize(
    ("part", "said"),
    [("W_q", "HQQ"), ("q_weight", "EXL2"), ("B", "Marlin"), ("codebooks", "AQLM"), ("trellis", "EXL3")],
)
def test_schemes_that_nothing_here_reads_are_named(part, said, plain, tmp_path):
    state = {f"{Q}.{part}" if name == f"{Q}.weight" else name: each for name, each in plain.items()}
    with pytest.raises(ModelError, match=f"stores {Q} as {said}, which this version can't read"):
        build_text_encoder(open_component(write(tmp_path, state)), config(), FLOAT)
    alone = {name.replace(".weight", f".{part}"): each for name, each in plain.items() if name.endswith("proj.weight")}
    save_file(alone, tmp_path / "all.safetensors")
    with pytest.raises(ModelError, match=f"packed as {said}"):
        open_file(tmp_path / "all.safetensors")
