"""`lanting train lightning` from the shell: a LoRA that loads, and sentences for wrong prompts."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import tiny

from lanting.cli.main import main
from lanting.weights.headers import read_header, read_metadata


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny.save_folder(tmp_path_factory.mktemp("lightning-cli") / "tiny", layers=1)


def test_a_file_of_prompts_makes_a_lora(folder, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red sign\n\nblue\n", encoding="utf-8")
    out = tmp_path / "fast.safetensors"
    words = ["--model", folder, "--prompts", tmp_path / "prompts.txt", "--size", "48x48", "--minutes", 0.01,
             "--rank", 2, "--steps", 2, "--device", "cpu", "-o", out]  # fmt: skip
    command = [sys.executable, "-m", "lanting", "train", "lightning", *map(str, words)]
    made = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert made.returncode == 0, made.stderr
    assert made.stdout.strip() == str(out) and '"loss"' in made.stderr
    assert read_metadata(out)["lanting.steps"] == "2"
    assert any(name.endswith("lora_down.weight") for name in read_header(out))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--prompts", "nowhere.txt", "--size", "48x48"), "holds no prompts"),
        (("--prompts", __file__), "--size"),
        (("--model", "no-such-model"), "no-such-model"),
        (("--device", "abacus"), "abacus"),
        (("--seed", "-1"), "--seed must be a whole number from 0"),
        (("--minutes", "nan"), "--minutes must be a number from 0"),  # which ended at once, with a LoRA of nothing
        (("--guidance", "-1"), "--guidance must be a number from 0"),
        (("--out", "fast.pt"), "end it with .safetensors"),
    ],
)
def test_wrong_values_are_a_sentence(words, said, folder, capsys):
    model = () if "--model" in words else ("--model", folder)
    assert main(["train", "lightning", "--minutes", "0", *map(str, model), *words]) == 2
    told = capsys.readouterr().err
    assert said in told and "Traceback" not in told
