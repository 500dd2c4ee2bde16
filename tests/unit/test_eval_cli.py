"""`lanting eval` from the command line, over an engine that draws exactly what the rule says, or something else."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from PIL import Image

import lanting.evals.edit
import lanting.evals.follow
import lanting.evals.kept
import lanting.evals.ocr
import lanting.evals.sets
import lanting.evals.text
from fakes import FakeEngine
from lanting.cli import draw
from lanting.cli.main import main
from lanting.core.recipe import read_recipe
from lanting.core.types import Result
from lanting.evals.draw import by_rule
from lanting.evals.edit import without_pictograms
from lanting.evals.ocr import Judge
from lanting.evals.sets import Case
from lanting.specs import get_spec
from lanting.train.design import Design
from lanting.train.kept import alone

PARTS = ("text_cases", "follow_cases", "open_cases", "edit_cases")


@dataclass
class RuleEngine(FakeEngine):
    """Draws the design that a prompt asks for; `spoils` says which designs come out otherwise, and how."""

    designs: dict[str, Design] = field(default_factory=dict)
    words: dict[bytes, tuple[str, ...]] = field(default_factory=dict)  # what each drawn picture says
    breaks: int = 0  # the result at which a person presses Ctrl-C, counted from 1
    read_breaks: int = 0  # the reading at which the machine dies
    spoils: Callable[[Design], Design] = lambda design: design

    def _result(self, request):
        self.breaks -= 1
        if self.breaks == 0:
            raise KeyboardInterrupt
        made = super()._result(request)
        prompts = (request.prompt,) if isinstance(request.prompt, str) else request.prompt
        images = []
        for prompt in prompts:
            drawn = self.spoils(self.designs[prompt])
            images += by_rule([drawn])
            self.words[images[-1].tobytes()] = drawn.lines
        return Result(tuple(images), made.recipes, made.seconds)

    def read(self, image: Image.Image, language: str) -> list[str]:
        self.read_breaks -= 1
        if self.read_breaks == 0:
            raise MemoryError
        return list(self.words.get(image.tobytes(), ()))


@pytest.fixture
def engine(monkeypatch, tmp_path):
    """A rule engine behind `lanting eval`, one reader that knows its pictures, and an empty current folder."""
    tasks = ("text_to_image", "edit")
    fake = RuleEngine(spec=replace(get_spec("nano"), tasks=tasks))

    def opened(model, device, dtype, controlnet=None, loras=()):
        if model != "nano":
            fake.spec = replace(get_spec(model), tasks=tasks)
        return fake

    def recorded(make):
        def cases(*given, **named) -> list[Case]:
            made = make(*given, **named)
            fake.designs |= {case.prompt: case.design for case in made}
            for case in made:
                image = by_rule([case.design])[0]
                for shown in (image, without_pictograms(image, case.design)):
                    fake.words[shown.tobytes()] = case.lines
            return made

        return cases

    for part in PARTS:
        monkeypatch.setattr(lanting.evals.sets, part, recorded(getattr(lanting.evals.sets, part)))
    monkeypatch.setattr(draw, "open_engine", opened)
    judge = Judge("pp", fake.read, lambda image, boxes, language: fake.read(image, language))
    monkeypatch.setattr(lanting.evals.ocr, "judges", lambda names, language: ([judge], names[1:]))
    monkeypatch.setattr(lanting.evals.kept, "drawn_with", lambda engine: {"--model": engine.weights})
    monkeypatch.setattr(lanting.evals.text, "reconstruct", lambda engine, image: image)
    monkeypatch.setattr(lanting.evals.edit, "reconstruct", lambda engine, image: image)
    monkeypatch.setattr(lanting.evals.follow, "text_boxes", lambda image: [])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LANTING_LANG", "en")
    return fake


def test_a_perfect_writer_scores_everything(engine, capsys, tmp_path):
    assert main(["eval", "text", "-n", "4", "--seed", "5"]) == 0
    out = capsys.readouterr()
    folder = tmp_path / "eval-text-nano-words-en"
    told = json.loads((folder / "results.json").read_text())
    assert [told["scores"][who]["pp"]["exact_lines"]["share"] for who in ("model", "rule", "autoencoder")] == [1, 1, 1]
    assert told["scores"]["model"]["pp"]["exact_lines"]["low"] < 0.6  # four pictures prove little
    assert told["characters_of_ceiling"] == {"pp": 1, "pp, known boxes": 1}
    assert [one["hit"] for one in told["pictures"]] == [True] * 4
    assert (told["seed"], told["set"], told["weights"]) == (5, "words", engine.weights)
    assert sorted(one["seed"] for one in told["pictures"]) == [5, 6, 7, 8]
    assert Image.open(folder / "sheet.png").width > 1000
    assert "exact lines" in out.out and "pp, by rule" in out.out and "100.0 (51.0–100.0)" in out.out
    assert "4 pictures to draw" in out.err and "tesseract is not installed" in out.err
    pictures = [f"0000{number}.png" for number in range(1, 5)]
    left = sorted(path.name for path in tmp_path.rglob("*"))
    assert left == sorted([folder.name, "pictures", *pictures, "results.json", "sheet.png"])
    kept = [(read_recipe(folder / "pictures" / name).request["seed"]) for name in pictures]
    assert kept == [one["seed"] for one in told["pictures"]]
    assert engine.closed == 1


def test_a_wrong_writer_scores_less_and_a_second_run_has_its_own_folder(engine, tmp_path, capsys):
    engine.spoils = lambda design: replace(design, lines=(design.lines[0][:-1] + "#",))
    for _ in range(2):
        assert main(["eval", "text", "-n", "2", "--set", "random", "--json"]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told["files"][0] == "eval-text-nano-random-en-2/results.json"
    scores = told["scores"]["model"]["pp"]
    assert scores["exact_lines"]["share"] == 0 < scores["characters"]["share"] < 1
    assert told["scores"]["rule"]["pp"]["exact_lines"]["share"] == 1
    assert "pictures" not in told


def test_known_boxes_are_read_too(engine, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("LANTING_LANG", "zh")
    assert main(["eval", "text", "--lang", "zh", "-n", "2", "--no-ceiling", "-o", "zh", "--characters", "600"]) == 0
    told = json.loads((tmp_path / "zh" / "results.json").read_text(encoding="utf-8"))
    assert set(told["scores"]["model"]) == {"pp", "pp, known boxes"} and set(told["scores"]) == {"model"}
    assert "整行正确" in capsys.readouterr().out


def test_full_size_models_are_asked_at_their_own_size(engine, capsys, tmp_path):
    assert main(["eval", "text", "--model", "qwen-image-2512", "-n", "2", "-o", "x", "--quiet", "--steps", "7"]) == 0
    assert capsys.readouterr().out.splitlines() == ["x/results.json", "x/sheet.png"]
    assert {request.size for request in engine.requests} == {(1664, 928), (1328, 1328)}
    assert all(len(request.prompt) == 1 and request.steps == 7 for request in engine.requests)
    assert set(json.loads(Path("x/results.json").read_text())["scores"]) == {"model"}


def test_following(engine, capsys, tmp_path):
    engine.spoils = lambda design: replace(design, ground2=None, letters="cyan" if design.letters != "cyan" else "red")
    assert main(["eval", "follow", "-n", "4", "--open", "1", "--seeds", "2", "-o", "f", "--concepts", "50"]) == 0
    told = json.loads((tmp_path / "f" / "results.json").read_text())
    assert told["traits"]["letters"]["share"] == 0 and told["traits"]["pictogram"]["share"] == 1
    assert told["spread"]["mean_flip"] == 0  # the rule knows no seeds
    out = capsys.readouterr().out
    assert "colour of the letters" in out and "differ by 0.000" in out


def test_edits(engine, capsys, tmp_path):
    assert main(["eval", "edit", "-n", "4", "--kinds", "rewrite,ground", "-o", "e"]) == 0
    told = json.loads((tmp_path / "e" / "results.json").read_text())
    assert list(told["kinds"]) == ["rewrite", "ground", "all"]
    assert told["kinds"]["all"]["done"]["share"] == 1 and told["kinds"]["all"]["kept_median"] == 60
    assert [len(request.images) for request in engine.requests] == [1] * 4
    assert "rest kept" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["text", "--ocr", "eye"], "eye is none we know; use pp, tesseract"),
        (["text", "--steps", "0"], "steps must be"),
        (["text", "--size", "3x3"], "each side must be 16"),
        (["text", "--size", "16x16"], "no such design fits 16x16"),
        (["text", "--set", "phrases", "--size", "64x64"], "belongs to this set: choose another --size"),
        (["edit", "--kinds", "add", "--size", "64x64"], "no such design fits 64x64"),
        (["text", "--ocr", ","], "',' is none we know; use pp, tesseract"),
        (["text", "--seed", "-1"], "--seed must be a whole number from 0"),
        (["edit", "-n", "2", "--seed", str(2**63 - 1)], "--seed must be a whole number from 0"),
        (["edit", "--kinds", "improve"], "improve is none we know"),
        (["follow", "--concepts", "5000"], "--concepts must be a whole number from 1 to 1"),
        (["edit", "--concepts", "5000"], "--concepts must be a whole number from 1 to 1"),
        (["text", "-o", "no/such/folder"], "does not exist"),
    ],
)
def test_wrong_requests_are_refused_before_any_picture(engine, capsys, tmp_path, words, sentence):
    assert main(["eval", *words]) == 2
    assert sentence in capsys.readouterr().err
    assert engine.requests == [] and engine.closed == 1 and list(tmp_path.iterdir()) == []


def test_a_reader_that_is_not_there_is_named(engine, capsys, monkeypatch):
    """PP-OCR was said to be missing, too, where only tesseract was asked for."""
    monkeypatch.setattr("lanting.evals.ocr.judges", lambda names, language: ([], list(names)))
    assert main(["eval", "text", "-n", "1", "--ocr", "tesseract"]) == 2
    assert "tesseract is not installed" in capsys.readouterr().err


def test_a_model_that_does_not_edit_says_so(engine, capsys):
    engine.spec = replace(engine.spec, tasks=("text_to_image",))
    assert main(["eval", "edit"]) == 2
    assert "nano can't do edit; it does text_to_image" in capsys.readouterr().err


def test_results_are_not_overwritten_unasked(engine, capsys, tmp_path):
    assert main(["eval", "text", "-n", "1", "-o", "x"]) == 0
    assert main(["eval", "text", "-n", "1", "-o", "x"]) == 2
    assert "add --force" in capsys.readouterr().err
    assert main(["eval", "text", "-n", "1", "-o", "x", "--force"]) == 0


def test_ctrl_c_leaves_nothing(engine, tmp_path):
    engine.fails = KeyboardInterrupt()
    assert main(["eval", "text", "-n", "1"]) == 130
    assert list(tmp_path.iterdir()) == [] and engine.closed == 1


FOLLOW = ["follow", "-n", "4", "--open", "1", "--seeds", "2"]


@pytest.mark.parametrize(
    ("words", "breaks", "there", "drawn"),
    [
        (["text", "-n", "4"], 2, 2, [2, 2, 2, 2]),
        (FOLLOW, 2, 4, [4, 2, 4, 2]),
        (["edit", "-n", "4", "--kinds", "rewrite,ground"], 3, 2, [1, 1, 1, 1, 1, 1]),
    ],
)
def test_a_cancelled_run_goes_on_to_the_same_results(engine, capsys, tmp_path, words, breaks, there, drawn):
    """It lost all pictures that were drawn. `drawn`: how many in each batch, the broken one included."""
    assert main(["eval", *words, "-o", "whole"]) == 0
    engine.requests, engine.breaks = [], breaks
    assert main(["eval", *words]) == 130
    (folder,) = (path for path in tmp_path.iterdir() if path.name != "whole")
    assert len(list(folder.glob("pictures/*.png"))) == there and not (folder / "results.json").exists()
    if words[0] == "text":
        engine.read_breaks = 3  # each picture is read twice: what the finder finds, and in known boxes
        assert main(["eval", *words]) == 1
        assert len((folder / "found.jsonl").read_text().splitlines()) == 1
    torn = folder / "pictures" / "00001.png"
    torn.write_bytes(torn.read_bytes()[:100])
    assert main(["eval", *words]) == 0
    assert f"going on in {folder.name}" in capsys.readouterr().err
    assert [len(one.prompt) for one in engine.requests] == drawn
    for name in ("results.json", "sheet.png"):
        assert (folder / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert sorted(path.name for path in folder.iterdir()) == ["pictures", "results.json", "sheet.png"]


def test_a_cancelled_run_goes_on_with_its_own_settings_alone(engine, capsys, tmp_path):
    engine.breaks = 2
    assert main(["eval", "text", "-n", "4", "-o", "x"]) == 130
    for flag, more in (("--seed", ["--seed", "1"]), ("--no-ceiling", ["--no-ceiling"]), ("--number", ["-n", "5"])):
        assert main(["eval", "text", "-n", "4", "-o", "x", *more]) == 2
        assert f"x was begun with another {flag}: remove it" in capsys.readouterr().err
    engine.weights = "another"
    assert main(["eval", "text", "-n", "4", "-o", "x"]) == 2
    assert "another --model" in capsys.readouterr().err
    with alone(tmp_path / "x"):
        assert main(["eval", "text", "-n", "1", "-o", "x", "--force"]) == 2
    assert "x is being written by another run" in capsys.readouterr().err
    assert len(list(tmp_path.glob("x/pictures/*.png"))) == 2
    assert main(["eval", "text", "-n", "1", "-o", "x", "--force"]) == 0  # begins anew
    assert [path.name for path in tmp_path.glob("x/pictures/*.png")] == ["00001.png"]


def test_without_a_reader_one_sentence_says_what_to_install(engine, monkeypatch, capsys):
    monkeypatch.setattr(lanting.evals.ocr, "judges", lambda names, language: ([], names))
    assert main(["eval", "text"]) == 2
    assert 'pip install "lanting[eval]"' in capsys.readouterr().err
