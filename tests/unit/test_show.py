"""`lanting show`, `list` and `remove`: what folders and files are, judged from made-up headers and configs."""

from __future__ import annotations

import json
import math
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from lanting.cli.main import main
from lanting.core.errors import ModelError
from lanting.weights.find import locate
from lanting.weights.home import MARKER, Marker, model_folder, note_begun, write_marker
from lanting.weights.inspect import describe

BYTES = {"F32": 4, "BF16": 2, "F8_E4M3": 1, "U8": 1}
TRANSFORMER = {
    "img_in.weight": (32, 64),
    "txt_in.weight": (32, 48),
    "txt_norm.weight": (48,),
    "transformer_blocks.0.img_mod.1.weight": (192, 32),
    "transformer_blocks.1.img_mod.1.weight": (192, 32),
}
VAE = {
    "encoder.conv_in.weight": (8, 3, 3, 3, 3),
    "decoder.conv_in.weight": (8, 16, 3, 3, 3),
    "quant_conv.weight": (32, 32, 1, 1, 1),
}
READER = {
    "model.embed_tokens.weight": (100, 8),
    "model.layers.0.self_attn.q_proj.weight": (8, 8),
    "model.layers.2.self_attn.q_proj.weight": (8, 8),
    "visual.blocks.0.attn.qkv.weight": (24, 8),
}


@pytest.fixture(autouse=True)
def _own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LANTING_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("LANTING_LANG", "en")


def weights(path: Path, shapes: dict[str, tuple[int, ...]], dtype: str = "F32") -> Path:
    """A safetensors file of zeros."""
    header, place = {}, 0
    for name, shape in shapes.items():
        size = math.prod(shape) * BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [place, place + size]}
        place += size
    raw = json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(place))
    return path


def put(path: Path, table: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(table))


def model(folder: Path, pipeline: str = "QwenImagePipeline", **transformer: object) -> Path:
    """A whole folder in diffusers' layout; the transformer in two shards."""
    put(folder / "model_index.json", {"_class_name": pipeline})
    put(folder / "scheduler/scheduler_config.json", {})
    base = {"_class_name": "QwenImageTransformer2DModel", "num_layers": 2, "in_channels": 64, "joint_attention_dim": 48}
    put(folder / "transformer/config.json", base | transformer)
    halves = list(TRANSFORMER.items())
    place = {}
    for number, half in enumerate((dict(halves[:2]), dict(halves[2:])), 1):
        file = weights(folder / f"transformer/diffusion_pytorch_model-0000{number}-of-00002.safetensors", half, "BF16")
        place |= dict.fromkeys(half, file.name)
    put(folder / "transformer/diffusion_pytorch_model.safetensors.index.json", {"weight_map": place})
    put(folder / "vae/config.json", {"z_dim": 16})
    weights(folder / "vae/diffusion_pytorch_model.safetensors", VAE)
    put(folder / "text_encoder/config.json", {"num_hidden_layers": 3, "vocab_size": 100})
    weights(folder / "text_encoder/model.safetensors", READER, "BF16")
    return folder


def show(capsys: pytest.CaptureFixture[str], name: object, code: int = 0) -> str:
    assert main(["show", str(name)]) == code
    return capsys.readouterr().out


def test_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = model(tmp_path / "Qwen-Image-2512")
    (folder / "README.md").write_text("---\nlanguage: en\nlicense: apache-2.0\n---\n# A model\nlicense: none\n")
    told = describe(str(folder))
    assert (told.release, told.licence, told.notes, told.problems) == ("qwen-image-2512", "apache-2.0", (), ())
    transformer, vae, reader = told.parts
    count = sum(math.prod(shape) for shape in TRANSFORMER.values())
    assert (transformer.tensors, transformer.parameters, transformer.bytes) == (5, count, 2 * count)
    assert (transformer.files, dict(transformer.dtypes), transformer.kind.detail) == (2, {"BF16": count}, "2 blocks")
    assert (vae.kind.name, vae.kind.detail) == ("vae", "3 colour channels")
    assert (reader.kind.name, reader.kind.detail) == ("text_encoder", "3 layers, reads pictures")
    text = show(capsys, folder)
    assert "release: qwen-image-2512; tasks: text_to_image" in text and "licence: apache-2.0" in text
    assert "defaults: 50 steps, guidance 4, 1328×1328 (1:1 1328×1328, 16:9 1664×928" in text
    assert f"5 tensors    {count:,} parameters   BF16   " in text


