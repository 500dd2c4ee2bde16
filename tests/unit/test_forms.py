"""Every form in which people have safetensors weights: what is recognised, what it is worth, what is refused.

The files are made of a small transformer with random weights, in the names and types that other programs write. What
they must give is computed here in the plainest way, from the numbers that were written.
"""

from __future__ import annotations

import json
import random
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lanting.core.errors import LantingError, ModelError
from lanting.nn.linears import Fp8Linear, Int8Linear, PackedLinear
from lanting.nn.mmdit import QwenImageTransformer, TransformerConfig
from lanting.nn.rotate import rotate_blocks
from lanting.weights.build import build_transformer, store_transformer
from lanting.weights.checkpoint import open_component
from lanting.weights.configs import config_of
from lanting.weights.forms import read_forms, shapes
from lanting.weights.single import open_file
from lanting.weights.stored import Placing

FLOAT = Placing(torch.float32, torch.device("cpu"))
SHAPE = TransformerConfig(6, 4, 32, 128, axes_dims_rope=(4, 14, 14))
CONFIG = {**asdict(SHAPE), "axes_dims_rope": [4, 14, 14]}
ONE = "transformer_blocks.0.attn.to_q"
PREFIX = "model.diffusion_model."


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    place = tmp_path_factory.mktemp("transformer")
    state = QwenImageTransformer(SHAPE).bfloat16().state_dict()
    save_file(state, place / "diffusion_pytorch_model.safetensors")
    (place / "config.json").write_text(json.dumps(CONFIG))
    return place


@pytest.fixture(scope="module")
def plain(folder: Path) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in open_component(folder).tensors()}


def is_block_weight(name: str, tensor: Tensor) -> bool:
    return name.startswith("transformer_blocks.") and tensor.ndim == 2


def note(table: object) -> Tensor:
    return torch.tensor(list(json.dumps(table).encode()), dtype=torch.uint8)


def write(path: Path, state: dict[str, Tensor], notes: dict[str, str] | None = None, prefix: str = "") -> Path:
    save_file({prefix + name: tensor.contiguous() for name, tensor in state.items()}, path, notes)
    return path


def step(state_or_net, dtype: torch.dtype = torch.float32) -> Tensor:
    """One denoising step's velocity, of a network or of plain weights."""
    net = state_or_net
    if isinstance(net, dict):
        net = QwenImageTransformer(TransformerConfig.from_dict(CONFIG)).eval()
        net.load_state_dict({name: tensor.to(dtype) for name, tensor in state_or_net.items()}, assign=True)
    make = torch.Generator().manual_seed(5)
    latents = torch.randn(1, 6, CONFIG["in_channels"], generator=make)
    words = torch.randn(1, 4, CONFIG["joint_attention_dim"], generator=make)
    with torch.no_grad():
        return net(latents.to(dtype), torch.tensor([0.7]), words.to(dtype), None, [(1, 2, 3)], 6)


def load(path: Path):
    checkpoint = open_file(path)["transformer"]
    return build_transformer(checkpoint, CONFIG, FLOAT), read_forms(checkpoint)


# ---------------------------------------------------------------- the schemes: (what is written, notes, values meant)
def plain_fp8(state):
    """qwen_image_fp8_e4m3fn: everything cast down, biases and norms too."""
    low = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in state.items()}
    return low, None, {name: tensor.float() for name, tensor in low.items()}


def plain_e5m2(state):
    low = {name: t.to(torch.float8_e5m2) if is_block_weight(name, t) else t for name, t in state.items()}
    return low, None, {name: tensor.float() for name, tensor in low.items()}


def scaled(state, put, scale_name):
    """fp8 by tensor: `put` adds what a scheme writes beside each weight."""
    written, meant = {}, {}
    for name, tensor in state.items():
        if not is_block_weight(name, tensor):
            written[name] = meant[name] = tensor
            continue
        path, scale = name.removesuffix(".weight"), tensor.float().abs().amax() / 448
        written[name] = (tensor.float() / scale).to(torch.float8_e4m3fn)
        written[f"{path}.{scale_name}"] = scale
        written |= put(path)
        meant[name] = written[name].float() * scale
    return written, meant


