"""GGUF files against the gguf package and diffusers: what we write they read, and what we read is theirs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from diffusers import GGUFQuantizationConfig, QwenImageTransformer2DModel
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, quants
from tiny import randomise, text_encoder
from torch import Tensor

from lanting.core.errors import ModelError
from lanting.nn.dequant import dequantize
from lanting.nn.mmdit import QwenImageTransformer, TransformerConfig
from lanting.nn.qwen_vl import QwenVLConfig
from lanting.train.vocabulary import build_tokenizer, make_tokenizer
from lanting.weights.build import build_text_encoder, build_transformer
from lanting.weights.gguf import read_gguf
from lanting.weights.gguf_encoder import write_text_encoder
from lanting.weights.gguf_mix import MIXES, tensor_types
from lanting.weights.gguf_names import text_config, vision_config
from lanting.weights.gguf_view import open_gguf, open_text_encoder_gguf
from lanting.weights.gguf_write import write_transformer
from lanting.weights.stored import Placing

CONFIG: dict[str, Any] = {  # wide enough for blocks of 256
    "patch_size": 2,
    "in_channels": 64,
    "out_channels": 16,
    "attention_head_dim": 128,
    "num_attention_heads": 2,
    "joint_attention_dim": 48,
    "axes_dims_rope": (16, 56, 56),
    "num_layers": 3,
}
FLOAT = Placing(torch.float32, torch.device("cpu"))


def transformer() -> QwenImageTransformer2DModel:
    torch.manual_seed(0)
    return randomise(QwenImageTransformer2DModel(**CONFIG).eval(), 0.06)


def written(path: Path, mix: str, **about: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A file of random weights in this mix: (the weights, the types)."""
    state = transformer().state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    return state, write_transformer(path, shapes, state.__getitem__, mix, {"config": CONFIG, **about})


def step(net: Any, theirs: bool) -> Tensor:
    """One call of a network: a picture of 4 x 6 tokens and a reference, five words."""
    dice = torch.Generator().manual_seed(1)
    x, text = torch.randn(1, 48, 64, generator=dice), torch.randn(1, 5, 48, generator=dice)
    grids = [(1, 4, 6), (1, 4, 6)]
    with torch.no_grad():
        if theirs:
            out = net(
                hidden_states=x,
                encoder_hidden_states=text,
                timestep=torch.tensor([0.6]),
                img_shapes=[grids],
                return_dict=False,
            )
            return out[0][:, :24]
        return net(x, torch.tensor([0.6]), text, None, grids, 24)[:, :24]


def dense(path: Path) -> dict[str, Tensor]:
    """All tensors of a file as the gguf package reads and expands them."""
    found = {}
    for tensor in GGUFReader(path).tensors:
        values = quants.dequantize(tensor.data, tensor.tensor_type)
        found[tensor.name] = torch.from_numpy(np.array(values).reshape(tuple(reversed(tensor.shape.tolist()))))
    return found


@pytest.mark.parametrize("mix", ["q8_0", "q5_k_m", "q4_k_m", "q4_0", "q3_k_m", "q2_k", "f16"])
def test_the_package_reads_what_we_write(mix: str, tmp_path: Path):
    path = tmp_path / "a.gguf"
    state, types = written(path, mix, release="qwen-image", name="A name")
    reader = GGUFReader(path)
    fields = {key: field.contents() for key, field in reader.fields.items()}
    assert fields["general.architecture"] == "qwen_image" and fields["general.name"] == "A name"
    assert fields["general.quantization_version"] == 2 and fields["general.file_type"] == MIXES[mix].number
    assert fields["lanting.mix"] == mix and json.loads(fields["lanting.config"])["num_layers"] == 3
    assert [tensor.name for tensor in reader.tensors] == list(state)
    assert {tensor.name: tensor.tensor_type.name for tensor in reader.tensors} == types
    loose = {"q2_k": 0.4, "q3_k_s": 0.25, "q3_k_m": 0.25, "q3_k_l": 0.25}.get(mix, 0.11)
    for name, values in dense(path).items():
        assert values.shape == state[name].shape
        exact = {"F32": 0.0, "F16": 1e-3, "BF16": 5e-3}.get(types[name], loose)
        assert (values - state[name]).norm() <= exact * state[name].norm()


@pytest.mark.parametrize("mix", ["q8_0", "q6_k", "q4_k_m", "q4_0", "q3_k_l", "q2_k", "bf16"])
def test_a_step_is_that_of_the_expanded_weights_and_of_diffusers(mix: str, tmp_path: Path):
    """File -> packed Linears -> one step equals the weights that the gguf package expands, exactly; and diffusers'
    own GGUF loader on the same file, as closely as that one's float16 arithmetic allows."""
    path = tmp_path / "a.gguf"
    written(path, mix)
    ours = build_transformer(open_gguf(path), CONFIG, FLOAT)
    plain = QwenImageTransformer(TransformerConfig.from_dict(CONFIG)).eval()
    plain.load_state_dict(dense(path), strict=True)
    assert torch.equal(step(ours, theirs=False), step(plain, theirs=False))
    config = tmp_path / "config" / "transformer"
    transformer().save_config(config)
    theirs = QwenImageTransformer2DModel.from_single_file(
        str(path),
        config=str(config.parent),
        subfolder="transformer",
        quantization_config=GGUFQuantizationConfig(compute_dtype=torch.float32),
        torch_dtype=torch.float32,
    )
    want = step(theirs, theirs=True)
    close = 2e-5 if mix == "bf16" else 3e-3  # theirs multiplies scales and codes in float16
    assert (step(ours, theirs=False) - want).norm() < close * want.norm()


def test_the_marker_of_2511_is_written_and_read(tmp_path: Path):
    path = tmp_path / "a.gguf"
    state = transformer().state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    write_transformer(path, shapes, state.__getitem__, "q8_0", {"config": {**CONFIG, "zero_cond_t": True}})
    assert "__index_timestep_zero__" in open_gguf(path).infos
    assert any(tensor.name == "__index_timestep_zero__" for tensor in GGUFReader(path).tensors)


def test_prefixed_names_are_ours_too(tmp_path: Path):
    path = tmp_path / "a.gguf"
    state = transformer().state_dict()
    writer = GGUFWriter(path, "qwen_image")
    for name, tensor in state.items():
        writer.add_tensor(f"model.diffusion_model.{name}", tensor.numpy())
    finish(writer)
    checkpoint = open_gguf(path)
    assert set(checkpoint.names()) == set(state)
    assert all(torch.equal(tensor, state[name]) for name, tensor in checkpoint.tensors())


# ---------------------------------------------------------------- Qwen2.5-VL in llama.cpp's two files
def finish(writer: GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def named(arch: gguf.MODEL_ARCH, blocks: int, name: str) -> str:
    """What llama.cpp's converter calls a tensor, by the package's own table."""
    found = gguf.get_tensor_name_map(arch, max(blocks, 3)).get_name(name, try_suffixes=(".weight", ".bias"))
    assert found is not None, name
    return found


def hub_state(net: Any) -> dict[str, Tensor]:
    """Weights by the names of the hub's files."""
    return {
        name.replace("model.language_model.", "model.").replace("model.visual.", "visual."): tensor
        for name, tensor in net.state_dict().items()
    }


def write_language(path: Path, state: Mapping[str, Tensor], text: Any, kind: str = "F32") -> None:
    writer = GGUFWriter(path, "qwen2vl")
    writer.add_block_count(text.num_hidden_layers)
    writer.add_context_length(4096)
    writer.add_embedding_length(text.hidden_size)
    writer.add_feed_forward_length(text.intermediate_size)
    writer.add_head_count(text.num_attention_heads)
    writer.add_head_count_kv(text.num_key_value_heads)
    writer.add_rope_freq_base(1e6)
    writer.add_layer_norm_rms_eps(text.rms_norm_eps)
    writer.add_rope_dimension_sections([2, 3, 3, 0])
    writer.add_array("tokenizer.ggml.tokens", [f"token {number}" for number in range(1000)])
    for name, tensor in state.items():
        if name.startswith("visual."):
            continue
        to = GGMLQuantizationType[kind if tensor.ndim == 2 and tensor.shape[1] % 32 == 0 else "F32"]
        stored = named(gguf.MODEL_ARCH.QWEN2VL, text.num_hidden_layers, name)
        writer.add_tensor(stored, quants.quantize(tensor.numpy(), to), raw_dtype=to)
    finish(writer)


def write_vision(path: Path, state: Mapping[str, Tensor], vision: Any, fused: bool = False, half: bool = False) -> None:
    """As llama.cpp's converter does: the patch convolution in two, queries, keys and values apart unless `fused`."""
    writer = GGUFWriter(path, "clip")
    writer.add_clip_projector_type("qwen2.5vl_merger")
    writer.add_vision_head_count(vision.num_heads)
    writer.add_uint32("clip.vision.n_wa_pattern", 2)
    parts: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if not name.startswith("visual."):
            continue
        stored = name if "attn.qkv" not in name else name.replace("attn.qkv", "attn.q")
        if "patch_embed" in name:
            stored = named(gguf.MODEL_ARCH.MMPROJ, vision.depth, name)
            parts[stored], parts[f"{stored}.1"] = tensor[:, :, 0], tensor[:, :, 1]
        elif "attn.qkv" in name and not fused:
            for letter, piece in zip("qkv", tensor.chunk(3), strict=True):
                parts[named(gguf.MODEL_ARCH.MMPROJ, vision.depth, name.replace("qkv", letter))] = piece
        else:
            parts[named(gguf.MODEL_ARCH.MMPROJ, vision.depth, name if fused else stored)] = tensor
    for name, tensor in parts.items():
        writer.add_tensor(
            name, tensor.contiguous().numpy().astype(np.float16 if half and tensor.ndim > 1 else np.float32)
        )
    finish(writer)


@pytest.mark.parametrize("fused", [False, True], ids=["in three", "fused"])
def test_the_reader_opens_from_two_files(fused: bool, tmp_path: Path):
    net = text_encoder()
    state, text, vision = hub_state(net), net.config.text_config, net.config.vision_config
    write_language(tmp_path / "qwen.gguf", state, text)
    write_vision(tmp_path / "mmproj-qwen-F32.gguf", state, vision, fused)
    checkpoint, config = open_text_encoder_gguf(tmp_path / "qwen.gguf")
    assert set(checkpoint.names()) == set(state)
    for name, tensor in checkpoint.tensors():
        assert torch.equal(tensor, state[name]), name
        assert checkpoint.infos[name].shape == tuple(tensor.shape)
    assert QwenVLConfig.from_dict(config) == QwenVLConfig.from_dict({**net.config.to_dict(), "image_token_id": 151655})
    assert checkpoint.bytes() == sum(tensor.numel() * 4 for tensor in state.values())
    some = checkpoint.renamed({"qkv": "visual.blocks.1.attn.qkv.weight"})
    assert torch.equal(some.read(["qkv"])["qkv"], state["visual.blocks.1.attn.qkv.weight"])


def test_a_packed_reader_reads_as_the_expanded_one(tmp_path: Path):
    net = text_encoder()
    state, text, vision = hub_state(net), net.config.text_config, net.config.vision_config
    write_language(tmp_path / "qwen.gguf", state, text, "Q8_0")
    write_vision(tmp_path / "mmproj-qwen.gguf", state, vision)
    checkpoint, config = open_text_encoder_gguf(tmp_path / "qwen.gguf")
    ours = build_text_encoder(checkpoint, config, FLOAT)
    expanded = {
        name: tensor
        if tensor.ndim != 2 or tensor.shape[1] % 32 or name.startswith("visual.")
        else torch.from_numpy(
            quants.dequantize(quants.quantize(tensor.numpy(), GGMLQuantizationType.Q8_0), GGMLQuantizationType.Q8_0)
        )
        for name, tensor in state.items()
    }
    net.load_state_dict(
        {
            name: expanded[name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")]
            for name in net.state_dict()
        }
    )
    ids = torch.tensor([[5, 17, 300, 42, 7]])
    with torch.no_grad():
        want = net(input_ids=ids, output_hidden_states=True).hidden_states[-1]
        got = ours(ids)
    assert (got - want).norm() < 1e-5 * want.norm()


def test_the_reader_is_written_as_llama_cpp_names_it(tmp_path: Path):
    """Our two files carry the package's names, a tokenizer and configs that give back the same network."""
    net = text_encoder()
    state, depth = hub_state(net), net.config.vision_config.depth
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    build_tokenizer(tmp_path)
    about = {"config": net.config.to_dict(), "tokenizer": tmp_path}
    beside = write_text_encoder(tmp_path / "qwen.gguf", shapes, state.__getitem__, "q8_0", about)
    assert beside == tmp_path / "mmproj-qwen.gguf"
    words, tower = GGUFReader(tmp_path / "qwen.gguf"), GGUFReader(beside)
    assert {tensor.name for tensor in words.tensors} == {
        named(gguf.MODEL_ARCH.QWEN2VL, 2, name) for name in state if not name.startswith("visual.")
    }
    pieces = {name.replace("attn.qkv", f"attn.{part}") for name in state if "visual" in name for part in "qkv"}
    wanted = {named(gguf.MODEL_ARCH.MMPROJ, depth, name) for name in pieces} | {"v.patch_embd.weight.1"}
    assert {tensor.name for tensor in tower.tensors} == wanted
    seen = {key: field.contents() for key, field in tower.fields.items()}
    assert (seen["general.architecture"], seen["general.type"]) == ("clip", "clip-vision")  # what ComfyUI-GGUF asks
    fields = {key: field.contents() for key, field in words.fields.items()}
    assert fields["general.architecture"] == "qwen2vl"
    tokens = make_tokenizer()
    assert fields["tokenizer.ggml.tokens"][300] == tokens.id_to_token(300) and len(fields["tokenizer.ggml.merges"]) > 0
    assert fields["tokenizer.ggml.eos_token_id"] == tokens.token_to_id("<|im_end|>")
    checkpoint, config = open_text_encoder_gguf(tmp_path / "qwen.gguf")
    assert QwenVLConfig.from_dict(config) == QwenVLConfig.from_dict(net.config.to_dict())
    plain = text_config(read_gguf(tmp_path / "qwen.gguf")) | {"vision_config": vision_config(read_gguf(beside))}
    assert QwenVLConfig.from_dict(plain) == QwenVLConfig.from_dict({**net.config.to_dict(), "image_token_id": 151655})
    assert set(checkpoint.names()) == set(state)
    for name, tensor in checkpoint.tensors():
        kind = checkpoint.infos[name].dtype
        values = dequantize(tensor, kind) if kind == "Q8_0" else tensor.float()
        assert (values - state[name]).norm() <= {"F32": 0.0, "F16": 1e-3}.get(kind, 1e-2) * state[name].norm(), name
    build_text_encoder(checkpoint, config, FLOAT)


def test_words_alone_need_no_vision_file(tmp_path: Path):
    net = text_encoder()
    state = hub_state(net)
    write_language(tmp_path / "qwen.gguf", state, net.config.text_config)
    checkpoint, config = open_text_encoder_gguf(tmp_path / "qwen.gguf")
    assert not any(name.startswith("visual.") for name in checkpoint.names())
    build_text_encoder(checkpoint, config, FLOAT, vision=False, head=False)
    with pytest.raises(ModelError, match="mmproj"):
        build_text_encoder(checkpoint, config, FLOAT)


def test_the_half_precision_tower_is_preferred_and_strangers_are_passed_over(tmp_path: Path):
    net = text_encoder()
    state, text, vision = hub_state(net), net.config.text_config, net.config.vision_config
    write_language(tmp_path / "qwen.gguf", state, text)
    write_vision(tmp_path / "mmproj-F32.gguf", state, vision)
    write_vision(tmp_path / "mmproj-F16.gguf", state, vision, half=True)
    (tmp_path / "mmproj-broken.gguf").write_bytes(b"GGUF")
    checkpoint, _ = open_text_encoder_gguf(tmp_path / "qwen.gguf")
    assert checkpoint.where["visual.blocks.0.norm1.weight"].name == "mmproj-F16.gguf"
    assert checkpoint.infos["visual.blocks.0.attn.qkv.weight"].dtype == "F16"


def test_other_models_are_refused_by_name(tmp_path: Path):
    net = text_encoder()
    write_vision(tmp_path / "mmproj.gguf", hub_state(net), net.config.vision_config)
    with pytest.raises(ModelError, match="only the half that sees"):
        open_text_encoder_gguf(tmp_path / "mmproj.gguf")
    writer = GGUFWriter(tmp_path / "other.gguf", "llama")
    writer.add_tensor("token_embd.weight", np.zeros((4, 4), np.float32))
    finish(writer)
    with pytest.raises(ModelError, match="another kind"):
        open_text_encoder_gguf(tmp_path / "other.gguf")


def test_the_mix_of_the_full_model_is_the_published_one():
    """Q4_K_M and Q8_0 of the 20.4 B release: counts as ComfyUI-GGUF's converter makes them, sizes as published."""
    with torch.device("meta"):
        net = QwenImageTransformer(TransformerConfig())
    shapes = {name: tuple(tensor.shape) for name, tensor in net.state_dict().items()}
    counts: dict[str, int] = {}
    for kind in tensor_types(shapes, "q4_k_m").values():
        counts[kind] = counts.get(kind, 0) + 1
    assert counts == {"F32": 1087, "BF16": 6, "Q4_K": 580, "Q6_K": 232, "Q5_K": 28}
