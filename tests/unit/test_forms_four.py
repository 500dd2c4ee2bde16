"""Weights of 4 and 8 bits as bitsandbytes and comfy-kitchen write them: to the bit what these packages say.

`tests/packed` holds what the packages made (`make.py`). Whole files are made here, with random codes and scales, and
must draw as their values do, computed in the plainest way.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lanting.core.errors import ModelError
from lanting.nn.fourbit import Nvfp4Linear, TableLinear, small_floats, untiled
from lanting.nn.linears import Fp8Linear, Int8Linear, PackedLinear
from lanting.nn.mmdit import QwenImageTransformer, TransformerConfig
from lanting.plan.kinds import STORED
from lanting.weights.build import build_transformer, store_transformer
from lanting.weights.checkpoint import open_component
from lanting.weights.forms import read_forms, shapes
from lanting.weights.inspect import describe
from lanting.weights.single import open_file
from lanting.weights.sized import held_bytes, kind_of
from lanting.weights.stored import Placing, expand

PACKED = Path(__file__).parent.parent / "packed"
FLOAT = Placing(torch.float32, torch.device("cpu"))
SHAPE = TransformerConfig(6, 4, 32, 128, axes_dims_rope=(4, 14, 14))
CONFIG = {**asdict(SHAPE), "axes_dims_rope": [4, 14, 14], "_class_name": "QwenImageTransformer2DModel"}
ONE = "transformer_blocks.0.attn.to_q"
E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
State = dict[str, Tensor]


@pytest.mark.parametrize("package", ["bitsandbytes", "comfy-kitchen"])
def test_values_are_those_of_the_package(package, tmp_path):
    every = load_file(PACKED / f"{package}.safetensors")
    names = {name.removesuffix(".values") for name in every if name.endswith(".values")}
    assert len(names) > 3
    save_file({k: v for k, v in every.items() if not k.endswith(".values")}, tmp_path / "model.safetensors")
    checkpoint = open_component(tmp_path)
    forms = read_forms(checkpoint)
    assert forms.keys() == names
    for name in sorted(names):
        meant, found = every[f"{name}.values"], expand(forms[name], checkpoint, FLOAT)
        assert forms[name].shape == tuple(meant.shape), name
        if name.startswith("int8"):  # it multiplies by 0.007874 where we divide by 127
            torch.testing.assert_close(found, meant.float(), rtol=1e-4, atol=0)
        else:
            assert torch.equal(found, meant), name
        half = expand(forms[name], checkpoint, Placing(torch.bfloat16, FLOAT.device))
        assert torch.equal(half, found.bfloat16()), "rounded once"


# ---------------------------------------------------------------- whole files: what is written, and what it means
def nf4(state: State, nested: bool) -> tuple[State, State]:
    """As diffusers saves it: every Linear, in and around the blocks."""
    written, meant = {}, {}
    for name, tensor in state.items():
        written[name] = meant[name] = tensor
        if tensor.ndim != 2:
            continue
        codes = torch.randint(16, (tensor.numel(),))
        table, runs = torch.randn(16), -(-tensor.numel() // 64)
        scales, about = torch.rand(runs), {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16"}
        if nested:
            places, second, shared = torch.randint(256, (runs,)), torch.rand(256), torch.rand(-(-runs // 256))
            scales = second[places] * shared.repeat_interleave(256)[:runs] + 0.25
            about |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.25}
            written |= {f"{name}.nested_absmax": shared, f"{name}.nested_quant_map": second}
        written[name] = (codes[::2] << 4 | codes[1::2]).to(torch.uint8)[:, None]
        written |= {f"{name}.quant_map": table, f"{name}.absmax": places.to(torch.uint8) if nested else scales}
        written[f"{name}.quant_state.bitsandbytes__nf4"] = note(about | {"shape": list(tensor.shape)})
        meant[name] = (table[codes] * scales.repeat_interleave(64)[: len(codes)]).view(tensor.shape) / 8
        written[f"{name}.quant_map"] = table / 8
    return written, meant


def nvfp4(state: State) -> tuple[State, State]:
    written, meant = {}, {}
    for name, tensor in state.items():
        written[name] = meant[name] = tensor
        if not name.startswith("transformer_blocks.") or tensor.ndim != 2:
            continue
        path, (rows, columns) = name.removesuffix(".weight"), tensor.shape
        codes, signs = torch.randint(8, tensor.shape), torch.randint(2, tensor.shape)
        scales = torch.rand(rows, columns // 16).to(torch.float8_e4m3fn)
        whole = codes + 8 * signs
        written[name] = (whole[:, ::2] << 4 | whole[:, 1::2]).to(torch.uint8)
        written[f"{path}.weight_scale"] = tiled(scales)
        written |= {f"{path}.weight_scale_2": torch.tensor(0.1), f"{path}.input_scale": torch.tensor(2.0)}
        written[f"{path}.comfy_quant"] = note({"format": "nvfp4"})
        values = torch.tensor(E2M1)[codes] * (1 - 2 * signs)
        meant[name] = values * (scales.float() * 0.1).repeat_interleave(16, 1)
    return written, meant


def mxfp8(state: State) -> tuple[State, State]:
    written, meant = {}, {}
    for name, tensor in state.items():
        written[name] = meant[name] = tensor
        if not name.startswith("transformer_blocks.") or tensor.ndim != 2:
            continue
        path, (rows, columns) = name.removesuffix(".weight"), tensor.shape
        exponents = torch.randint(118, 124, (rows, columns // 32), dtype=torch.uint8)
        written[name] = tensor.to(torch.float8_e4m3fn)
        written[f"{path}.weight_scale"] = tiled(exponents)
        written[f"{path}.comfy_quant"] = note({"format": "mxfp8"})
        meant[name] = written[name].float() * (2.0 ** (exponents.float() - 127)).repeat_interleave(32, 1)
    return written, meant


def int8(state: State) -> tuple[State, State]:
    """bitsandbytes' 8 bits."""
    written, meant = {}, {}
    for name, tensor in state.items():
        written[name] = meant[name] = tensor
        if tensor.ndim == 2:
            path, most = name.removesuffix(".weight"), tensor.float().abs().amax(1)
            written[name] = (tensor.float() * 127 / most[:, None]).round().to(torch.int8)
            written |= {f"{path}.SCB": most, f"{path}.weight_format": torch.tensor(0).byte()}
            meant[name] = written[name] * most[:, None] / 127
    return written, meant


