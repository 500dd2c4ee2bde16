"""`lanting pull OWNER/NAME/FILE`: one file of a repository that holds many, and what the other commands call it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import pulling
from fakehub import FakeHub, serve
from lanting.cli.main import main
from lanting.core.errors import ModelError
from lanting.weights import home, pull
from lanting.weights.controls import open_controlnet
from lanting.weights.find import locate
from lanting.weights.lora_file import find_lora
from pulling import BIG, bring

own_home = pulling.own_home  # fixtures count in the module that names them
REPO = "city96/Qwen-Image-gguf"
SMALL, LARGE = "qwen-image-Q2_K.gguf", "kinds/qwen-image-Q4_K_M.gguf"
FILES = {"README.md": b"text", SMALL: BIG[:1000], LARGE: BIG}


@pytest.fixture
def many():
    with serve(FakeHub(REPO, dict(FILES))) as running:
        yield running


@pytest.fixture
def run(capsys):
    """A command line: (exit code, stdout, stderr)."""

    def asked(*words: str) -> tuple[int, str, str]:
        code = main(list(words))
        return code, *capsys.readouterr()

    return asked


def test_only_that_file_comes(many):
    name = f"{REPO}/{LARGE}"
    plan = pull.plan_pull(name, endpoint=many.endpoint)
    assert (plan.total, plan.left) == (len(BIG), len(BIG))
    bring(many, name)
    assert plan.path == home.path_of(name) and plan.path.read_bytes() == BIG
    assert many.fetched(SMALL) == many.fetched("README.md") == []
    assert pull.plan_pull(name, endpoint=many.endpoint).done
    assert pull.have_offline(name) == plan.path


def test_files_gather_and_go_one_by_one(many, run):
    for file in (LARGE, SMALL):
        bring(many, f"{REPO}/{file}")
    told = json.loads(run("list", "--json")[1])
    assert {row["name"]: row["bytes"] for row in told if row["name"].startswith(REPO)} == {
        f"{REPO}/{SMALL}": 1000,
        f"{REPO}/{LARGE}": len(BIG),
    }
    assert run("remove", f"{REPO}/{SMALL}", "--yes")[0] == 0
    assert not home.path_of(f"{REPO}/{SMALL}").exists() and home.path_of(f"{REPO}/{LARGE}").exists()
    assert run("remove", f"{REPO}/{LARGE}", "--yes")[0] == 0
    assert not home.files_folder(REPO).exists()


def test_a_file_that_is_not_there_names_the_nearest(many):
    with pytest.raises(ModelError, match=f"holds no qwen-image-Q4.gguf; the nearest is .*{SMALL}|{LARGE}"):
        pull.plan_pull(f"{REPO}/qwen-image-Q4.gguf", endpoint=many.endpoint)
    with pytest.raises(ModelError, match=f"run 'lanting pull {REPO}/{SMALL}'"):
        locate(f"{REPO}/{SMALL}")
    with pytest.raises(ModelError, match="is not on this machine"):
        pull.have_offline(f"{REPO}/{SMALL}")


def test_parts_that_come_from_elsewhere_are_left_out():
    """Who has a GGUF of the transformer needs the rest; what was left out comes when asked for."""
    shards = [f"{part}/model-{i}.safetensors" for part in ("transformer", "text_encoder", "vae") for i in range(2)]
    files = dict.fromkeys(shards, BIG[:500]) | {"model_index.json": b"{}", "transformer/config.json": b"{}"}
    with serve(FakeHub("Qwen/Qwen-Image", files)) as fake:
        bring(fake, "qwen-image", without=["transformer"])
        folder = home.model_folder("qwen-image")
        here = {str(path.relative_to(folder)) for path in folder.rglob("*.*") if path.is_file()}
        assert here == {*shards[2:], "model_index.json", "transformer/config.json", home.MARKER}
        assert pull.plan_pull("qwen-image", endpoint=fake.endpoint, without=["transformer"]).done
        assert pull.plan_pull("qwen-image", endpoint=fake.endpoint).left > 0
        bring(fake, "qwen-image")
        assert all((folder / name).is_file() for name in files)
        bring(fake, "qwen-image", without=["transformer", "vae"])
        assert all((folder / name).is_file() for name in files), "nothing is taken away"
        with pytest.raises(ModelError, match="no weights in a folder unet; parts are text_encoder, transformer, vae"):
            pull.plan_pull("qwen-image", endpoint=fake.endpoint, without=["unet"])


def test_of_many_one_is_offered(many, run):
    code, _, said = run("pull", REPO, "--dry-run", "--endpoint", many.endpoint)
    assert code == 0
    assert f"one of them alone: lanting pull {REPO}/{SMALL}" in said
    assert LARGE in said
    told = json.loads(run("pull", REPO, "--dry-run", "--json", "--endpoint", many.endpoint)[1])
    assert told["files"] == {name: len(data) for name, data in FILES.items()}


@pytest.mark.parametrize("alone", [True, False])
def test_other_commands_know_it_by_its_name(tmp_path, run, alone):
    """Pulled alone, or with its repository; a path that is there comes first."""
    made = tmp_path / "lora.safetensors"
    save_file({"transformer_blocks.0.attn.to_q.lora_A.weight": torch.zeros(4, 8)}, made)
    with serve(FakeHub("some/loras", {"a/ink.safetensors": made.read_bytes()})) as fake:
        bring(fake, "some/loras/a/ink.safetensors" if alone else "some/loras")
    name = "some/loras/a/ink.safetensors"
    assert find_lora(tmp_path, name).read_bytes() == made.read_bytes()
    assert "lora" in run("show", name)[1]
    out = str(tmp_path / "x.gguf")
    for words in (["plan", name], ["quantize", name, "--to", "q8_0", "-o", out], ["generate", "x", "--model", name]):
        code, _, said = run(*words)
        assert code == 2 and "transformer" in said, said
    with pytest.raises(ModelError, match="holds no ControlNet"):
        open_controlnet(name)
    with pytest.raises(ModelError, match="holds no transformer but"):
        locate(name)


@pytest.mark.parametrize(
    "words",
    ["a/b", "a/b/c.bin", "a/../c/d.gguf", "a/b/../c.gguf", "/a/b/c.gguf", "a--b/c/d.gguf", "C:/a/b.gguf", "a/b/"],
)
def test_what_is_no_name_of_a_file(words):
    assert home.file_in(words) is None
    assert home.path_of(words) == Path(words)
