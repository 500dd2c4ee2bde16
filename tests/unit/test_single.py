"""Single files: which components are inside, which release they are of, where the rest comes from, what is refused.

Also the file that `lanting quantize` writes, and what is left when it is killed.
"""

from __future__ import annotations

import json
import math
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lanting.cli.main import main
from lanting.core.errors import ModelError, OutputError, RequestError
from lanting.core.types import Request
from lanting.engine import Engine
from lanting.engine.quantize import Target, quantize_model
from lanting.nn.mmdit import QwenImageTransformer, TransformerConfig
from lanting.specs import get_spec
from lanting.weights.build import build_text_encoder
from lanting.weights.checkpoint import open_component, read_json
from lanting.weights.configs import config_of
from lanting.weights.find import locate, release_of
from lanting.weights.forms import shapes
from lanting.weights.headers import read_file
from lanting.weights.home import embedded_nano, model_folder
from lanting.weights.inspect import describe
from lanting.weights.single import open_file, sniff, split_names, wan_names
from lanting.weights.stored import Placing

NANO = embedded_nano()
REQUEST = Request('a red sign with white text "HELLO"', steps=2, seed=3)


@pytest.fixture(autouse=True)
def _own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LANTING_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("LANTING_LANG", "en")


def tensors(component: str) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in open_component(NANO / component).tensors()}


def draw(model: str, **options) -> np.ndarray:
    with Engine.open(model, device="cpu", **options) as engine:
        return np.asarray(engine.run(REQUEST).images[0])


@pytest.fixture(scope="module")
def picture() -> np.ndarray:
    return draw("nano")


def test_a_file_of_ours_draws_what_the_folder_draws(picture, tmp_path):
    quantize_model("nano", tmp_path / "nano.safetensors", Target("bf16"))
    assert np.array_equal(draw(str(tmp_path / "nano.safetensors")), picture)


@pytest.mark.parametrize("kind", ["int8", "fp8", "int4"])
def test_packed_files_draw_what_packing_while_loading_draws(kind, picture, tmp_path):
    """From a transformer file and a text encoder file, and with `quant`: the same picture, near the plain one."""
    for component in ("transformer", "text_encoder"):
        quantize_model("nano", tmp_path / f"{component}.safetensors", Target(kind, component))
    encoder = {"text_encoder": str(tmp_path / "text_encoder.safetensors")}
    filed = draw(str(tmp_path / "transformer.safetensors"), parts=encoder)
    assert np.array_equal(filed, draw("nano", quant=kind))
    far = np.abs(filed.astype(float) - picture).mean()
    assert 0 < far < {"int8": 1, "fp8": 4, "int4": 12}[kind]


def test_what_a_file_of_ours_says(tmp_path):
    done = quantize_model("nano", tmp_path / "nano.safetensors", Target("int4", rotate=True))
    infos, notes = read_file(tmp_path / "nano.safetensors")
    own = json.loads(notes["lanting"])
    assert (own["release"], own["to"], own["component"]) == ("nano", "int4", "transformer")
    assert own["config"] == json.loads((NANO / "transformer" / "config.json").read_text())
    layer = json.loads(notes["_quantization_metadata"])["layers"]["transformer_blocks.0.img_mlp.net.2"]
    assert layer == {"format": "lanting_int4", "group_size": 64, "convrot": True, "convrot_groupsize": 64}
    assert infos["img_in.weight"].dtype == "BF16"
    assert done["bytes"] < 0.35 * done["bytes_before"]
    assert all(info.start % 4 == 0 for info in infos.values())
    (part,) = describe(str(tmp_path / "nano.safetensors")).parts
    assert part.parameters == sum(tensor.numel() for tensor in tensors("transformer").values())
    assert "int4 in groups of 64 rotated" in part.dtypes


def test_quantizing_again_from_a_packed_file(tmp_path):
    """fp8 to int8 goes by way of the values, not of the bytes; GGUF to bf16 likewise."""
    quantize_model("nano", tmp_path / "a.safetensors", Target("fp8"))
    quantize_model(str(tmp_path / "a.safetensors"), tmp_path / "b.safetensors", Target("int8"))
    quantize_model("nano", tmp_path / "c.gguf", Target("q8_0"))
    quantize_model(str(tmp_path / "c.gguf"), tmp_path / "d.safetensors", Target("bf16"))
    name = "transformer_blocks.0.attn.to_q.weight"
    exact, states = tensors("transformer")[name].float(), [load_file(tmp_path / f"{n}.safetensors") for n in "bd"]
    scale = states[0]["transformer_blocks.0.attn.to_q.weight_scale"]
    for values, most in ((states[0][name].float() * scale, 0.04), (states[1][name].float(), 0.01)):
        assert ((values - exact).norm() / exact.norm()).item() < most


