"""`lanting plan`, and the plan behind the drawing verbs: what is printed, refused and handed to the engine."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from PIL import Image

from fakes import FakeEngine
from lanting.cli.main import main
from lanting.plan import Plan
from lanting.specs import get_spec


def test_a_release_that_is_not_here_is_planned_by_arithmetic(capsys):
    assert main(["plan", "qwen-image-2512", "--device", "rtx 3060", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["chosen"]["peak_vram"] <= 12.3e9 and told["chosen"]["blocks"] == 60
    assert {"bf16", "int8", "int4"} <= {each["transformer"] for each in told["plans"]}


def test_the_table_marks_the_choice_and_says_why(capsys):
    assert main(["plan", "qwen-image", "--device", "RTX 4090", "--size", "1:1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "1328×1328" in lines[0] and "GeForce RTX 4090" in lines[0]
    assert sum("▸" in line for line in lines) == 1
    assert any("chosen: " in line for line in lines)


def test_more_references_need_more(capsys):
    peaks = []
    for count in ("1", "3"):
        arguments = ["plan", "qwen-image-edit-2511", "--references", count, "--device", "H200", "--json"]
        assert main(arguments) == 0
        peaks.append(json.loads(capsys.readouterr().out)["chosen"]["peak_vram"])
    assert peaks[0] < peaks[1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["plan", "qwen-image", "--vram", "1G"], "--vram"),
        (["plan", "qwen-image", "--vram", "12x"], "12G or 800M"),
        (["plan", "nano", "--ram", "100M"], "--ram"),
        (["plan", "no-such-model"], "no release called"),
        (["plan", "qwen-image", "--size", "33x33"], "multiples of 16"),
        (["plan", "qwen-image", "--device", "abacus"], "abacus"),
        (["plan", "qwen-image", "--task", "layered"], "can't do"),
        (["plan", "qwen-image", "--references", "99"], "0 to 10"),
        (["plan", "qwen-image", "--device", "h100", "--quant", "int5"], "int5"),
    ],
)
def test_what_does_not_work_is_one_sentence(arguments, words, capsys):
    assert main(arguments) == 2
    told = capsys.readouterr()
    assert words in told.err and len(told.err.splitlines()) == 1 and not told.out


def test_it_answers_at_once_and_without_torch():
    code = (
        "import sys, time\n"
        "from lanting.cli.main import main\n"
        "assert main(['plan', 'qwen-image-2512', '--device', 'rtx 3060', '--json']) == 0\n"
        "assert main(['plan', 'nano', '--quiet']) == 0\n"
        "print('torch' in sys.modules, time.process_time(), file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy, seconds = done.stderr.split()
    assert heavy == "False"
    assert float(seconds) < 1.5  # two plans and Python's own start; a quiet machine needs 0.3


def opened(monkeypatch) -> list[dict]:
    """A fake engine in place of the real one; what it was opened with."""
    seen: list[dict] = []

    def open_engine(model, device, dtype, controlnet=None, loras=(), **options):
        seen.append(options)
        return FakeEngine(get_spec("nano"))

    monkeypatch.setattr("lanting.cli.draw.open_engine", open_engine)
    return seen


def test_nano_is_drawn_without_a_word_about_plans(monkeypatch, tmp_path, capsys):
    seen = opened(monkeypatch)
    assert main(["generate", "a sign", "-o", str(tmp_path / "a.png")]) == 0
    assert seen == [{}] and "plan:" not in capsys.readouterr().err


def test_a_budget_is_planned_told_and_handed_over(monkeypatch, tmp_path, capsys):
    seen = opened(monkeypatch)
    assert main(["generate", "a sign", "--ram", "2G", "-o", str(tmp_path / "a.png")]) == 0
    told = capsys.readouterr()
    assert isinstance(seen[0]["plan"], Plan) and seen[0]["plan"].peak_ram <= 2 * 10**9
    assert "plan: " in told.err and "plan:" not in told.out


def test_a_budget_that_is_too_small_stops_before_the_engine(monkeypatch, tmp_path, capsys):
    seen = opened(monkeypatch)
    assert main(["generate", "a sign", "--ram", "100M", "-o", str(tmp_path / "a.png")]) == 2
    assert not seen and "--ram" in capsys.readouterr().err and not (tmp_path / "a.png").exists()


def test_a_budget_is_kept_when_nano_really_draws(tmp_path, capsys):
    """Decoding in tiles, where a whole picture would not fit."""
    arguments = ["generate", "a sign", "--size", "768x768", "--steps", "1", "-o", str(tmp_path / "a.png")]
    assert main([*arguments, "--ram", "400M"]) == 0
    assert "VAE in tiles" in capsys.readouterr().err and (tmp_path / "a.png").exists()


def test_every_drawing_verb_takes_a_budget(monkeypatch, tmp_path, capsys):
    drawn = tmp_path / "a.png"
    assert main(["generate", "a sign", "--steps", "1", "-o", str(drawn)]) == 0
    capsys.readouterr()
    for arguments in (["replay", str(drawn)], ["generate", "a sign"], ["edit", str(drawn), "make it red"]):
        assert main([*arguments, "--model", "nano", "--ram", "100M", "-o", str(tmp_path / "b.png")]) == 2, arguments
        told = capsys.readouterr()
        assert "--ram" in told.err and len(told.err.splitlines()) == 1, arguments
    assert main(["replay", str(drawn), "--ram", "2G", "-o", str(tmp_path / "b.png")]) == 0
    assert "plan: " in capsys.readouterr().err


def test_layers_takes_a_budget(tmp_path, capsys):
    """Its release is not here, and the budget is looked at first."""
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    assert main(["layers", str(tmp_path / "a.png"), "--ram", "much"]) == 2
    assert "much" in capsys.readouterr().err
