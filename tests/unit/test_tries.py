"""Words read back: which are asked for, which count as read, and which picture is kept."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from fakes import FakeEngine
from lanting import Engine, RequestError, reading
from lanting.cli import draw as cli_draw
from lanting.cli.main import main
from lanting.core.quotes import quoted
from lanting.core.readings import Reading, shown
from lanting.core.recipe import describe_request, restore_request
from lanting.core.types import Progress, Request, Result
from lanting.engine.tries import until_read, wanted
from lanting.reading import MissingJudgeError
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


def by_seed(texts: dict[int, list[str]]) -> FakeEngine:
    """Draws a picture whose grey is its seed; reads what is written beside that."""

    def read(image: Image.Image) -> list[str]:
        return texts.get(image.convert("RGB").getpixel((0, 0))[0], ["?"])

    return FakeEngine(sees=read)


def request(prompt: str | tuple[str, ...], seed: int = 5, count: int = 1, tries: int | None = 4, **more) -> Request:
    return settle(Request(prompt, seed=seed, count=count, tries=tries, **more), get_spec("nano"))


def test_it_ends_with_the_first_picture_that_is_right():
    engine = by_seed({5: ["HELO"], 6: ["HELLO"], 7: ["HELLO"]})
    result = engine.run(request('"hello"'))
    (reading,) = result.readings
    assert [one.seed for one in engine.requests] == [5, 6] and {one.tries for one in engine.requests} == {None}
    assert reading == Reading(("hello",), ("HELLO",), 2) and not reading.missing
    assert result.recipes[0].request["seed"] == 6 and result.images[0].convert("RGB").getpixel((0, 0))[0] == 6
    assert "tries" not in result.recipes[0].request, "its recipe draws this picture, and reads nothing"
    assert result.seconds["denoise"] == pytest.approx(0.6) and result.seconds["read"] > 0
    engine.requests.clear()
    engine.run(request('"hello"', seed=6))
    assert len(engine.requests) == 1, "one that is right is not drawn again"


def test_the_nearest_stays_where_none_is_right():
    engine = by_seed({5: ["HxLxO"], 6: ["HELO"], 7: ["HELL"], 8: []})
    result = engine.run(request('"HELLO"'))
    (reading,) = result.readings
    assert reading.missing == ("HELLO",) and reading.tries == 4 and reading.lines == ("HELO",)
    assert result.recipes[0].request["seed"] == 6


def test_one_try_reads_and_no_more():
    engine = by_seed({5: ["HELO"], 6: ["HELLO"]})
    (reading,) = engine.run(request('"HELLO"', tries=1)).readings
    assert reading.missing and reading.tries == 1 and len(engine.requests) == 1
    assert engine.run(request('"HELLO"', tries=None)).readings == ()


def test_every_picture_of_a_batch_has_its_own_tries():
    engine = by_seed({5: ["A"], 6: ["x"], 7: ["B"], 8: ["x"], 9: ["A"], 10: ["B"]})
    result = engine.run(request(('"A"', '"B"'), count=2, tries=3))
    assert [reading.asked for reading in result.readings] == [("A",), ("A",), ("B",), ("B",)]
    assert [recipe.request["seed"] for recipe in result.recipes] == [5, 9, 7, 10]
    assert [reading.tries for reading in result.readings] == [1, 2, 1, 2]
    assert [one.count for one in engine.requests] == [2, 1, 1]


def test_who_watches_hears_why_it_is_drawn_again():
    engine = by_seed({5: ["HELO"], 6: ["HELLO"]})
    *events, result = engine.stream(request('"HELLO"'))
    told = [notice for event in events if isinstance(event, Progress) for notice in event.notices]
    assert [(one.values["lines"], one.values["attempt"], one.values["tries"]) for one in told] == [("HELO", 2, 4)]
    assert isinstance(result, Result) and not any(isinstance(event, Result) for event in events)


def test_leaving_stops_the_drawing():
    engine = by_seed({})
    events = engine.stream(request('"HELLO"'))
    next(events)
    events.close()  # type: ignore[attr-defined]
    assert engine.cancelled


def test_the_first_drawing_goes_on_where_it_was_and_no_other():
    asked = []

    def draw(one: Request, first: bool):
        asked.append((one.seed, first))
        yield from by_seed({}).stream(one)

    list(until_read(request('"A"', tries=3), draw, lambda _: ["B"]))
    assert asked == [(5, True), (6, False), (7, False)]


def test_an_edit_is_asked_for_new_words_only():
    assert wanted('change "OPEN" to "CLOSED"', ["OPEN"]) == ("CLOSED",)
    assert wanted('make "OPEN" red', ["OPEN"]) == ("OPEN",), "it must not get lost"
    assert wanted('write "A" and "B"', []) == ("A", "B")
    source = Image.new("RGB", (8, 8), (200, 0, 0))
    engine = by_seed({200: ["OPEN"], 5: ["OPEN"], 6: ["CLOSED"]})
    result = engine.run(request('change "OPEN" to "CLOSED"', images=(source,), size=(224, 96)))
    assert result.readings == (Reading(("CLOSED",), ("CLOSED",), 2),)


def test_what_can_not_be_read_back_is_refused():
    for prompt, most in (("no words", 2), (('"A"', "none"), 2), ('"A"', 0), ('"A"', 65), ('"A"', "2"), ('"A"', True)):
        with pytest.raises(RequestError):
            request(prompt, tries=most)
    with pytest.raises(RequestError):
        settle(Request('"A"', images=(Image.new("RGB", (64, 64)),), tries=2), get_spec("qwen-image-layered"))
    with pytest.raises(RequestError):  # the last seed would be above the largest
        request('"A"', seed=2**63 - 3, tries=4)
    assert request('"A"', tries=64).tries == 64


def test_a_wish_to_read_travels():
    table = json.loads(json.dumps(describe_request(request('"A"', tries=3))))
    assert restore_request(table).tries == 3 and "tries" not in describe_request(request('"A"', tries=None))


def test_without_a_reader_nothing_is_loaded(monkeypatch):
    monkeypatch.setattr(reading, "find_spec", lambda name: None)
    with Engine.open("nano") as engine, pytest.raises(MissingJudgeError, match="pip install"):
        engine.stream(Request('"HELLO"', tries=2))


def test_the_command_tells_what_it_reads(tmp_path, monkeypatch, capsys):
    engine = by_seed({5: ["HELO"], 6: ["HELLO"]})
    monkeypatch.setattr(cli_draw, "open_engine", lambda *_, **__: engine)
    monkeypatch.chdir(tmp_path)
    words = ["generate", 'a sign "hello"', "--seed", "5", "--tries", "3"]
    assert main(words) == 0
    told = capsys.readouterr()
    assert "read back: HELLO   (try 2)" in told.out and "a-sign-hello-6.png" in told.out
    assert "it reads HELO: drawn again, try 2 of 3" in told.err
    assert Path("a-sign-hello-6.png").exists() and not Path("a-sign-hello-5.png").exists()
    assert main([*words[:3], "7", *words[4:], "--json"]) == 0
    (file,) = json.loads(capsys.readouterr().out)["files"]
    assert file["text"] == {"asked": ["hello"], "read": ["?"], "right": False, "tries": 3}
    assert main(["generate", "a sign", "--tries", "3"]) == 2 and "quoted words" in capsys.readouterr().err
    assert main(["generate", 'a sign "A"', "--tries", "0"]) == 2


def test_real_pictures_are_read(tmp_path, capsys):
    """nano and the optical reader: a word that nano writes right, and an edit of it."""
    sign, blue = f"{tmp_path}/a.png", f"{tmp_path}/b.png"
    assert main(["generate", 'a blue sign that says "HELLO"', "--seed", "7", "--tries", "2", "-o", sign]) == 0
    assert "read back: HELLO" in capsys.readouterr().out
    assert main(["edit", sign, 'make the background behind "HELLO" red', "--tries", "2", "-o", blue]) == 0
    assert "read back: HELLO" in capsys.readouterr().out


def test_readings_far_and_near():
    near, far = Reading(("AB", "C"), ("AB", "D"), 1), Reading(("AB", "C"), ("x",), 1)
    assert 0 < near.distance < far.distance and replace(near, lines=("AB", "C")).distance == 0