def tiled(scales: Tensor) -> Tensor:
    """By the formula, number by number: what `untiled` takes apart."""
    rows, columns = scales.shape
    down, across = -(-rows // 128), -(-columns // 4)
    found = torch.zeros(down * across * 512, dtype=torch.uint8)
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    tile = row // 128 * across + column // 4
    found[tile * 512 + 16 * (row % 32) + 4 * (row % 128 // 32) + column % 4] = scales.view(torch.uint8)
    return found.view(down * 128, across * 4).view(scales.dtype)


def note(table: object) -> Tensor:
    return torch.tensor(list(json.dumps(table).encode()), dtype=torch.uint8)


SCHEMES = {
    "nf4": (lambda state: nf4(state, nested=False), TableLinear),
    "nf4, nested": (lambda state: nf4(state, nested=True), TableLinear),
    "nvfp4": (nvfp4, Nvfp4Linear),
    "mxfp8": (mxfp8, Fp8Linear),
    "int8 of bitsandbytes": (int8, Int8Linear),
}


@pytest.fixture(scope="module")
def plain() -> State:
    torch.manual_seed(0)
    return QwenImageTransformer(SHAPE).state_dict()


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "config.json").write_text(json.dumps(CONFIG | {"quantization_config": {"a": 1}}))
    return tmp_path / "transformer"


def write(folder: Path, state: State) -> Path:
    save_file({name: each.contiguous() for name, each in state.items()}, folder / "model.safetensors")
    return folder


def step(net: nn.Module) -> Tensor:
    make = torch.Generator().manual_seed(5)
    latents = torch.randn(1, 6, CONFIG["in_channels"], generator=make)
    words = torch.randn(1, 4, CONFIG["joint_attention_dim"], generator=make)
    with torch.no_grad():
        return net(latents, torch.tensor([0.7]), words, None, [(1, 2, 3)], 6)


def of_values(state: State) -> Tensor:
    net = QwenImageTransformer(SHAPE).eval()
    net.load_state_dict({name: each.float() for name, each in state.items()})
    return step(net)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_folder_draws_as_its_values_do(scheme, plain, folder):
    make, cls = SCHEMES[scheme]
    torch.manual_seed(1)
    written, meant = make(plain)
    checkpoint = open_component(write(folder, written))
    net = build_transformer(checkpoint, CONFIG, FLOAT)
    packed = [part for part in net.modules() if isinstance(part, PackedLinear)]
    assert {type(part) for part in packed} == {cls}
    assert len(packed) == len(read_forms(checkpoint)) > 10
    torch.testing.assert_close(step(net), of_values(meant), atol=2e-5, rtol=1e-4)
    assert shapes(checkpoint) == {name: tuple(each.shape) for name, each in plain.items()}
    rows = torch.tensor([5, 0, 5])
    layer = net.get_submodule(ONE)
    assert torch.equal(layer.lookup(rows, torch.float32), layer.dense(torch.float32)[rows])


@pytest.mark.parametrize("scheme", SCHEMES)
def test_people_are_told_what_it_is(scheme, plain, folder):
    torch.manual_seed(1)
    told = describe(str(write(folder, SCHEMES[scheme][0](plain)[0])))
    assert told.notes == told.problems == ()
    assert told.parts[0].parameters == sum(each.numel() for each in plain.values())
    assert scheme.split(",")[0].split()[0] in " ".join(told.parts[0].dtypes)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_memory_is_counted_as_it_is_held(scheme, plain, folder):
    torch.manual_seed(1)
    checkpoint = open_component(write(folder, SCHEMES[scheme][0](plain)[0]))
    told = sum(held_bytes(checkpoint, read_forms(checkpoint)).values())
    net = build_transformer(checkpoint, CONFIG, Placing(torch.bfloat16, torch.device("cpu")))
    held = sum(each.nbytes for each in net.state_dict().values())
    assert 0.95 < told / held < 1.05


def test_blocks_are_read_one_by_one(plain, folder):
    """What streams asks for one tensor of a Linear and gets all of its parts."""
    torch.manual_seed(1)
    stored = store_transformer(open_component(write(folder, nf4(plain, nested=True)[0])), CONFIG, FLOAT)
    found = stored.read([f"{ONE}.weight"])
    parts = ("weight", "quant_map", "absmax", "nested_absmax", "nested_quant_map")
    assert found.keys() == {f"{ONE}.{part}" for part in parts}
    assert found[f"{ONE}.weight"].shape == (128, 64)


@pytest.mark.parametrize(
    ("scheme", "change", "said"),
    [
        ("nf4", {f"{ONE}.weight.absmax": None}, "can't be read"),
        ("nf4", {f"{ONE}.weight.absmax": torch.rand(7)}, "can't be read"),
        ("nf4", {f"{ONE}.weight.quant_map": torch.rand(16).half()}, "can't be read"),
        ("nf4", {f"{ONE}.weight.quant_state.bitsandbytes__nf4": torch.zeros(3, dtype=torch.uint8)}, "can't be read"),
        ("nf4", {f"{ONE}.weight.quant_state.bitsandbytes__nf4": None}, "of type U8"),
        ("nf4, nested", {f"{ONE}.weight.nested_absmax": torch.rand(9)}, "can't be read"),
        ("nf4", {f"{ONE}.weight.quant_state.bitsandbytes__nf4": note({"shape": [1, 2]})}, "can't be read"),
        ("nvfp4", {f"{ONE}.weight_scale_2": None}, "no scales"),
        ("nvfp4", {f"{ONE}.weight_scale": torch.rand(128, 8)}, "no scales"),
        ("nvfp4", {f"{ONE}.weight_scale": torch.rand(4, 8).to(torch.float8_e4m3fn)}, "no scales"),
        ("nvfp4", {f"{ONE}.weight": torch.zeros(128, 64, dtype=torch.int8)}, "nvfp4 of type I8"),
        ("mxfp8", {f"{ONE}.weight_scale": torch.rand(128, 4)}, "no scales"),
        ("mxfp8", {f"{ONE}.weight_scale_2": torch.tensor(1.0)}, "mxfp8"),
        ("int8 of bitsandbytes", {f"{ONE}.weight_format": torch.tensor(2).byte()}, "layout of one GPU"),
        ("int8 of bitsandbytes", {f"{ONE}.SCB": torch.rand(7)}, "cover no weight"),
    ],
)
def test_what_would_draw_noise_is_refused(scheme, change, said, plain, folder):
    torch.manual_seed(1)
    written = SCHEMES[scheme][0](plain)[0] | change
    write(folder, {name: each for name, each in written.items() if each is not None})
    with pytest.raises(ModelError, match=said):
        build_transformer(open_component(folder), CONFIG, FLOAT)


@pytest.mark.parametrize("scheme", ["nf4", "nvfp4", "mxfp8"])
def test_plans_know_the_kind(scheme, plain, folder):
    torch.manual_seed(1)
    checkpoint = open_component(write(folder, SCHEMES[scheme][0](plain)[0]))
    assert STORED[str(kind_of(checkpoint, read_forms(checkpoint)))].name == scheme


def test_floats_of_few_bits_are_torchs():
    codes = torch.arange(256, dtype=torch.uint8)
    meant, found = codes.view(torch.float8_e4m3fn).float(), small_floats(codes, exponent=4, mantissa=3)
    assert torch.equal(found[~meant.isnan()], meant[~meant.isnan()])
    assert small_floats(torch.arange(16), 2, 1).tolist() == [*E2M1, *(-value for value in E2M1)]


@pytest.mark.parametrize(("beside", "said"), [("smooth_factor", "SVDQuant"), ("qzeros", "AWQ / GPTQ")])
def test_whole_files_that_nothing_here_reads_are_named(beside, said, tmp_path):
    path, name = tmp_path / "svdq-int4_r32.safetensors", "transformer_blocks.0.attn.to_qkv"
    zeros = torch.zeros(16, 8, dtype=torch.int8)
    save_file({f"{name}.qweight": zeros, f"{name}.{beside}": torch.zeros(16), "txt_norm.weight": torch.ones(8)}, path)
    with pytest.raises(ModelError, match=f"packed as {said}.*get a bf16"):
        open_file(path)
    told = describe(str(path))
    assert said in told.parts[0].kind.detail and said in str(told.problems[0])


def test_tiles_that_are_none():
    with pytest.raises(ValueError, match="no tiles"):
        untiled(torch.zeros(512, dtype=torch.uint8), 129, 4)
