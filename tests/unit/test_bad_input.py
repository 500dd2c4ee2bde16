"""Everything a person can get wrong, through the real command line and the real engine.

Each case ends in one sentence and exit code 2, without a traceback and without leaving a file behind. The model is a
tiny one with random weights, saved as a release would be; damaged copies of it are the bad models.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from fakes import bare_png
from lanting.cli.main import main

SMALL = ["--size", "32x32", "--steps", "1", "--device", "cpu"]


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> Path:
    """A folder with two sound models: `model` draws, `editor` edits."""
    root = tmp_path_factory.mktemp("sound")
    tiny.save_folder(root / "model", shard="100KB")
    tiny.save_folder(root / "editor", "qwen-image-edit")
    return root


@pytest.fixture
def here(models, tmp_path, monkeypatch) -> Path:
    """The current folder: links to the models, some files that are not what their names say."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LANTING_LANG", "en")
    monkeypatch.setenv("LANTING_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    for name in ("model", "editor"):
        (tmp_path / name).symlink_to(models / name)
    Image.new("RGB", (48, 32), "orange").save("cat.png")
    Image.new("L", (48, 32), 255).save("mask.png")
    Image.new("L", (16, 16), 255).save("small-mask.png")
    Image.new("L", (48, 32), 0).save("black-mask.png")
    Image.new("RGB", (4000, 10)).save("narrow.png")
    Path("text.png").write_text("I am not a picture")
    Path("empty.png").touch()
    Path("huge.png").write_bytes(bare_png(9000, 9000))
    Path("half.png").write_bytes(Path("cat.png").read_bytes()[:60])
    Path("anim.gif").write_bytes(b"GIF89a" + b"\0" * 50)
    Path("folder.png").mkdir()
    Path("taken.png").write_bytes(b"mine")
    return tmp_path


def wrong(words: list[str], said: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Runs the command and checks that it is refused as a person deserves."""
    before = {path: path.stat().st_mtime_ns for path in here.rglob("*")}
    code = main(words)
    out = capsys.readouterr()
    assert code == 2, out.err
    assert said in out.err, out.err
    lines = [line for line in out.err.splitlines() if line.startswith("lanting: ")]
    assert len(lines) == 1
    assert len(lines[0]) < 400
    assert "Traceback" not in out.err
    assert out.out == ""
    assert {path: path.stat().st_mtime_ns for path in here.rglob("*")} == before


DRAW = ["generate", "a cat", "--model", "model"]
EDIT = ["edit", "cat.png", "make it blue", "--model", "editor", "--steps", "1"]
VARY = ["edit", "cat.png", "a cat", "--model", "model", "--steps", "1"]
CASES: dict[str, tuple[list[str], str]] = {
    "size 0": ([*DRAW, "--size", "0x0"], "Nearest: 16×16"),
    "size 17": ([*DRAW, "--size", "17x32"], "Nearest: 16×32"),
    "size 100000": ([*DRAW, "--size", "100000x64"], "Nearest: 4096×64"),
    "size below zero": ([*DRAW, "--size=-16x16"], "not understood"),
    "size in words": ([*DRAW, "--size", "large"], "not understood"),
    "size of one number": ([*DRAW, "--size", "512"], "not understood"),
    "ratio of zero": ([*DRAW, "--size", "0:1"], "not understood"),
    "ratio too wide": ([*DRAW, "--size", "50:1"], "too extreme"),
    "empty prompt": (["generate", "", "--model", "model"], "prompt is empty"),
    "blank prompt": (["generate", " \n\t", "--model", "model"], "prompt is empty"),
    "20,000 characters": (["generate", "x" * 20_000, "--model", "model"], "20,000 characters"),
    "prompt not UTF-8": (["generate", "caf\udce9", "--model", "model"], "UTF-8"),
    "long negative": ([*DRAW, "--negative", "x" * 9_000], "9,000 characters"),
    "0 steps": ([*DRAW, "--steps", "0"], "1 to 1000"),
    "1001 steps": ([*DRAW, "--steps", "1001"], "1 to 1000"),
    "steps below zero": ([*DRAW, "--steps", "-5"], "1 to 1000"),
    "steps in words": ([*DRAW, "--steps", "few"], "'--steps'"),
    "half a step": ([*DRAW, "--steps", "0.5"], "'--steps'"),
    "guidance NaN": ([*DRAW, "--guidance", "nan"], "0 to 100"),
    "guidance infinite": ([*DRAW, "--guidance", "inf"], "0 to 100"),
    "guidance below zero": ([*DRAW, "--guidance", "-1"], "0 to 100"),
    "seed below zero": ([*DRAW, "--seed", "-1"], "seed"),
    "seed of 2^63": ([*DRAW, "--seed", str(2**63)], "seed"),
    "no pictures": ([*DRAW, "--count", "0"], "1 to 64"),
    "1000 pictures": ([*DRAW, "--count", "1000"], "1 to 64"),
    "unknown flag": ([*DRAW, "--sise", "1:1"], "--sise"),
    "unknown verb": (["draw", "a cat"], "no such command"),
    "no prompt": (["generate"], "a prompt, or --prompts FILE"),
    "unknown dtype": ([*DRAW, "--dtype", "int2"], "dtype 'int2'"),
    "unknown device": ([*DRAW, "--device", "toaster"], "toaster"),
    "device not here": ([*DRAW, "--device", "cuda:99"], "cuda:99"),
    "unknown model": (["generate", "x", "--model", "qwen-imaje"], "did you mean qwen-image"),
    "release not downloaded": (["generate", "x", "--model", "qwen-image-2512"], "lanting pull qwen-image-2512"),
    "model folder missing": (["generate", "x", "--model", "no/such/folder"], "does not exist"),
    "model is a picture": (["generate", "x", "--model", "cat.png"], "is a file"),
    "model is an empty folder": (["generate", "x", "--model", "folder.png"], "model_index.json"),
    "output exists": ([*DRAW, "-o", "taken.png"], "--force"),
    "output folder missing": ([*DRAW, "-o", "no/such/x.png"], "does not exist"),
    "output with no ending": ([*DRAW, "-o", "picture"], ".png, .jpg or .webp"),
    "output is a GIF": ([*DRAW, "-o", "x.gif"], ".png, .jpg or .webp"),
    "output read-only": ([*DRAW, "-o", "/proc/x.png"], "nothing can be written"),
    "output of a long name": ([*DRAW, "-o", "x" * 300 + ".png"], "too long to be the name of a file"),
    "model of a long name": (["generate", "x", "--model", "x" * 300], "too long to be the name of a file"),
    "packed weights into a folder": (
        ["quantize", "model", "--to", "int8", "-o", "folder.png"],
        "folder.png is a folder",
    ),
    "fp8, rotated": (["quantize", "model", "--to", "fp8", "--rotate", "-o", "x.safetensors"], "leave --rotate out"),
    "GGUF, rotated": (["quantize", "model", "--to", "q8_0", "--rotate", "-o", "x.gguf"], "leave --rotate out"),
    "int8 in groups": (["quantize", "model", "--to", "int8", "--group", "32", "-o", "x.safetensors"], "--group out"),
    "output inside a file": ([*DRAW, "-o", "cat.png/x.png"], "not a folder"),
    "text file named .png": (["edit", "text.png", "x", "--model", "editor"], "like a text file"),
    "empty picture": (["edit", "empty.png", "x", "--model", "editor"], "is empty"),
    "81 megapixels": (["edit", "huge.png", "x", "--model", "editor"], "81 million pixels"),
    "half a picture": (["edit", "half.png", "x", "--model", "editor"], "half.png"),
    "GIF": (["edit", "anim.gif", "x", "--model", "editor"], "like a GIF"),
    "picture missing": (["edit", "no.png", "x", "--model", "editor"], "does not exist"),
    "picture is a folder": (["edit", "folder.png", "x", "--model", "editor"], "is a folder"),
    "narrow picture": (["edit", "narrow.png", "x", "--model", "editor"], "too narrow"),
    "edit without words": (["edit", "cat.png", "--model", "editor"], "say what to do"),
    "edit without prompt": (["edit", "cat.png", "mask.png", "--model", "editor"], "say what to do"),
    "edit with an empty prompt": (["edit", "cat.png", "", "--model", "editor"], "prompt is empty"),
    "two pictures for one": (["edit", "cat.png", "cat.png", "x", "--model", "editor"], "at most 1"),
    "an edit release without picture": (["generate", "x", "--model", "editor"], "edits pictures"),
    "strength 0": ([*VARY, "--strength", "0"], "strength 0"),
    "strength 2": ([*VARY, "--strength", "2"], "0 to 1"),
    "strength NaN": ([*VARY, "--strength", "nan"], "0 to 1"),
    "strength of an edit": ([*EDIT, "--strength", "0.5"], "strength has no meaning"),
    "mask of another size": ([*VARY, "--mask", "small-mask.png"], "16×16"),
    "black mask": ([*VARY, "--mask", "black-mask.png"], "black everywhere"),
    "mask missing": ([*VARY, "--mask", "no.png"], "does not exist"),
    "layers of a model without": (["layers", "cat.png", "--model", "model"], "can't do layered"),
    "replay of a plain picture": (["replay", "cat.png"], "no recipe"),
    "replay of a text": (["replay", "text.png"], "like a text file"),
}


@pytest.mark.parametrize("case", CASES)
def test_one_sentence_and_exit_code_2(case, here, capsys):
    words, said = CASES[case]
    wrong(words, said, here, capsys)


def shard(model: Path, part: str = "transformer") -> Path:
    return sorted((model / part).glob("*.safetensors"))[-1]


def truncate(path: Path, share: float) -> None:
    os.truncate(path, int(path.stat().st_size * share))


def reshape(model: Path) -> None:
    path = shard(model)
    tensors = load_file(path)
    name = next(name for name, tensor in tensors.items() if tensor.ndim == 2)
    save_file(tensors | {name: torch.zeros(3, 5)}, path)


def rename(model: Path) -> None:
    path = model / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    tensors["surprise.weight"] = tensors.pop(next(iter(tensors)))
    save_file(tensors, path)


def lie_about_length(model: Path) -> None:
    path = shard(model)
    path.write_bytes(struct.pack("<Q", 2**60) + path.read_bytes()[8:])


def point_outside(model: Path) -> None:
    path = next((model / "transformer").glob("*.index.json"))
    table = json.loads(path.read_text())
    table["weight_map"] = dict.fromkeys(table["weight_map"], "../../../../etc/passwd")
    path.write_text(json.dumps(table))


def edit_json(name: str, **values: object) -> Callable[[Path], None]:
    def damage(model: Path) -> None:
        path = model / name
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return damage


def pickled(model: Path) -> None:
    for path in (model / "vae").glob("*.safetensors"):
        path.unlink()
    (model / "vae" / "diffusion_pytorch_model.bin").write_bytes(b"\x80\x04.")


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "shard missing": (lambda m: shard(m).unlink(), "is missing"),
    "shard cut short": (lambda m: truncate(shard(m), 0.5), "download it again"),
    "shard cut in its header": (lambda m: os.truncate(shard(m), 20), "download it again"),
    "shard empty": (lambda m: os.truncate(shard(m), 0), "download it again"),
    "shard is a web page": (lambda m: shard(m).write_text("<html>Not found</html>" * 9), "download it again"),
    "header as long as the universe": (lie_about_length, "download it again"),
    "tensor of another shape": (reshape, "shape"),
    "tensor of another name": (rename, "lacks 1 tensor"),
    "index points outside": (point_outside, "outside its folder"),
    "pickled weights": (pickled, "can run code"),
    "config missing": (lambda m: (m / "vae" / "config.json").unlink(), "is missing"),
    "config is no JSON": (lambda m: (m / "transformer" / "config.json").write_text("{oops"), "JSON"),
    "config is a list": (lambda m: (m / "transformer" / "config.json").write_text("[]"), "JSON object"),
    "another family": (edit_json("model_index.json", _class_name="FluxPipeline"), "FluxPipeline"),
    "config of another depth": (edit_json("transformer/config.json", num_layers=5), "transformer_blocks"),
    "config of another width": (edit_json("transformer/config.json", num_attention_heads=3), "shape"),
    "config with words for numbers": (edit_json("transformer/config.json", num_layers="two"), "config"),
    "VAE of another model": (edit_json("vae/config.json", base_dim=8), "shape"),
    "tokenizer missing": (lambda m: shutil.rmtree(m / "tokenizer"), "tokenizer"),
    "tokenizer is no JSON": (lambda m: (m / "tokenizer" / "tokenizer.json").write_text("{"), "tokenizer"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_models_are_one_sentence(case, here, models, capsys):
    damage, said = DAMAGE[case]
    shutil.copytree(models / "model", here / "bad")
    damage(here / "bad")
    wrong(["generate", "a cat", "--model", "bad", *SMALL], said, here, capsys)


@pytest.mark.parametrize("case", [*CASES, *DAMAGE])
def test_and_in_chinese(case, here, models, monkeypatch, capsys):
    monkeypatch.setenv("LANTING_LANG", "zh")
    words, damage = CASES.get(case, (["generate", "a cat", "--model", "bad", *SMALL], ""))[0], DAMAGE.get(case)
    if damage:
        shutil.copytree(models / "model", here / "bad")
        damage[0](here / "bad")
    assert main(words) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("lanting: ")
    assert re.search("[\u4e00-\u9fff]", said), said


def test_the_sound_models_draw(here, capsys):
    assert main([*DRAW, *SMALL, "-o", "drawn.png"]) == 0
    assert main([*EDIT, "--size", "32x32", "--device", "cpu", "-o", "edited.png"]) == 0
    assert Image.open("drawn.png").size == Image.open("edited.png").size == (32, 32)


def test_ctrl_c_stops_within_a_step_and_leaves_nothing(here):
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2] / "src")}
    words = [*DRAW, "--size", "128x128", "--steps", "1000", "--device", "cpu", "-o", "x.png", "--preview"]
    running = subprocess.Popen(
        [sys.executable, "-m", "lanting", *words],
        stderr=subprocess.PIPE,
        text=True,
        env=env,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore Ctrl-C
    )
    deadline = time.monotonic() + 120
    while not Path("x.preview.png").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    running.send_signal(signal.SIGINT)
    _, err = running.communicate(timeout=60)
    assert running.returncode == 130
    assert err.splitlines()[-1] == "lanting: cancelled; no half-written file was left"
    assert not [path.name for path in here.iterdir() if path.name.startswith(("x", ".lanting", ".x"))]


def test_the_console_command_itself(here):
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2] / "src")}
    words = [sys.executable, "-m", "lanting", *DRAW, "--size", "17x32"]
    done = subprocess.run(words, capture_output=True, text=True, env=env, timeout=120)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("lanting: the size 17×32 can't be drawn")
    assert done.stderr.count("\n") == 1