@pytest.mark.parametrize(
    ("target", "file", "error", "said"),
    [
        (Target("int3"), "x.safetensors", RequestError, "none we know"),
        (Target("int8"), "x.gguf", RequestError, "safetensors"),
        (Target("q4_k_m"), "x.safetensors", RequestError, "gguf"),
        (Target("int8", "vae"), "x.safetensors", RequestError, "none that is quantized"),
        (Target("int8"), "no/x.safetensors", OutputError, "can't be written"),
    ],
)
def test_what_can_not_be_written(target, file, error, said, tmp_path):
    with pytest.raises(error) as caught:
        quantize_model("nano", tmp_path / file, target)
    from lanting.core.lang import explain

    assert said in explain(caught.value)
    assert not list(tmp_path.glob("x*"))


def test_the_verb(tmp_path, capsys):
    out = str(tmp_path / "nano.safetensors")
    assert main(["quantize", "nano", "--to", "int8", "-o", out, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["to"] == "int8"
    assert main(["quantize", "nano", "--to", "int8", "-o", out]) == 2
    assert "overwrite it with --force" in capsys.readouterr().err
    assert main(["quantize", out, "--to", "int4", "-o", out, "--force"]) == 2
    assert "the file that is read" in capsys.readouterr().err
    assert main(["quantize", "nano", "--to", "int4", "--group", "65", "-o", out, "--force"]) == 2
    assert main(["show", out]) == 0
    assert f"lanting generate 'WORDS' --model {out}" in capsys.readouterr().out


def test_a_killed_run_leaves_nothing_under_the_name(tmp_path):
    """Held up in the middle and killed: a hidden part is left, and it is not in the way of the next run."""
    code = (
        "import sys, time, pathlib\n"
        "from lanting.engine.quantize import Target, quantize_model\n"
        "def tick(done, total):\n"
        "    if done > total / 2: print('half', flush=True); time.sleep(600)\n"
        f"quantize_model('nano', pathlib.Path({str(tmp_path / 'x.safetensors')!r}), Target('int8'), tick)\n"
    )
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert child.stdout is not None
    assert child.stdout.readline() == b"half\n"
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert not (tmp_path / "x.safetensors").exists()
    quantize_model("nano", tmp_path / "x.safetensors", Target("int8"))
    read_file(tmp_path / "x.safetensors")


def test_memory_holds_a_tensor_or_two_whatever_the_model_measures(tmp_path):
    """The high-water mark of writing 5 blocks is at most two weights (in float32) above that of writing one. Every file
    is written by a fresh copy of one process, whose mark begins at what it had in use."""
    for layers in (1, 5):
        with torch.device("meta"):
            net = QwenImageTransformer(TransformerConfig(layers, 4, 128, 64))
        state = {name: torch.full(p.shape, 0.5, dtype=torch.bfloat16) for name, p in net.named_parameters()}
        save_file(state, str(tmp_path / f"{layers}.safetensors"))
    assert (tmp_path / "5.safetensors").stat().st_size > 60e6
    code = (
        "import os, pathlib, sys\n"
        "from lanting.engine.quantize import Target, quantize_model\n"
        "folder = pathlib.Path(sys.argv[1])\n"
        "for name, kind in (('a.safetensors', 'fp8'), ('a.gguf', 'q8_0')):\n"
        "    for layers in ('1', '5'):\n"
        "        if os.fork():\n"
        "            assert os.wait()[1] == 0\n"
        "            continue\n"
        "        quantize_model(str(folder / f'{layers}.safetensors'), folder / (layers + name), Target(kind))\n"
        "        status = pathlib.Path('/proc/self/status').read_text()\n"
        "        print(next(line.split()[1] for line in status.splitlines() if line.startswith('VmHWM')), flush=True)\n"
        "        os._exit(0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    peaks = [1024 * int(line) for line in done.stdout.split()]
    for small, large in (peaks[:2], peaks[2:]):
        assert large - small < 2 * 4 * 6 * 512**2


# ---------------------------------------------------------------- names
def test_an_all_in_one_file(picture, tmp_path):
    """Three components under ComfyUI's three prefixes; the tokenizer and the reader's config are nano's."""
    prefixes = {
        "transformer": "model.diffusion_model.",
        "vae": "vae.",
        "text_encoder": "text_encoders.qwen25_7b.transformer.",
    }
    state = {prefix + name: t for part, prefix in prefixes.items() for name, t in tensors(part).items()}
    path = tmp_path / "all.safetensors"
    save_file(state, path)
    found = open_file(path)
    assert set(found) == set(prefixes)
    for part in prefixes:
        assert set(found[part].names()) == set(tensors(part)), part
    assert describe(str(path)).parts[0].kind.name == "all-in-one"


def test_a_number_that_comfyui_saves_beside_a_text_encoder_is_no_part_of_it(tmp_path):
    """Checkpoints that ComfyUI saves have CLIP's `logit_scale` there, whatever the encoder is."""
    part, prefix = tensors("text_encoder"), "text_encoders.qwen25_7b."
    state = {f"{prefix}transformer.{name}": t for name, t in part.items()} | {f"{prefix}logit_scale": torch.tensor(4.6)}
    save_file(state, tmp_path / "all.safetensors")
    found = open_file(tmp_path / "all.safetensors")["text_encoder"]
    config = read_json(NANO / "text_encoder" / "config.json")
    net = build_text_encoder(found, config, Placing(torch.float32, torch.device("cpu")), vision=True)
    assert set(net.state_dict()) == set(part)
    assert set(shapes(found)) == set(part)


def test_a_text_encoder_in_either_naming():
    ours = {"model.layers.0.self_attn.q_proj.weight", "visual.blocks.0.norm1.weight", "model.embed_tokens.weight"}
    newer = {
        name.replace("model.", "model.language_model.", 1) if name.startswith("model.") else f"model.{name}"
        for name in ours
    }
    assert set(split_names(newer)["text_encoder"]) == set(split_names(ours)["text_encoder"]) == ours


def test_flags_belong_to_the_component_they_stand_with():
    names = ["transformer_blocks.0.img_mod.1.weight", "__index_timestep_zero__", "scaled_fp8"]
    for prefix in ("", "model.diffusion_model."):
        assert set(split_names([prefix + name for name in names])["transformer"]) == set(names)


def test_wan_names_of_a_smaller_vae():
    """One residual block a level: the places in the decoder are counted in threes, not in fours."""
    theirs = ["decoder.upsamples.2.resample.1.weight", "decoder.upsamples.3.residual.2.bias", "decoder.head.0.gamma"]
    assert list(wan_names(theirs)) == [
        "decoder.up_blocks.0.upsamplers.0.resample.1.weight",
        "decoder.up_blocks.1.resnets.0.conv1.bias",
        "decoder.norm_out.gamma",
    ]


# ---------------------------------------------------------------- releases
def bare(path: Path, *extra: str) -> Path:
    """A complete small transformer without our notes: one block, 128 wide."""
    block = "transformer_blocks."
    state = {n: t for n, t in tensors("transformer").items() if not n.startswith(block) or n.startswith(f"{block}0.")}
    for name in extra:
        state[name] = torch.zeros(2, 128) if name.endswith("weight") else torch.empty(0)
    save_file(state, path)
    return path


@pytest.mark.parametrize(
    ("name", "extra", "release", "steps"),
    [
        ("qwen_image_fp8_e4m3fn", (), "qwen-image", 50),
        ("qwen_image_2512_bf16", (), "qwen-image-2512", 50),
        ("qwen_image_edit_fp8", (), "qwen-image-edit", 50),
        ("Qwen-Image-Edit-2509-Q4", (), "qwen-image-edit-2509", 40),
        ("anything", ("__index_timestep_zero__",), "qwen-image-edit-2511", 40),
        ("anything", ("model.diffusion_model.__index_timestep_zero__",), "qwen-image-edit-2511", 40),
        ("qwen_image_edit_2511", (), "qwen-image-edit-2511", 40),
        ("anything", ("time_text_embed.addition_t_embedding.weight",), "qwen-image-layered", 50),
        ("qwen-image-lightning-8steps", (), "qwen-image", 8),
        ("qwen_image_edit_2509_lightning_4steps", (), "qwen-image-edit-2509", 4),
    ],
)
def test_markers_decide_and_names_help(name, extra, release, steps, tmp_path):
    path = bare(tmp_path / f"{name}.safetensors", *extra)
    spec, notes = release_of(path, open_file(path)["transformer"])
    assert (spec.name, spec.defaults.steps) == (release, steps)
    told = describe(str(path))
    assert told.release == release and (told.spec or get_spec(release)).defaults.steps == steps
    assert bool(notes) == (not extra and not any(y in name for y in ("2509", "2512")))


def test_configs_are_read_off_shapes(tmp_path):
    """Of every component of nano, in what the tensors can tell; and of the sizes of the real ones."""
    told = config_of("transformer", open_file(bare(tmp_path / "x.safetensors"))["transformer"])
    said = json.loads((NANO / "transformer" / "config.json").read_text())
    assert {key: value for key, value in said.items() if key[0] != "_"} == {
        key: 6 if key == "num_layers" else value for key, value in told.items() if key[0] != "_"
    }
    save_file({n: t for n, t in tensors("text_encoder").items()}, tmp_path / "te.safetensors")
    text = config_of("text_encoder", open_file(tmp_path / "te.safetensors")["text_encoder"])["text_config"]
    assert (text["num_hidden_layers"], text["hidden_size"], text["intermediate_size"]) == (2, 128, 384)
    save_file(tensors("vae"), tmp_path / "vae.safetensors")
    vae = config_of("vae", open_file(tmp_path / "vae.safetensors")["vae"])
    assert (vae["base_dim"], vae["num_res_blocks"], vae["input_channels"], vae["z_dim"]) == (16, 1, 3, 16)


# ---------------------------------------------------------------- the rest of the model
def test_a_lone_transformer_says_what_it_lacks(tmp_path):
    path = bare(tmp_path / "qwen_image_bf16.safetensors")
    pull = "'lanting pull qwen-image --without transformer' for the rest"
    with pytest.raises(ModelError, match=f"{pull}, or give files with --text-encoder, --vae"):
        locate(str(path))
    with pytest.raises(ModelError, match="give files with --vae"):
        locate(str(path), {"text_encoder": str(NANO / "text_encoder")})
    assert describe(str(path)).runs.endswith(" --text-encoder FILE --vae FILE")


def test_a_folder_here_that_is_called_like_another_model(tmp_path, monkeypatch):
    """Releases are meant by their names, then folders, then what was pulled; and what else is called so is said."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "qwen-image").symlink_to(NANO)
    with pytest.raises(ModelError, match=r"or say \./qwen-image for the folder"):
        locate("qwen-image")
    assert locate("./qwen-image").path == Path("qwen-image")
    installed = model_folder("qwen-image")
    installed.parent.mkdir(parents=True, exist_ok=True)
    installed.symlink_to(NANO)
    found = locate("qwen-image")
    assert found.path == installed and found.notes[-1].endswith("for the folder of that name here say ./qwen-image")
    assert describe("qwen-image").notes[-1] == found.notes[-1]

    pulled = model_folder("maker/signs")
    pulled.parent.mkdir(parents=True, exist_ok=True)
    pulled.symlink_to(NANO)
    (tmp_path / "maker" / "signs").mkdir(parents=True)  # no model in it
    assert locate("maker/signs").path == describe("maker/signs").path == pulled
    (tmp_path / "maker" / "signs").rmdir()
    (tmp_path / "maker" / "signs").symlink_to(NANO)
    found = locate("maker/signs")
    assert found.path == Path("maker/signs") and found.notes[-1].endswith(f"and not the model in {pulled}")


def test_the_rest_is_given_or_installed(tmp_path):
    path = bare(tmp_path / "qwen_image_bf16.safetensors")
    parts = {"text_encoder": str(NANO / "text_encoder"), "vae": str(NANO)}
    with Engine.open(str(path), device="cpu", parts=parts) as engine:
        assert engine.spec.name == "qwen-image"
        assert engine.run(Request("x", steps=1, seed=1, size=(64, 64), guidance_scale=1)).images[0].size == (64, 64)
    shutil.copytree(NANO, model_folder("qwen-image-2512"))
    found = locate(str(path))
    assert found.path == model_folder("qwen-image-2512"), "a related release brings the rest"
    assert (found.spec.name, found.tokenizer.parent) == ("qwen-image", found.path)
    assert found.notes[-1].endswith("by its name alone.")
    layered = bare(tmp_path / "x.safetensors", "time_text_embed.addition_t_embedding.weight")
    with pytest.raises(ModelError, match="pull qwen-image-layered"):
        locate(str(layered))


def test_another_vae_and_reader_for_a_release(picture, tmp_path):
    """Files without a config: what their tensors can't tell stays as the release has it."""
    state = tensors("vae")
    save_file(tensors("text_encoder"), tmp_path / "reader.safetensors")
    save_file(state, tmp_path / "same.safetensors")
    state["decoder.conv_out.bias"] = state["decoder.conv_out.bias"] + 0.5
    save_file(state, tmp_path / "bright.safetensors")
    reader = str(tmp_path / "reader.safetensors")
    assert np.array_equal(
        draw("nano", parts={"vae": str(tmp_path / "same.safetensors"), "text_encoder": reader}), picture
    )
    assert draw("nano", parts={"vae": str(tmp_path / "bright.safetensors")}).mean() > picture.mean() + 10


@pytest.mark.parametrize("options", [{"vae": "none.safetensors"}, {"text_encoder": str(NANO / "vae")}])
def test_parts_that_are_wrong(options):
    with pytest.raises(ModelError):
        Engine.open("nano", parts=options).run(REQUEST)


def test_files_that_hold_something_else(tmp_path):
    save_file(tensors("vae"), tmp_path / "vae.safetensors")
    with pytest.raises(ModelError, match="no transformer but vae: give it with --vae"):
        locate(str(tmp_path / "vae.safetensors"))
    save_file({"a": torch.zeros(2)}, tmp_path / "odd.safetensors")
    with pytest.raises(ModelError, match="nothing this version knows"):
        locate(str(tmp_path / "odd.safetensors"))
    part = bare(tmp_path / "part.safetensors")
    state = load_file(part)
    del state["transformer_blocks.0.attn.norm_q.weight"]
    save_file(state, part)
    with pytest.raises(ModelError, match="no complete transformer"):
        locate(str(part))


# ---------------------------------------------------------------- pickles
def test_pickles_are_known_by_their_bytes(tmp_path):
    torch.save({"a": torch.zeros(3)}, tmp_path / "zip.safetensors")
    torch.save({"a": torch.zeros(3)}, tmp_path / "old.safetensors", _use_new_zipfile_serialization=False)
    with zipfile.ZipFile(tmp_path / "any.gguf", "w") as archive:
        archive.writestr("x", "y")
    for name in ("zip.safetensors", "old.safetensors", "any.gguf"):
        with pytest.raises(ModelError, match="pickled"):
            locate(str(tmp_path / name))
        assert main(["show", str(tmp_path / name)]) == 2
        assert main(["quantize", str(tmp_path / name), "--to", "int8", "-o", str(tmp_path / "x.safetensors")]) == 2


def test_a_header_of_unlucky_length_is_no_pickle(tmp_path):
    """The first bytes of a safetensors file are its header's length, which may look like a pickle's."""
    for length in (0x280, 0x480):
        header = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
        path = tmp_path / f"{length}.safetensors"
        path.write_bytes(length.to_bytes(8, "little") + header.ljust(length) + bytes(4))
        assert sniff(path) == "safetensors"
        assert list(read_file(path)[0]) == ["a"]


def test_reading_is_random_access_and_leaves_nothing_mapped(tmp_path):
    """A tensor's mapping ends with its last view, so blocks can come and go."""
    save_file({f"x{i}": torch.full((1 << 16,), float(i)) for i in range(8)}, tmp_path / "x.safetensors")
    from lanting.weights.checkpoint import Checkpoint

    infos, _ = read_file(tmp_path / "x.safetensors")
    whole = Checkpoint("x", dict.fromkeys(infos, tmp_path / "x.safetensors"), infos)
    mapped = lambda: Path("/proc/self/maps").read_text().count("x.safetensors")  # noqa: E731
    found = whole.read(["x7", "x0", "x3"])
    assert [int(tensor[9]) for tensor in found.values()] == [7, 0, 3]
    if sys.platform == "linux":
        assert mapped() == 3
        found["x7"] += 1  # ours alone
        assert int(whole.read(["x7"])["x7"][0]) == 7
        del found
        assert mapped() == 0
    assert whole.bytes() == 8 * 4 * (1 << 16)
    assert math.prod(infos["x0"].shape) == 1 << 16
    before = time.perf_counter()
    for _ in range(100):
        whole.read(["x1"])
    assert time.perf_counter() - before < 5
