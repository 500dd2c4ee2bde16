"""LoRAs merged into files: `lanting quantize --lora` over plain and packed weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
import torch

from lanting.cli.main import main
from lanting.core.errors import ModelError, RequestError
from lanting.engine.quantize import Target, quantize_model
from lanting.nn.lora import merge
from lanting.weights.build import build_transformer
from lanting.weights.checkpoint import Checkpoint
from lanting.weights.find import locate
from lanting.weights.linear_names import transformer_linears
from lanting.weights.lora import attach_loras
from lanting.weights.lora_file import open_lora
from lanting.weights.merge import merge_loras
from lanting.weights.quantize import dense_reader
from lanting.weights.single import open_file
from lanting.weights.stored import Placing
from loras import make

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny.save_folder(tmp_path_factory.mktemp("merge") / "qwen-image")


def config_of(folder: Path) -> dict:
    return json.loads((folder / "transformer" / "config.json").read_text())


def wanted(checkpoint: Checkpoint, folder: Path, loras) -> dict[str, torch.Tensor]:
    """The weights of a network that was built and merged in memory."""
    net = build_transformer(checkpoint, config_of(folder), Placing(torch.float32, CPU))
    attach_loras(net, loras, torch.float32, CPU)
    merge(net, torch.float32)
    return dict(net.state_dict())


def opened(folder: Path, place: Path, *forms: str):
    net = tiny.our_transformer(tiny.transformer())
    linears = transformer_linears(config_of(folder))
    files = [make(net, form, seed=i).save(place / f"{i}.safetensors") for i, form in enumerate(forms)]
    return [open_lora(file, linears, str(file), 0.5 + i) for i, file in enumerate(files)]


def test_a_view_of_files_with_loras_equals_a_merged_network(folder, tmp_path):
    loras = opened(folder, tmp_path, "dora", "lora and bias", "loha")
    base = locate(str(folder)).checkpoint("transformer")
    merged = merge_loras(base, loras)
    assert merged.names() == base.names()
    for name, tensor in wanted(base, folder, loras).items():
        got = merged.read([name])[name]
        assert torch.allclose(got.float(), tensor, rtol=1e-2 if "bias" in name else 1e-5, atol=1e-5), name
    off = [open_lora(lora.path, transformer_linears(config_of(folder)), "", 0.0) for lora in loras]
    same = merge_loras(base, off)
    assert same.infos == base.infos


@pytest.mark.parametrize("kind", ["int8", "fp8", "q8_0"])
def test_packed_weights_are_expanded_and_merged(folder, tmp_path, kind):
    file = tmp_path / ("base.gguf" if kind == "q8_0" else "base.safetensors")
    quantize_model(str(folder), file, Target(kind))
    loras = opened(folder, tmp_path, "lora", "lokr")
    base = open_file(file)["transformer"]
    asked = tuple(f"{lora.path}:{lora.strength}" for lora in loras)
    told = quantize_model(str(file), tmp_path / "out.safetensors", Target("bf16", loras=asked))
    assert [lora["strength"] for lora in told["loras"]] == [0.5, 1.5]
    read = dense_reader(open_file(tmp_path / "out.safetensors")["transformer"])
    for name, tensor in wanted(base, folder, loras).items():
        assert torch.allclose(read(name).float(), tensor, rtol=1e-2, atol=1e-3), name


def test_from_the_command_line(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("LANTING_LANG", "en")
    (lora,) = opened(folder, tmp_path, "lora")
    out = tmp_path / "inked.safetensors"
    words = ["quantize", str(folder), "--to", "bf16", "-o", str(out), "--lora", f"{lora.path}:0.8", "--json"]
    assert main(words) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["loras"][0]["strength"] == 0.8 and out.is_file()
    notes = open_file(out)["transformer"].metadata
    assert lora.sha256 in json.dumps(dict(notes))
    assert main([*words[:5], str(tmp_path / "no.safetensors"), "--lora", "none.safetensors"]) == 2
    assert "there is no LoRA none.safetensors" in capsys.readouterr().err
    with pytest.raises(RequestError, match="changes the transformer"):
        quantize_model(str(folder), tmp_path / "x.safetensors", Target("bf16", "text_encoder", loras=(str(lora.path),)))


def test_a_bias_where_there_is_none_is_refused(folder, tmp_path):
    (lora,) = opened(folder, tmp_path, "diff")
    base = locate(str(folder)).checkpoint("transformer")
    bare = base.renamed({name: name for name in base.names() if name != "img_in.bias"})
    with pytest.raises(ModelError, match="changes the bias of img_in, which has none"):
        merge_loras(bare, [lora])
