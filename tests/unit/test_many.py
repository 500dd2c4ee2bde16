"""A file of prompts: what a line may say, what is refused before anything is drawn, what is kept when it is stopped."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest

from fakes import FakeEngine
from lanting import RequestError, read_recipe
from lanting.cli import draw as cli_draw
from lanting.cli import many
from lanting.cli.main import main
from lanting.cli.many import read_lines
from lanting.core.types import Request


@pytest.fixture
def engine(monkeypatch, tmp_path):
    fake = FakeEngine()
    monkeypatch.setattr(cli_draw, "open_engine", lambda *_, **__: fake)
    monkeypatch.chdir(tmp_path)
    return fake


def lines(text: str, *more: str) -> list[str]:
    Path("p.txt").write_text(text, encoding="utf-8")
    return ["generate", "--prompts", "p.txt", *more]


def test_a_line_is_a_prompt_or_says_more(engine, capsys):
    green = '{"prompt": "绿色", "size": "1:1", "seed": 9, "steps": 3, "guidance": 1}'
    text = f"\ufeff# of a shop\na red sign\n\n  {green}\nlast"
    assert main(lines(text, "--seed", "5", "--steps", "2", "--count", "2")) == 0
    asked = [(one.prompt, one.seed, one.steps, one.size, one.count) for one in engine.requests]
    wide, square = (224, 96), (192, 192)
    assert asked == [("a red sign", 5, 2, wide, 2), ("绿色", 9, 3, square, 2), ("last", 9, 2, wide, 2)]
    assert engine.requests[1].guidance_scale == 1 and engine.closed == 1
    names = {"a-red-sign-5.png", "a-red-sign-6.png", "绿色-9.png", "绿色-10.png", "last-9.png", "last-10.png"}
    assert {path.name for path in Path().glob("*.png")} == names
    assert read_recipe("last-10.png").request["seed"] == 10
    told = capsys.readouterr()
    assert told.out.count("seed") == 6 and "again" not in told.out and "3/3" in told.err


def test_without_a_seed_every_picture_has_its_own(engine):
    assert main(lines("one\ntwo\nthree")) == 0
    assert len({one.seed for one in engine.requests}) == 3


def test_one_name_is_numbered_and_a_folder_is_filled(engine):
    Path("out").mkdir()
    assert main(lines("one\ntwo", "-o", "x.png", "--quiet")) == 0
    assert main(lines("one\none", "-o", "out", "--seed", "1")) == 0
    assert sorted(path.name for path in Path().rglob("*.png")) == ["one-1.png", "one-2.png", "x-1.png", "x-2.png"]
    drawn = len(engine.requests)
    assert main(lines("one\ntwo", "-o", "x.png")) == 2, "what exists is refused before anything is drawn"
    assert len(engine.requests) == drawn


def test_programs_get_a_line_a_prompt(engine, capsys):
    assert main(lines("one\ntwo", "--json", "--seed", "3")) == 0
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [one["files"][0]["seed"] for one in told] == [3, 4]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "0 prompts"),
        ("# nothing\n\n", "0 prompts"),
        ('ok\n{"prompt": "x", "colour": "red"}', "line 2 of p.txt: it knows no colour"),
        ('{"prompt": "x"', "line 1 of p.txt: it begins as JSON"),
        ('{"prompt": "x", "steps": 0}', "line 1 of p.txt: steps must be"),
        ('{"prompt": "x", "size": [64, 64]}', "line 1 of p.txt: a size is written"),
        ('ok\n{"prompt": "x", "size": "1x1"}', "line 2 of p.txt"),
        ('{"seed": 1}', "line 1 of p.txt: the prompt is empty"),
        ('{"prompt": "x", "seed": "1"}', "line 1 of p.txt: seed must be"),
        ('{"prompt": "x", "count": "1"}', "line 1 of p.txt: count must be"),
        ('{"prompt": null}', "line 1 of p.txt: a prompt must be text"),
        ('{"prompt": ["a", "b"]}', "line 1 of p.txt: a prompt must be text"),
    ],
)
def test_a_line_that_can_not_be_drawn_is_named_before_anything_is(engine, capsys, text, words):
    assert main(lines(text)) == 2 and words in capsys.readouterr().err
    assert not engine.requests and not list(Path().glob("*.png"))


def test_a_file_of_bytes_or_too_many_lines_is_refused(engine, capsys, monkeypatch):
    Path("p.txt").write_bytes(b"\xff\xfe\x00")
    assert main(["generate", "--prompts", "p.txt"]) == 2 and "UTF-8" in capsys.readouterr().err
    assert main(["generate", "--prompts", "absent.txt"]) == 2
    monkeypatch.setattr(many, "MOST", 2)
    assert main(lines("a\nb\nc")) == 2 and "1 to 2" in capsys.readouterr().err


def test_a_prompt_or_a_file_and_not_both(engine, capsys):
    assert main(["generate"]) == 2 and main(lines("a", "b")) == 2
    assert "not both" in capsys.readouterr().err


def test_from_stdin(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("一\ntwo\n".encode())))
    assert [line.request.prompt for line in read_lines("-", Request(), None)] == ["一", "two"]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"{")))
    with pytest.raises(RequestError) as caught:
        read_lines("-", Request(), None)
    assert caught.value.values["path"] == "stdin"


def test_what_was_drawn_stays_when_it_is_stopped(engine, monkeypatch):
    plain = engine._once

    def once(request, previews=False):
        if request.prompt == "two":
            raise KeyboardInterrupt
        return plain(request, previews)

    monkeypatch.setattr(engine, "_once", once)
    assert main(lines("one\ntwo\nthree", "--seed", "1")) == 130
    assert [path.name for path in Path().glob("*.png")] == ["one-1.png"] and engine.closed == 1


def test_words_are_read_back_line_by_line(engine):
    engine.sees = lambda image: ["OPEN" if image.getpixel((0, 0))[0] == 3 else "?"]
    assert main(lines('"OPEN"', "--seed", "2", "--tries", "3")) == 0
    assert [path.name for path in Path().glob("*.png")] == ["open-3.png"]
