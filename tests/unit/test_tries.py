"""Words read back: which are asked for, which count as read, and which picture is kept."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from fakes import FakeEngine
from lanting import RequestError
from lanting.cli import draw as cli_draw
from lanting.cli.main import main
from lanting.core.quotes import quoted
from lanting.core.types import Request
from lanting.evals import tries
from lanting.evals.tries import Reading, check_tries, draw_until_read, shown
from lanting.specs import get_spec, settle


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        ('a sign "HELLO" and “two words”', ("HELLO", "two words")),
        ("绿色招牌“茶馆”，「白色」的『字』‘一’", ("茶馆", "白色", "字", "一")),
        ("the baker's 'Fresh Bread' isn't here", ("Fresh Bread",)),
        ('"  " and "" and " x "', ("x",)),
        ('"open', ()),
        ("the bakers' signs", ()),
    ],
)
def test_what_is_quoted(prompt, texts):
    assert quoted(prompt) == texts


def test_a_text_may_break_over_lines_and_nothing_else():
    lines = ["Grand", "Opening", "Today!"]
    assert shown("Grand Opening", lines) and shown("grandopening", lines) and shown("Today!", lines)
    assert not shown("Opening Grand", lines) and not shown("rand", lines) and not shown("Today", lines)
    assert not shown("x", [])


def test_the_width_of_marks_is_not_asked_for():
    assert shown("价格（元）", ["价格(元)"]) and shown("ＡＢＣ１", ["abc1"]) and not shown("价格（元）", ["价格元"])
    whole, near = (Reading(("茶（热）", "x"), (line,), 1) for line in ("茶(热)", "茶热"))
    assert whole.missing == ("x",) and whole.distance < near.distance


def by_seed(texts: dict[int, list[str]]):
    """Draws a picture whose grey is its seed; reads what is written beside that."""
    engine = FakeEngine()

    def read(image: Image.Image) -> list[str]:
        return texts.get(image.convert("RGB").getpixel((0, 0))[0], ["?"])

    return engine, read


def request(prompt: str | tuple[str, ...], seed: int = 5, count: int = 1) -> Request:
    return settle(Request(prompt, seed=seed, count=count), get_spec("nano"))


def test_it_ends_with_the_first_picture_that_is_right():
    engine, read = by_seed({5: ["HELO"], 6: ["HELLO"], 7: ["HELLO"]})
    result, (reading,) = draw_until_read(request('"hello"'), 4, engine.run, read)
    assert [one.seed for one in engine.requests] == [5, 6]
    assert reading == Reading(("hello",), ("HELLO",), 2) and not reading.missing
    assert result.recipes[0].request["seed"] == 6 and result.images[0].convert("RGB").getpixel((0, 0))[0] == 6
    assert result.seconds["denoise"] == pytest.approx(0.6)
    engine.requests.clear()
    draw_until_read(request('"hello"', seed=6), 4, engine.run, read)
    assert len(engine.requests) == 1, "one that is right is not drawn again"


def test_the_nearest_stays_where_none_is_right():
    engine, read = by_seed({5: ["HxLxO"], 6: ["HELO"], 7: ["HELL"], 8: []})
    result, (reading,) = draw_until_read(request('"HELLO"'), 4, engine.run, read)
    assert reading.missing == ("HELLO",) and reading.tries == 4 and reading.lines == ("HELO",)
    assert result.recipes[0].request["seed"] == 6


def test_every_picture_of_a_batch_has_its_own_tries():
    engine, read = by_seed({5: ["A"], 6: ["x"], 7: ["B"], 8: ["x"], 9: ["A"], 10: ["B"]})
    result, readings = draw_until_read(request(('"A"', '"B"'), count=2), 3, engine.run, read)
    assert [reading.asked for reading in readings] == [("A",), ("A",), ("B",), ("B",)]
    assert [recipe.request["seed"] for recipe in result.recipes] == [5, 9, 7, 10]
    assert [reading.tries for reading in readings] == [1, 2, 1, 2]
    assert [one.count for one in engine.requests] == [2, 1, 1]


def test_what_can_not_be_read_back_is_refused(monkeypatch):
    monkeypatch.setattr(tries, "reader", lambda: None)
    check_tries(request('"A"'), 64)
    for prompt, most in (("no words", 2), (('"A"', "none"), 2), ('"A"', 0), ('"A"', 65)):
        with pytest.raises(RequestError):
            check_tries(request(prompt), most)


def test_the_command_tells_what_it_reads(tmp_path, monkeypatch, capsys):
    engine, read = by_seed({5: ["HELO"], 6: ["HELLO"]})
    monkeypatch.setattr(cli_draw, "open_engine", lambda *_, **__: engine)
    monkeypatch.setattr(tries, "reader", lambda: None)
    monkeypatch.setattr(tries.draw_until_read, "__defaults__", (read,))
    monkeypatch.chdir(tmp_path)
    words = ["generate", 'a sign "hello"', "--seed", "5", "--tries", "3"]
    assert main(words) == 0
    told = capsys.readouterr().out
    assert "read back: HELLO   (try 2)" in told and "a-sign-hello-6.png" in told
    assert Path("a-sign-hello-6.png").exists() and not Path("a-sign-hello-5.png").exists()
    assert main([*words[:3], "7", *words[4:], "--json"]) == 0
    (file,) = json.loads(capsys.readouterr().out)["files"]
    assert file["text"] == {"asked": ["hello"], "read": ["?"], "right": False, "tries": 3}
    assert main(["generate", "a sign", "--tries", "3"]) == 2 and "quoted words" in capsys.readouterr().err
    assert main(["generate", "a sign", "--tries", "0"]) == 2


def test_real_pictures_are_read(tmp_path, capsys):
    """nano and the optical reader, once: a word that nano writes right."""
    assert (
        main(["generate", 'a blue sign that says "HELLO"', "--seed", "7", "--tries", "2", "-o", f"{tmp_path}/a.png"])
        == 0
    )
    assert "read back: HELLO" in capsys.readouterr().out


def test_readings_far_and_near():
    near, far = Reading(("AB", "C"), ("AB", "D"), 1), Reading(("AB", "C"), ("x",), 1)
    assert 0 < near.distance < far.distance and replace(near, lines=("AB", "C")).distance == 0