def test_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = model(tmp_path / "editor", "QwenImageEditPlusPipeline", zero_cond_t=True)
    assert main(["show", str(folder), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["release"], told["tasks"], told["defaults"]["steps"]) == (
        "qwen-image-edit-2511",
        ["edit", "edit_inpaint"],
        40,
    )
    assert told["parts"][0]["kind"]["name"] == "transformer" and told["path"] == str(folder)


def test_a_config_that_disagrees_with_its_tensors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = model(tmp_path / "odd", num_layers=60, joint_attention_dim=3584)
    put(folder / "vae/config.json", {"z_dim": 16, "input_channels": 4})
    text = show(capsys, folder)
    assert "note: transformer/config.json says num_layers = 60, but the tensors say 2." in text
    assert "note: transformer/config.json says joint_attention_dim = 3584, but the tensors say 48." in text
    assert "note: vae/config.json says input_channels = 4, but the tensors say 3." in text


def test_a_folder_that_disagrees_with_its_release(capsys: pytest.CaptureFixture[str]) -> None:
    model(model_folder("qwen-image-edit-2511"), "QwenImageEditPlusPipeline")
    assert "note: qwen-image-edit-2511 has zero_cond_t = True" in show(capsys, "qwen-image-edit-2511")
    model(model_folder("qwen-image"), "QwenImageEditPipeline")
    assert "note: the configs are those of qwen-image-edit, not of qwen-image" in show(capsys, "qwen-image")


def test_damaged_and_missing_parts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = model(tmp_path / "broken")
    shard = folder / "transformer/diffusion_pytorch_model-00002-of-00002.safetensors"
    data = shard.read_bytes()
    shard.write_bytes(data[:-10])
    assert "is damaged: transformer_blocks.1.img_mod.1.weight ends at byte" in show(capsys, folder, 2)
    shard.unlink()
    text = show(capsys, folder, 2)
    assert "00002-of-00002.safetensors is missing" in text and "3 colour channels" in text
    shard.write_bytes(data)
    weights(folder / "vae/diffusion_pytorch_model.safetensors", READER)
    assert "problem: vae holds tensors of another kind (text_encoder)" in show(capsys, folder, 2)
    (folder / "text_encoder/config.json").unlink()
    assert "text_encoder/config.json is missing" in show(capsys, folder, 2)


def test_a_release_that_is_not_here(capsys: pytest.CaptureFixture[str]) -> None:
    assert "note: not on this machine: run 'lanting pull qwen-image-layered'" in show(capsys, "qwen-image-layered")
    staging = model_folder("qwen-image-layered") / ".lanting-pull"
    staging.mkdir(parents=True)
    (staging / "abc.part").write_bytes(b"x" * 4_000)
    note_begun(staging.parent, {"vae/x.safetensors": (9_000_000, "abc")}, 10_000_000)
    assert "here only in part, 1 MB of 10 MB" in show(capsys, "qwen-image-layered")
    assert main(["list"]) == 0
    told = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["qwen-image-layered", "here", "in", "part,", "1", "MB:", "lanting", "pull", "qwen-image-layered"] in told


LAYERED = TRANSFORMER | {"time_text_embed.addition_t_embedding.weight": (2, 32)}
WAN = {
    "encoder.conv1.weight": (8, 4, 3, 3, 3),
    "decoder.conv1.weight": (8, 16, 3, 3, 3),
    "conv1.weight": (32, 32, 1, 1, 1),
}
FILES: dict[str, tuple[dict[str, tuple[int, ...]], str, str, str | None]] = {
    "bare": (TRANSFORMER, "transformer", "2 blocks", None),
    "comfy": ({f"model.diffusion_model.{k}": v for k, v in TRANSFORMER.items()}, "transformer", "2 blocks", None),
    "layered": (LAYERED, "transformer", "2 blocks, layered", "qwen-image-layered"),
    "2511": (
        TRANSFORMER | {"__index_timestep_zero__": (0,)},
        "transformer",
        "clean references",
        "qwen-image-edit-2511",
    ),
    "fp8": (TRANSFORMER | {"img_in.scale_weight": ()}, "transformer", "2 blocks with scales", None),
    "control": (TRANSFORMER | {"controlnet_blocks.0.weight": (32, 32)}, "controlnet", "2 blocks", None),
    "vae": (VAE, "vae", "3 colour channels", None),
    "wan": (WAN | {"encoder.downsamples.0.residual.2.weight": (8, 8, 3, 3, 3)}, "vae", "4 colour channels, Wan", None),
    "reader": (
        {f"text_encoders.qwen25_7b.transformer.{k}": v for k, v in READER.items()},
        "text_encoder",
        "reads",
        None,
    ),
    "language": ({k: v for k, v in READER.items() if "visual" not in k}, "text_encoder", "no picture reader", None),
    "all": ({"model.diffusion_model.x": (1,), "vae.y": (1,)}, "all-in-one", "", None),
    "peft": (
        {
            "transformer_blocks.0.attn.to_q.lora_A.weight": (16, 32),
            "transformer_blocks.0.attn.to_q.lora_B.weight": (32, 16),
            "transformer_blocks.7.attn.to_q.lora_A.weight": (64, 512),
        },
        "lora",
        "rank 16 to 64, 8 blocks",
        None,
    ),
    "kohya": (
        {"lora_unet_transformer_blocks_3_attn_to_q.lora_down.weight": (4, 32), "x.lora_up.weight": (32, 4)},
        "lora",
        "rank 4, 4 blocks",
        None,
    ),
    "other": ({"conv.weight": (3, 3)}, "unknown", "", None),
}


@pytest.mark.parametrize("name", FILES)
def test_a_single_file(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shapes, kind, detail, release = FILES[name]
    path = weights(tmp_path / "some.safetensors", shapes)
    told = describe(str(path))
    (part,) = told.parts
    assert (part.kind.name, told.release, part.tensors) == (kind, release, len(shapes))
    assert detail in part.kind.detail
    assert part.bytes == 4 * part.parameters
    assert kind in show(capsys, path)


def test_files_that_are_never_opened(tmp_path: Path) -> None:
    (tmp_path / "x.ckpt").write_bytes(b"\x80\x04")
    with pytest.raises(ModelError, match="can run code"):
        describe(str(tmp_path / "x.ckpt"))
    with pytest.raises(ModelError, match="holds only pickled weights"):
        describe(str(tmp_path))
    (tmp_path / "x.gguf").write_bytes(b"GGUF\x03\0\0\0")
    with pytest.raises(ModelError, match="is damaged"):
        describe(str(tmp_path / "x.gguf"))
    for empty in (describe, locate):  # it was the folder here
        with pytest.raises(ModelError, match="the name is empty"):
            empty("")
    for missing in ("none.safetensors", "no/such/folder", str(tmp_path / "none")):
        with pytest.raises(ModelError, match="does not exist"):
            describe(missing)
    with pytest.raises(ModelError, match="did you mean qwen-image"):
        describe("qwen-imag")


def test_a_folder_of_loras_and_a_component(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights(tmp_path / "loras/a.safetensors", FILES["peft"][0])
    (tmp_path / "loras/b.safetensors").write_bytes(b"123")
    text = show(capsys, tmp_path / "loras", 2)
    assert "rank 16 to 64" in text and "b.safetensors is damaged" in text
    weights(tmp_path / "control/diffusion_pytorch_model.safetensors", FILES["control"][0])
    put(tmp_path / "control/config.json", {"num_layers": 5})
    assert "control/config.json says num_layers = 5, but the tensors say 2." in show(capsys, tmp_path / "control")


def cached(tmp_path: Path, repo: str, pipeline: str = "QwenImagePipeline") -> Path:
    folder = tmp_path / "hub" / ("models--" + repo.replace("/", "--"))
    (folder / "refs").mkdir(parents=True)
    (folder / "refs/main").write_text("c" * 40)
    return model(folder / "snapshots" / ("c" * 40), pipeline)


def test_the_hugging_face_cache_is_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    snapshot = cached(tmp_path, "Qwen/Qwen-Image-2512")
    cached(tmp_path, "somebody/Sign-Painter")
    cached(tmp_path, "other/flux", "FluxPipeline")
    half = cached(tmp_path, "Qwen/Qwen-Image")
    (half / "vae/diffusion_pytorch_model.safetensors").unlink()
    assert main(["list", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert (rows["qwen-image-2512"]["where"], rows["qwen-image-2512"]["path"]) == ("cache", str(snapshot))
    assert rows["qwen-image-2512"]["bytes"] == sum(p.stat().st_size for p in snapshot.rglob("*") if p.is_file())
    assert (rows["somebody/Sign-Painter"]["release"], rows["somebody/Sign-Painter"]["where"]) == ("qwen-image", "cache")
    assert "other/flux" not in rows
    assert rows["qwen-image"]["where"] == "absent", "half a model in the cache is none"
    assert "from: Qwen/Qwen-Image-2512 cccccccccccc" in show(capsys, "qwen-image-2512")
    assert "release: qwen-image;" in show(capsys, "somebody/Sign-Painter")


def test_list_and_remove(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = model(model_folder("qwen-image-2512"))
    size = (folder / "model_index.json").stat().st_size
    files = {"model_index.json": {"size": size, "digest": ""}}
    write_marker(folder, Marker("Qwen/Qwen-Image-2512", "main", "c" * 40, "https://huggingface.co", files))
    other = model(model_folder("some/painter"))
    write_marker(other, Marker("some/painter", "main", "c" * 40, "https://huggingface.co", files))
    assert main(["list"]) == 0
    text = capsys.readouterr().out
    told = [line.split()[:2] for line in text.splitlines()]
    assert ["qwen-image-2512", str(folder)] in told and "some/painter" in [line[0] for line in told]
    assert main(["list", "--quiet"]) == 0
    assert (
        {"qwen-image-2512", "some/painter"}
        <= set(capsys.readouterr().out.split())
        <= {
            "nano",
            "qwen-image-2512",
            "some/painter",
        }
    )
    monkeypatch.setattr("sys.stdin", open(os.devnull))  # noqa: SIM115
    assert main(["remove", "qwen-image-2512"]) == 2 and folder.exists()
    assert main(["remove", "qwen-image-2512", "--yes"]) == 0 and not folder.exists()
    assert main(["remove", "some/painter", "-y"]) == 0 and not other.exists()
    capsys.readouterr()
    for name, words in {
        "nano": "comes with this program",
        "qwen-image": "nothing to delete",
        "../../x": "owner/name",
        "..": "no release called",
    }.items():
        assert main(["remove", name, "--yes"]) == 2
        assert words in capsys.readouterr().err
    assert (tmp_path / "home" / "models").is_dir()


def test_removing_a_link_leaves_what_it_leads_to(tmp_path: Path) -> None:
    real = model(tmp_path / "disk/qwen-image")
    link = model_folder("qwen-image")
    link.parent.mkdir(parents=True)
    link.symlink_to(real)
    assert main(["remove", "qwen-image", "--yes"]) == 0
    assert not link.exists() and (real / "model_index.json").exists()


def test_a_marker_with_a_missing_file_is_no_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = model(model_folder("qwen-image"))
    files = {"vae/none.safetensors": {"size": 5, "digest": ""}, "../../evil": {"size": 1, "digest": ""}}
    write_marker(folder, Marker("Qwen/Qwen-Image", "main", "c" * 40, "", files))
    assert "not on this machine" in show(capsys, "qwen-image")
    (folder / MARKER).write_text("{broken")
    assert "not on this machine" in show(capsys, "qwen-image")
    (folder / MARKER).unlink()
    assert "2 blocks" in show(capsys, "qwen-image"), "a folder put there by hand counts"


def test_show_needs_no_heavy_library(tmp_path: Path) -> None:
    folder = model(tmp_path / "model")
    program = (
        "import sys\nfrom lanting.cli.main import main\n"
        f"main(['show', {str(folder)!r}]); main(['list'])\n"
        "print([name for name in ('torch', 'huggingface_hub', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr
