"""DFloat11: bfloat16 weights with coded exponents, to the bit; a transformer's folder alone as a model.

`tests/packed/dfloat11.safetensors` is what dfloat11's own encoder made (`make_dfloat11.py`). Folders are coded here.
"""

from __future__ import annotations

import heapq
import json
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from lanting.core.errors import ModelError
from lanting.engine.quantize import Target, quantize_model
from lanting.nn.mmdit import QwenImageTransformer, TransformerConfig
from lanting.weights.build import build_transformer
from lanting.weights.checkpoint import open_component
from lanting.weights.configs import config_of
from lanting.weights.find import is_transformer, locate
from lanting.weights.home import embedded_nano
from lanting.weights.inspect import describe
from lanting.weights.schemes.huffman import decoded
from lanting.weights.single import open_file, open_weights
from lanting.weights.stored import Placing

PACKED = Path(__file__).parent.parent / "packed" / "dfloat11.safetensors"
HALF = Placing(torch.bfloat16, torch.device("cpu"))
SHAPE = TransformerConfig(2, 4, 32, 128, axes_dims_rope=(4, 14, 14))
CODED = ["img_mod.1", "attn.to_q", "attn.to_out.0", "img_mlp.net.0.proj", "img_mlp.net.2"]
BLOCK = 4
CONFIG = {
    "version": "0.5.0",
    "threads_per_block": [BLOCK],
    "bytes_per_thread": 8,
    "pattern_dict": {r"transformer_blocks\.\d+": CODED, "norm_out\\.linear": []},
}
State = dict[str, Tensor]


def test_numbers_are_those_that_were_coded():
    """All of them, each Linear's, and single ones; codes of up to 16 bits."""
    every = load_file(PACKED)
    meant = every.pop("values")
    limits = [0, *every.pop("split_positions").tolist(), len(meant)]
    parts = {**every, "output_positions": every["output_positions"].view(torch.int32).long()}
    assert int(parts["luts"][-1].max()) > 12, "some take more than one look"
    for begin, end in [(0, len(meant)), *pairwise(limits), (77, 78), (len(meant) - 1, len(meant))]:
        found = decoded(parts, begin, end, 512)
        assert torch.equal(found.view(torch.int16), meant[begin:end].view(torch.int16)), (begin, end)
    with pytest.raises(ValueError, match="codes for"):
        decoded({**parts, "encoded_exponent": parts["encoded_exponent"][:400]}, 0, len(meant), 512)


# ---------------------------------------------------------------- coding, the plain way
def huffman(counts: dict[int, int]) -> dict[int, str]:
    heap = [(count, number, {number: ""}) for number, count in counts.items()]
    heapq.heapify(heap)
    while len(heap) > 1:
        (few, tie, left), (more, _, right) = heapq.heappop(heap), heapq.heappop(heap)
        both = {n: "0" + code for n, code in left.items()} | {n: "1" + code for n, code in right.items()}
        heapq.heappush(heap, (few + more, tie, both))
    return heap[0][2]


def tables(codes: dict[int, str]) -> Tensor:
    """For a byte of a code its number, or 256 less the table of the next byte; then the lengths."""
    begun = sorted({code[:at] for code in codes.values() for at in range(0, len(code), 8)}, key=len)
    luts = torch.zeros(len(begun) + 1, 256, dtype=torch.uint8)
    for number, code in codes.items():
        whole = (len(code) - 1) // 8 * 8
        first = int(code[whole:].ljust(8, "0"), 2)
        luts[begun.index(code[:whole]), first : first + (1 << 8 - len(code) + whole)] = number
        luts[-1, number] = len(code)
        for at in range(0, whole, 8):
            luts[begun.index(code[:at]), int(code[at : at + 8], 2)] = 256 - begun.index(code[: at + 8])
    return luts


def as_bytes(bits: str) -> Tensor:
    filled = bits.ljust(-(-len(bits) // 8) * 8, "0")
    return torch.tensor([int(filled[at : at + 8], 2) for at in range(0, len(filled), 8)], dtype=torch.uint8)


def coded(weights: list[Tensor]) -> State:
    numbers = torch.cat([weight.bfloat16().flatten() for weight in weights]).view(torch.int16)
    exponents = (numbers >> 7 & 255).tolist()
    codes = huffman({n: exponents.count(n) for n in set(exponents)})
    bits = "".join(codes[n] for n in exponents)
    pieces = -(-len(bits) // (64 * BLOCK)) * BLOCK
    gaps, positions, at = ["00000"] * pieces, [0] * (pieces // BLOCK + 1), 0
    seen: set[int] = set()
    for place, n in enumerate(exponents):
        if at // 64 not in seen:
            seen.add(at // 64)
            gaps[at // 64] = f"{at % 64:05b}"
            if at // 64 % BLOCK == 0:
                positions[at // 64 // BLOCK] = place
        at += len(codes[n])
    positions[-1] = len(exponents)
    return {
        "encoded_exponent": as_bytes(bits),
        "sign_mantissa": (numbers >> 8 & 128 | numbers & 127).to(torch.uint8),
        "luts": tables(codes),
        "gaps": as_bytes("".join(gaps)),
        "output_positions": torch.tensor(positions, dtype=torch.int32).view(torch.uint8),
        "split_positions": torch.tensor([each.numel() for each in weights]).cumsum(0)[:-1],
    }


@pytest.fixture(scope="module")
def plain() -> State:
    torch.manual_seed(0)
    return {name: each.bfloat16() for name, each in QwenImageTransformer(SHAPE).state_dict().items()}


@pytest.fixture(scope="module")
def files(plain) -> dict[str, State]:
    """As `compress_model` leaves them: a file for each module, and one for the rest."""
    rest = dict(plain)
    made: dict[str, State] = {"model": rest}
    for module in ("transformer_blocks.0", "transformer_blocks.1"):
        parts = coded([rest.pop(f"{module}.{name}.weight") for name in CODED])
        made[module.replace(".", "_")] = {f"{module}.{part}": each for part, each in parts.items()}
    parts = coded([rest.pop("norm_out.linear.weight")])
    made["norm_out_linear"] = {f"norm_out.linear.{part}": each for part, each in parts.items()}
    return made


def write(folder: Path, files: dict[str, State], config: dict[str, Any] = CONFIG, **change: Tensor | None) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"dfloat11_config": config}))
    for file, state in files.items():
        kept = {name: change.get(name, each) for name, each in state.items()}
        save_file({name: each for name, each in kept.items() if each is not None}, folder / f"{file}.safetensors")
    return folder


def test_a_folder_is_what_was_coded(plain, files, tmp_path):
    folder = write(tmp_path / "Qwen-Image-2512-DF11", files)
    checkpoint = open_weights(folder, "transformer")
    net = build_transformer(checkpoint, config_of("transformer", checkpoint), HALF)
    found = net.state_dict()
    assert found.keys() == plain.keys()
    assert all(torch.equal(found[name], each) for name, each in plain.items())
    told = describe(str(folder))
    assert told.parts[0].kind.name == "transformer" and not told.problems
    assert told.parts[0].parameters == sum(each.numel() for each in plain.values())
    assert checkpoint.bytes() < 2 * told.parts[0].parameters


def test_it_is_a_model_beside_others(files, tmp_path, monkeypatch):
    monkeypatch.setenv("LANTING_HOME", str(tmp_path / "home"))
    folder = write(tmp_path / "Qwen-Image-2512-DF11", files)
    assert is_transformer(folder) and not is_transformer(embedded_nano()) and not is_transformer(tmp_path)
    with pytest.raises(ModelError, match="DF11 holds transformer of qwen-image-2512 and nothing else"):
        locate(str(folder))
    nano = str(embedded_nano())
    found = locate(str(folder), {"text_encoder": nano, "vae": nano})
    assert found.spec.name == "qwen-image-2512" and found.configs["transformer"]["num_layers"] == 2
    assert found.tokenizer == embedded_nano() / "tokenizer"


def test_a_folder_of_another_name(plain, files, tmp_path, monkeypatch):
    """A config that brings its network says more than tensors do; the folder is written anew as a file is."""
    monkeypatch.setenv("LANTING_HOME", str(tmp_path / "home"))
    folder = write(tmp_path / "mine", files)
    told = {"_class_name": "QwenImageTransformer2DModel", **asdict(SHAPE), "zero_cond_t": True}
    (folder / "config.json").write_text(json.dumps({**told, "dfloat11_config": CONFIG}))
    nano = str(embedded_nano())
    assert locate(str(folder), {"text_encoder": nano, "vae": nano}).spec.name == "qwen-image-edit-2511"
    quantize_model(str(folder), tmp_path / "whole.safetensors", Target("bf16"))
    found = open_file(tmp_path / "whole.safetensors")["transformer"]
    assert config_of("transformer", found)["zero_cond_t"]
    name = "transformer_blocks.1.img_mlp.net.2.weight"
    assert torch.equal(found.read([name])[name], plain[name])


@pytest.mark.parametrize(
    ("change", "config", "said"),
    [
        ({"transformer_blocks.0.gaps": None}, {}, "contradicts itself"),
        ({"transformer_blocks.0.gaps": torch.zeros(3, dtype=torch.uint8)}, {}, "contradicts itself"),
        ({"transformer_blocks.0.luts": torch.zeros(3, dtype=torch.uint8)}, {}, "contradicts itself"),
        ({"transformer_blocks.0.split_positions": torch.tensor([5])}, {}, "contradicts itself"),
        ({"transformer_blocks.0.split_positions": torch.tensor([5, 4, 6, 7])}, {}, "contradicts itself"),
        ({"transformer_blocks.0.attn.to_q.bias": None}, {}, "contradicts itself"),
        ({}, {"bytes_per_thread": 16}, "DFloat11"),
        ({}, {"pattern_dict": {}}, "DFloat11"),
        ({}, {"pattern_dict": {r"(transformer_blocks\.\d+)+": CODED}}, "DFloat11"),
    ],
)
def test_what_can_not_be_is_refused(change, config, said, files, tmp_path):
    folder = write(tmp_path / "transformer", files, CONFIG | config, **change)
    with pytest.raises(ModelError, match=said):
        open_component(folder)


def test_codes_that_end_too_early(files, tmp_path):
    """Known only when they are decoded."""
    name = "transformer_blocks.0.encoded_exponent"
    short = files["transformer_blocks_0"][name].clone()
    short[:] = 0
    luts = files["transformer_blocks_0"]["transformer_blocks.0.luts"].clone()
    luts[-1] = 40
    folder = write(tmp_path / "transformer", files, **{name: short, "transformer_blocks.0.luts": luts})
    checkpoint = open_component(folder)
    with pytest.raises(ModelError, match="contradicts itself"):
        checkpoint.read(["transformer_blocks.0.img_mlp.net.2.weight"])


def test_a_file_alone_is_named(files, tmp_path):
    whole = {name: each for state in files.values() for name, each in state.items()}
    save_file(whole, tmp_path / "qwen-df11.safetensors")
    with pytest.raises(ModelError, match="DFloat11 without its config"):
        open_file(tmp_path / "qwen-df11.safetensors")


def test_padding_is_no_code():
    """One number alone, and as many as fill a piece."""
    for count in (1, 8, 64, 65):
        weight = torch.tensor([0.5, 2.0, -3e-20, 1.0]).repeat(count)[:count].bfloat16()
        weight = F.pad(weight, (0, 1), value=7.0)
        parts = coded([weight])
        parts["output_positions"] = parts["output_positions"].view(torch.int32).long()
        assert torch.equal(decoded(parts, 0, len(weight), BLOCK), weight)