def old_scaled_fp8(state):
    """`scaled_fp8` marks the file; high layers carry a scale of 1, which means nothing."""
    written, meant = scaled(state, lambda path: {f"{path}.scale_input": torch.tensor(2.0)}, "scale_weight")
    written["scaled_fp8"] = torch.empty(2, dtype=torch.float8_e4m3fn)
    written["img_in.scale_weight"] = torch.tensor(1.0)
    return written, None, meant


def new_scaled_fp8(state):
    mark = lambda path: {  # noqa: E731
        f"{path}.comfy_quant": note({"format": "float8_e4m3fn", "full_precision_matrix_mult": True}),
        f"{path}.input_scale": torch.tensor(1.5),
    }
    written, meant = scaled(state, mark, "weight_scale")
    return written, None, meant


def noted_scaled_fp8(state):
    """The same with one note for all layers in the header, and bytes instead of 8-bit floats."""
    written, meant = scaled(state, lambda path: {}, "weight_scale")
    layers = {n.removesuffix(".weight_scale"): {"format": "float8_e4m3fn"} for n in written if "weight_scale" in n}
    low = {n: t.view(torch.uint8) if t.dtype == torch.float8_e4m3fn else t for n, t in written.items()}
    return low, {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})}, meant


def int8_rows(state, rotate=0):
    written, meant = {}, {}
    for name, tensor in state.items():
        if not is_block_weight(name, tensor):
            written[name] = meant[name] = tensor
            continue
        path = name.removesuffix(".weight")
        turned = rotate_blocks(tensor.float(), rotate) if rotate else tensor.float()
        scale = turned.abs().amax(1) / 127
        written[name] = (turned / scale[:, None]).round().to(torch.int8)
        written[f"{path}.weight_scale"] = scale
        what = {"format": "int8_tensorwise"} | ({"convrot": True, "convrot_groupsize": rotate} if rotate else {})
        written[f"{path}.comfy_quant"] = note(what)
        values = written[name].float() * scale[:, None]
        meant[name] = rotate_blocks(values, rotate) if rotate else values
    return written, None, meant


def int8_blocks(state):
    written, meant = {}, {}
    for name, tensor in state.items():
        written[name] = meant[name] = tensor
        if is_block_weight(name, tensor) and tensor.shape[0] % 128 == 0:
            path, (rows, columns) = name.removesuffix(".weight"), tensor.shape
            blocks = tensor.float().view(rows // 128, 128, columns // 128, 128)
            scale = blocks.abs().amax((1, 3)) / 127
            codes = (blocks / scale[:, None, :, None]).round().to(torch.int8)
            written[name], written[f"{path}.weight_scale"] = codes.view(rows, columns), scale
            written[f"{path}.comfy_quant"] = note({"format": "int8_blockwise", "group_size": 128})
            meant[name] = (codes.float() * scale[:, None, :, None]).view(rows, columns)
    return written, None, meant


SCHEMES = {
    "16-bit floats": (lambda state: (state, None, state), None),
    "plain fp8": (plain_fp8, "fp8 e4m3"),
    "plain fp8 e5m2": (plain_e5m2, "fp8 e5m2"),
    "scaled fp8, old": (old_scaled_fp8, "fp8 e4m3"),
    "scaled fp8, new": (new_scaled_fp8, "fp8 e4m3"),
    "scaled fp8, noted in the header": (noted_scaled_fp8, "fp8 e4m3"),
    "int8 by row": (int8_rows, "int8"),
    "int8 rotated": (lambda state: int8_rows(state, 64), "int8"),
    "int8 in blocks": (int8_blocks, "int8"),
}


@pytest.mark.parametrize("prefix", ["", PREFIX])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_file_draws_as_its_values_do(scheme, prefix, plain, tmp_path):
    make, kind = SCHEMES[scheme]
    written, notes, meant = make(plain)
    if notes and prefix:
        layers = json.loads(notes["_quantization_metadata"])["layers"]
        notes = {"_quantization_metadata": json.dumps({"layers": {prefix + path: v for path, v in layers.items()}})}
    net, forms = load(write(tmp_path / "file.safetensors", written, notes, prefix))
    assert {form.kind for form in forms.values()} == ({kind} if kind else set())
    packed = [part for part in net.modules() if isinstance(part, PackedLinear)]
    assert len(packed) == len(forms), "what is packed in the file stays packed"
    assert (forms == {}) == (ONE not in forms)
    torch.testing.assert_close(step(net), step(meant), atol=2e-5, rtol=1e-4)


def test_a_plain_fp8_file_takes_a_byte_a_weight(plain, tmp_path):
    net, _ = load(write(tmp_path / "file.safetensors", plain_fp8(plain)[0]))
    block = net.transformer_blocks[0].attn.to_q
    assert isinstance(block, Fp8Linear)
    assert block.weight.dtype == torch.float8_e4m3fn
    assert block.weight_scale is None
    assert block.bias.dtype == torch.float32


@pytest.mark.parametrize("source", ["file", "packed while loading"])
def test_what_waits_in_ram_for_a_gpu_without_8_bit_floats_waits_as_bytes(source, plain, tmp_path):
    """Apple's GPUs can't be given such floats: blocks that stream, the modulation's table and networks that take turns
    are read to the CPU first."""
    from lanting.attach.quant import chooser

    state = old_scaled_fp8(plain)[0] if source == "file" else plain
    checkpoint = open_file(write(tmp_path / "file.safetensors", state))["transformer"]
    choose = None if source == "file" else chooser("transformer", "fp8")
    found = {}
    for kind in ("mps", "cpu"):
        stored = store_transformer(checkpoint, CONFIG, Placing(torch.float32, torch.device(kind), choose))
        found[kind] = stored.read([name for name in stored.shapes if name.startswith(f"{ONE}.")])
    assert all(tensor.dtype in (torch.uint8, torch.float32) for tensor in found["mps"].values())
    assert found["cpu"][f"{ONE}.weight"].dtype == torch.float8_e4m3fn
    for name, tensor in found["cpu"].items():
        same = tensor.view(torch.uint8) if name == f"{ONE}.weight" else tensor
        assert torch.equal(same, found["mps"][name]), name


def test_shapes_are_those_of_values(folder, plain, tmp_path):
    from lanting.attach.quant import chooser
    from lanting.weights.quantize import quantize_safetensors

    whole = open_component(folder)
    quantize_safetensors(whole, tmp_path / "four.safetensors", chooser("transformer", "int4"), {"config": CONFIG})
    told = shapes(open_file(tmp_path / "four.safetensors")["transformer"])
    assert told == {name: tuple(tensor.shape) for name, tensor in plain.items()}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({f"{ONE}.comfy_quant": note({"format": "svdquant_w4a4"})}, "'svdquant_w4a4'"),
        ({f"{ONE}.comfy_quant": note({"format": "lanting_int4"})}, "type I8"),
        ({f"{ONE}.comfy_quant": note([1])}, "what can't be read"),
        ({f"{ONE}.comfy_quant": torch.tensor([1, 2, 3], dtype=torch.uint8)}, "what can't be read"),
        ({f"{ONE}.comfy_quant": torch.zeros(2 << 20, dtype=torch.uint8)}, "a short note belongs"),
        ({f"{ONE}.comfy_quant": note({"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 7})}, "of 7"),
        ({f"{ONE}.weight_scale_2": torch.tensor(1.0)}, "int8_tensorwise"),
        ({f"{ONE}.weight_scale": torch.ones(7)}, "cover no weight"),
        ({f"{ONE}.weight_scale": torch.ones(128, 3)}, "cover no weight"),
        ({f"{ONE}.weight_scale": torch.ones(128, dtype=torch.int32)}, "scales of type I32"),
        ({f"{ONE}.weight": torch.zeros(128, 128, dtype=torch.int32)}, "of type I32"),
        ({f"{ONE}.weight": torch.zeros(128, 128, dtype=torch.uint8)}, "of type U8"),
        ({f"{ONE}.weight": torch.zeros(64, 128, dtype=torch.int8)}, "cover no weight|config"),
        ({f"{ONE}.weight_scale": None}, "no scales"),
        ({"img_in.bias": torch.zeros(128, dtype=torch.int64)}, "which is no weight type"),
    ],
)
def test_what_would_draw_noise_is_refused(change, said, plain, tmp_path):
    written = int8_rows(plain)[0] | change
    path = write(tmp_path / "file.safetensors", {name: t for name, t in written.items() if t is not None})
    with pytest.raises(ModelError, match=said):
        load(path)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"layers": 3}', "[" * 100_000, json.dumps({"layers": {ONE: 1}}), "\ud800"]
)
def test_damaged_notes_are_a_sentence(text, plain, tmp_path):
    notes = {"_quantization_metadata": text.encode("utf-8", "replace").decode()}
    with pytest.raises(ModelError):
        load(write(tmp_path / "file.safetensors", plain, notes))


def test_notes_of_strangers_never_crash(plain, tmp_path):
    """300 random notes about layers, over small files: each is read or refused with a sentence."""
    random.seed(1)
    small = {name: tensor for name, tensor in plain.items() if not is_block_weight(name, tensor)}
    small |= {f"{ONE}.weight": torch.zeros(128, 128, dtype=torch.int8), f"{ONE}.weight_scale": torch.ones(128)}
    small["transformer_blocks.0.img_mod.1.weight"] = plain["transformer_blocks.0.img_mod.1.weight"]
    values = [None, True, -1, 0, 3, 64, 1e300, "", "int8_tensorwise", "nvfp4", [], {}, [[]], "256", 256]
    keys = ["format", "convrot", "convrot_groupsize", "group_size", "x"]
    read = 0
    for _ in range(300):
        table = {random.choice(keys): random.choice(values) for _ in range(random.randint(0, 4))}
        layers = {random.choice([ONE, "", ".", "transformer_blocks", "a.b"]): table}
        path = write(tmp_path / "file.safetensors", small, {"_quantization_metadata": json.dumps({"layers": layers})})
        try:
            read_forms(open_file(path)["transformer"])
            read += 1
        except LantingError:
            continue
    assert 0 < read < 300


def test_our_kinds_are_the_same_from_a_file_and_while_loading(folder, plain, tmp_path):
    """`lanting quantize` and `--quant` round alike, to the bit; both stay near the original."""
    from lanting.attach.quant import KINDS, chooser
    from lanting.weights.quantize import quantize_safetensors

    whole, exact = open_component(folder), step({name: tensor.float() for name, tensor in plain.items()})
    errors = {}
    for kind in KINDS:
        choose = chooser("transformer", kind)
        path = tmp_path / f"{kind}.safetensors"
        quantize_safetensors(whole, path, choose, {"component": "transformer", "config": CONFIG, "release": "nano"})
        checkpoint = open_file(path)["transformer"]
        assert config_of("transformer", checkpoint) == CONFIG
        filed = step(build_transformer(checkpoint, CONFIG, FLOAT))
        made = build_transformer(whole, CONFIG, Placing(torch.float32, FLOAT.device, choose))
        assert torch.equal(filed, step(made))
        assert any(isinstance(part, PackedLinear) for part in made.modules())
        errors[kind] = ((filed - exact).norm() / exact.norm()).item()
    assert errors["int8"] < errors["fp8"] < errors["int4"] < 0.3, errors


@pytest.mark.parametrize("kind", ["int8", "int4", "fp8"])
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_not_packed(kind, number, tmp_path):
    from lanting.attach.quant import chooser
    from lanting.weights.quantize import quantize_safetensors

    weight = torch.ones(64, 64)
    weight[3, 5] = number
    save_file({"transformer_blocks.0.attn.to_q.weight": weight}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match="not finite"):
        quantize_safetensors(open_component(tmp_path), tmp_path / "out", chooser("transformer", kind), {})
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_rotation_in_a_file(folder, plain, tmp_path):
    from lanting.attach.quant import chooser
    from lanting.nn.rotate import largest_block
    from lanting.weights.quantize import quantize_safetensors

    whole, path = open_component(folder), tmp_path / "turned.safetensors"
    quantize_safetensors(whole, path, chooser("transformer", "int8", rotate=True), {"config": CONFIG})
    net, forms = load(path)
    assert all(form.rotate == largest_block(form.shape[1]) > 1 for form in forms.values())
    assert isinstance(net.transformer_blocks[0].attn.to_q, Int8Linear)
    exact = step({name: tensor.float() for name, tensor in plain.items()})
    assert ((step(net) - exact).norm() / exact.norm()).item() < 0.02


def test_off_changes_nothing(folder, plain, tmp_path):
    """A bf16 file, with a prefix or without, is the folder to the bit."""
    folder = step(build_transformer(open_component(folder), CONFIG, FLOAT))
    assert torch.equal(step(load(write(tmp_path / "file.safetensors", plain, None, PREFIX))[0]), folder)
