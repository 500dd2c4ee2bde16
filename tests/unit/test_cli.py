"""The command line over a fake engine: what is printed, what is written, which exit code."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from PIL import Image

from fakes import FakeEngine
from lanting.cli import draw
from lanting.cli.main import TOLD, VERBS, command_line, main
from lanting.core.recipe import read_recipe
from lanting.specs import get_spec
from processor import processor_seconds, python


@pytest.fixture
def engine(monkeypatch, tmp_path):
    """A fake engine behind every verb, and an empty current folder."""
    fake = FakeEngine()

    def opened(model, device, dtype, controlnet=None, loras=()):
        fake.spec = get_spec(model)
        fake.controlnet = controlnet
        return fake

    monkeypatch.setattr(draw, "open_engine", opened)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LANTING_LANG", "en")
    return fake


@pytest.fixture
def cat(tmp_path):
    path = tmp_path / "cat.png"
    Image.new("RGB", (64, 48), "orange").save(path)
    return path


def test_generate_writes_a_file_named_from_the_prompt(engine, capsys, tmp_path):
    assert main(["generate", 'A blue sign that says "HELLO"', "--seed", "7"]) == 0
    out = capsys.readouterr()
    path = tmp_path / "a-blue-sign-that-says-hello-7.png"
    assert Image.open(path).getpixel((0, 0)) == (7, 10, 0)
    assert read_recipe(path).request["seed"] == 7
    assert f'{path.name}   "A blue sign' in out.out
    assert f"again: lanting replay {path.name}" in out.out
    assert "nano · 224×96 · 6 steps · " in out.err
    assert "\x1b" not in out.out + out.err  # no colours in a pipe
    assert engine.closed == 1


def test_every_flag_reaches_the_request(engine, tmp_path):
    words = ["generate", "x", "--model", "qwen-image", "--size", "16:9", "--steps", "9", "--guidance", "2.5"]
    assert main([*words, "--negative", "blur", "--seed", "3", "--count", "2", "-o", "set.webp"]) == 0
    asked = engine.requests[0]
    assert (asked.size, asked.steps, asked.guidance_scale) == ((1664, 928), 9, 2.5)
    assert (asked.negative_prompt, asked.seed, asked.count) == ("blur", 3, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["set-1.webp", "set-2.webp"]


def test_json_is_one_object(engine, capsys):
    assert main(["generate", "x", "--seed", "1", "--json"]) == 0
    out = capsys.readouterr()
    told = json.loads(out.out)
    assert told["files"][0] == {"path": "x-1.png", "seed": 1, "size": [8, 8], "weights": engine.weights}
    assert (told["model"], told["task"], told["request"]["prompt"]) == ("nano", "text_to_image", "x")
    assert told["seconds"]["total"] > 0
    assert out.err == ""


def test_quiet_prints_paths_only(engine, capsys):
    assert main(["generate", "x", "--seed", "1", "--count", "2", "--quiet"]) == 0
    out = capsys.readouterr()
    assert (out.out, out.err) == ("x-1.png\nx-2.png\n", "")


def test_prompt_from_stdin(engine, monkeypatch):
    import io

    monkeypatch.setattr("sys.stdin", io.StringIO("two\nlines\n"))
    assert main(["generate", "-"]) == 0
    assert engine.requests[0].prompt == "two\nlines"


def test_a_piped_prompt_may_have_a_mark_in_front_and_must_be_utf_8(engine, monkeypatch, capsys):
    import io

    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("兰亭".encode("utf-8-sig")), encoding="utf-8"))
    assert main(["generate", "-"]) == 0
    assert engine.requests[0].prompt == "兰亭"
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9"), encoding="utf-8"))
    assert main(["generate", "-"]) == 2
    assert "not UTF-8" in capsys.readouterr().err


def test_an_edit_in_more_words_than_a_file_name_takes(engine, cat):
    words = "把天空换成晚霞，其余不变。" * 100
    assert main(["edit", "cat.png", words, "--model", "qwen-image-edit", "-o", "a.png"]) == 0
    assert engine.requests[0].prompt == words


def test_edit_and_mask(engine, cat, tmp_path):
    Image.new("L", (64, 48), 255).save(tmp_path / "mask.png")
    assert main(["edit", "cat.png", "make it blue", "--model", "qwen-image-edit", "-o", "a.png"]) == 0
    words = [
        "edit",
        "cat.png",
        "blue",
        "--mask",
        "mask.png",
        "--strength",
        "0.5",
        "--model",
        "qwen-image",
        "-o",
        "b.png",
    ]
    assert main(words) == 0
    first, second = engine.requests
    assert (first.task, first.images[0].size, first.prompt) == ("edit", (64, 48), "make it blue")
    assert (second.task, second.strength, second.mask.mode) == ("inpaint", 0.5, "L")


def test_layers(engine, cat, tmp_path):
    assert main(["layers", "cat.png", "--layers", "3", "--seed", "5"]) == 0
    names = sorted(path.name for path in tmp_path.glob("cat-*"))
    assert names == ["cat-5-layer-1.png", "cat-5-layer-2.png", "cat-5-layer-3.png"]
    assert Image.open(names[0]).mode == "RGBA"


def test_replay_is_identical_or_says_why(engine, capsys, tmp_path):
    assert main(["generate", "x", "--seed", "9", "-o", "x.png"]) == 0
    assert main(["replay", "x.png"]) == 0
    assert "identical, pixel for pixel" in capsys.readouterr().out
    assert (tmp_path / "x-replay.png").exists()
    engine.weights = "0123456789abcdef"
    assert main(["replay", "x.png", "-o", "y.png"]) == 0
    assert "weights feedfacefe → 0123456789" in capsys.readouterr().out
    assert main(["replay", "x.png", "--json"]) == 0 and (tmp_path / "x-replay-2.png").exists()
    told = json.loads(capsys.readouterr().out)
    assert told["identical"] is True and told["difference"] == 0 and "weights" in told["changed"][0]
    assert main(["generate", "x", "--seed", "9", "-o", "x.jpg"]) == 0 and main(["replay", "x.jpg"]) == 0
    assert "saved with losses" in capsys.readouterr().out


def test_replay_of_an_edit_finds_its_picture_again(engine, cat, capsys, tmp_path):
    assert main(["edit", "cat.png", "blue", "--seed", "2", "-o", "x.png"]) == 0
    assert main(["replay", "x.png", "-o", "y.png"]) == 0
    cat.rename(tmp_path / "moved.png")
    assert main(["replay", "x.png", "-o", "z.png"]) == 2
    assert "give it with --image" in capsys.readouterr().err
    assert main(["replay", "x.png", "--image", "moved.png", "-o", "z.png"]) == 0
    Image.new("RGB", (64, 48), "green").save("moved.png")
    assert main(["replay", "x.png", "--image", "moved.png", "-o", "w.png"]) == 0
    assert "is not the picture" in capsys.readouterr().err


def test_preview_shows_and_goes(engine, capsys, tmp_path):
    seen = []
    stream = engine.stream

    def watched(request, previews=False):
        for event in stream(request, previews):
            yield event
            seen.append((tmp_path / "x.preview.png").exists())

    engine.stream = watched
    assert main(["generate", "x", "-o", "x.png", "--preview"]) == 0
    assert seen[:3] == [True] * 3
    assert [path.name for path in tmp_path.iterdir()] == ["x.png"]


def test_ctrl_c_leaves_nothing(engine, capsys, tmp_path):
    engine.fails = KeyboardInterrupt()
    assert main(["generate", "x", "--preview"]) == 130
    assert list(tmp_path.iterdir()) == []
    assert "cancelled" in capsys.readouterr().err
    assert engine.closed == 1


def test_our_own_failure_is_one_sentence_and_1(engine, capsys, tmp_path):
    engine.fails = ValueError("a tensor\nis odd")
    assert main(["generate", "x"]) == 1
    err = capsys.readouterr().err
    assert "something went wrong inside (ValueError: a tensor); run again with --debug" in err
    assert "Traceback" not in err
    assert main(["generate", "x", "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["frobnicate"], "no such command 'frobnicate'; see 'lanting --help'"),
        (["generate"], "a prompt, or --prompts FILE"),
        (["generate", "x", "--stps", "3"], "--stps"),
        (["generate", "x", "--steps", "many"], "'--steps'"),
        (["generate", "x", "y"], "unexpected extra argument"),
        (["generate", "x", "--mask", "m.png"], "lanting edit"),
        (["generate", "x", "--control-scale", "2"], "needs --control pictures"),
        (["edit", "cat.png", "x", "--mask", "m.png", "--keep"], "what a mask leaves is kept anyway"),
        (["train", "nano", "--minutes", "x"], "see 'lanting train nano --help'"),
    ],
)
def test_wrong_words_are_one_sentence_and_2(engine, capsys, words, said):
    assert main(words) == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.startswith("lanting: ")
    assert err.count("\n") == 1


def test_errors_as_json(engine, capsys):
    assert main(["generate", "x", "--size", "17x32", "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["kind"] == "RequestError"


def test_existing_files_are_kept_unless_forced(engine, capsys, tmp_path):
    (tmp_path / "x.png").write_bytes(b"mine")
    assert main(["generate", "x", "-o", "x.png"]) == 2
    assert engine.requests == []  # refused before any work
    assert (tmp_path / "x.png").read_bytes() == b"mine"
    assert main(["generate", "x", "-o", "x.png", "--force"]) == 0


def test_chinese(engine, capsys, monkeypatch):
    monkeypatch.setenv("LANTING_LANG", "zh")
    assert main(["generate", "x", "--steps", "0"]) == 2
    assert "必须是 1 到 1000 的整数" in capsys.readouterr().err
    assert main(["generate", "x", "--seed", "1"]) == 0
    assert "种子 1" in capsys.readouterr().out


def test_list(engine, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("LANTING_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    assert main(["list"]) == 0
    told = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["qwen-image-2512", "not", "here:", "lanting", "pull", "qwen-image-2512"] in told
    assert main(["list", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["name"] == "nano"


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("words", [["--help"], ["--version"], ["generate", "--help"], ["list", "--help"]])
def test_help_needs_no_heavy_library(words, language):
    code = f"import sys; from lanting.cli.main import main; main({words!r}); print(sorted(sys.modules))"
    done = python("-c", code, LANTING_LANG=language)
    assert done.returncode == 0, done.stderr
    loaded = set(eval(done.stdout.splitlines()[-1]))
    assert not loaded & {"torch", "numpy", "tokenizers", "safetensors", "lanting.engine"}


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("words", [["--help"], ["plan", "qwen-image-2512", "--vram", "12G"]])
def test_the_first_words_come_quickly(words, language, tmp_path):
    """Once is enough: a machine busy with other tests takes longer, and nothing makes it take less. Compiled modules
    are kept, as those of an installed package are. On a slow processor, three times what Python's own `import asyncio`
    takes there."""
    env = {"PYTHONPYCACHEPREFIX": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "", "LANTING_LANG": language}
    plain = took = 0.0
    for _ in range(8):
        plain = processor_seconds("-c", "import asyncio", **env)
        took = processor_seconds("-m", "lanting", *words, **env)
        if took < max(0.3, 3 * plain):
            return
    pytest.fail(f"{took:.2f} s, and {plain:.2f} s for asyncio")


def test_the_overview_is_that_of_the_verbs(capsys):
    """Word for word, though it reads none of them."""
    assert main(["--help"]) == 0
    told = capsys.readouterr().out
    command_line()(["--help"], prog_name="lanting", standalone_mode=False)
    assert capsys.readouterr().out == told
    assert [*VERBS] == [*TOLD]


@pytest.mark.parametrize("words", [[], ["lora"]])
def test_no_verb_shows_the_verbs(capsys, words):
    assert main(words) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) > 8 and lines[0].startswith("Usage: lanting")


def test_control_pictures_reach_the_request(engine, cat, tmp_path):
    words = ["generate", "a cat", "--model", "qwen-image", "--controlnet", "union", "--control", str(cat)]
    assert main([*words, "--control", str(cat), "--control-scale", "0.5", "--size", "64x48"]) == 0
    asked = engine.requests[0]
    assert asked.task == "controlnet" and len(asked.images) == 2
    assert asked.options["control_scale"] == 0.5 and engine.controlnet == ("union",)


def test_several_nets_with_a_picture_and_a_scale_each(engine, cat):
    words = ["generate", "a cat", "--model", "qwen-image", "--size", "64x48"]
    for name, scale in (("union", "0.5"), ("canny", "1.5")):
        words += ["--controlnet", name, "--control", str(cat), "--control-scale", scale]
    assert main(words) == 0
    asked = engine.requests[0]
    assert asked.options["control_scale"] == (0.5, 1.5) and engine.controlnet == ("union", "canny")


def test_a_mask_makes_control_repaint(engine, cat, tmp_path):
    Image.new("L", (64, 48), 255).save(tmp_path / "mask.png")
    words = ["generate", "a cat", "--model", "qwen-image", "--controlnet", "inpainting", "--control", str(cat)]
    assert main([*words, "--mask", "mask.png", "--size", "64x48"]) == 0
    assert engine.requests[0].task == "controlnet_inpaint"


def test_a_net_without_a_control_picture_is_refused(engine, capsys):
    assert main(["generate", "a cat", "--model", "qwen-image", "--controlnet", "union"]) == 2
    assert "controlnet needs a picture" in capsys.readouterr().err


def test_where_a_folder_disagrees_with_its_release_is_said(engine, capsys):
    engine.notes = ("nano has zero_cond_t = True, but this folder's config says False; the folder wins.",)
    assert main(["generate", "x"]) == 0
    assert "the folder wins" in capsys.readouterr().err


def script(*words, out=subprocess.PIPE, **environment):
    """`lanting` as people run it, in a process of its own."""
    line = [sys.executable, "-m", "lanting", *words]
    surroundings = {**os.environ, "LANTING_LANG": "en", **environment}
    return subprocess.run(line, stdout=out, stderr=subprocess.PIPE, env=surroundings, timeout=120, check=False)


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "ascii:surrogateescape", "utf-8"])
def test_a_pipe_that_has_not_all_letters_takes_the_rest_escaped(encoding):
    done = script("show", "兰亭é😀", "--json", PYTHONIOENCODING=encoding)
    assert done.returncode == 2
    assert "兰亭é😀" in json.loads(done.stdout.decode(encoding.partition(":")[0]))["error"]
    done = script("plan", PYTHONIOENCODING=encoding)
    assert (done.returncode, done.stderr) == (0, b"")


def test_a_name_that_is_no_unicode_is_told_in_json():
    done = script("show", os.fsdecode(b"a\xff"), "--json", PYTHONIOENCODING="utf-8")
    assert json.loads(done.stdout)["kind"] == "ModelError"


def test_a_failure_that_nobody_reads_is_no_traceback():
    read, write = os.pipe()
    os.close(read)
    try:
        done = script("show", "no-such-model", "--json", out=write)
    finally:
        os.close(write)
    assert done.returncode == 2
    assert done.stderr.decode().startswith("lanting: there is no release")
    assert done.stderr.count(b"\n") == 1
