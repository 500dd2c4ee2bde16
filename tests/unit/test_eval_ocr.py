"""The readers: what they are given, what is said when one is missing, and that the real ones read and miss."""

from __future__ import annotations

import shutil
import subprocess
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from lanting.core.errors import ModelError
from lanting.evals import ocr
from lanting.evals.draw import by_rule
from lanting.evals.ocr import (
    black_on_white,
    judges,
    read_boxes_with_tesseract,
    read_with_tesseract,
    tesseract_languages,
)
from lanting.evals.pictograms import boxes_of
from lanting.evals.sheet import COLUMN, GAP, GREEN, MOST, RED, Tile, sheet, side_by_side
from lanting.reading.reader import enlarged, read_boxes, text_boxes
from lanting.train.design import WIDE, Design

HELLO = Design(WIDE, ("HELLO",), "blue", "white")
LUCK = Design(WIDE, ("好运",), "red", "yellow")


@pytest.fixture
def no_cache():
    tesseract_languages.cache_clear()
    yield
    tesseract_languages.cache_clear()


@pytest.mark.parametrize("texture", ["plain", "stripes", "paper"])
@pytest.mark.parametrize(("ground", "letters"), [("blue", "white"), ("yellow", "black")])
def test_tesseract_is_given_black_letters_on_white_without_the_texture(ground, letters, texture):
    design = Design(WIDE, ("HELLO",), ground, letters, texture=texture)
    seen = np.asarray(black_on_white(by_rule([design])[0]))
    assert set(np.unique(seen)) == {0, 255} and 0.02 < (seen == 0).mean() < 0.3


def test_small_pictures_are_enlarged_and_large_ones_are_not():
    assert enlarged(Image.new("RGB", (224, 96)))[1] == 3
    assert enlarged(Image.new("RGB", (512, 512)))[1] == 2
    assert enlarged(Image.new("RGB", (1328, 1328)))[1] == 1


def test_without_tesseract_it_is_named_as_missing(no_cache, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    ready, missing = judges(["pp", "tesseract"], "en")
    assert [judge.name for judge in ready] == ["pp"] and missing == ["tesseract"]


def test_tesseract_without_chinese_is_missing_for_chinese(no_cache, monkeypatch):
    listed = subprocess.CompletedProcess([], 0, "List of available languages (2):\neng\nosd\n", "")
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/tesseract")
    monkeypatch.setattr(ocr.subprocess, "run", lambda *given, **named: listed)
    assert judges(["tesseract"], "zh")[1] == ["tesseract"]
    assert judges(["tesseract"], "en")[1] == []


def test_what_tesseract_is_asked(monkeypatch):
    calls = []

    def run(command, *, input, **named):
        calls.append(command)
        assert Image.open(BytesIO(input)).mode == "L"
        return subprocess.CompletedProcess(command, 0, "\n 好 运 \n\n".encode(), b"")

    monkeypatch.setattr(ocr.subprocess, "run", run)
    assert read_with_tesseract(by_rule([LUCK])[0], "zh") == ["好 运"]
    assert calls == [["tesseract", "stdin", "stdout", "--psm", "6", "-l", "chi_sim"]]


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (
            ocr.subprocess.CalledProcessError(1, "tesseract", stderr=b"Error\nCould not initialize tesseract."),
            "initialize",
        ),
        (ocr.subprocess.TimeoutExpired("tesseract", 60), "timed out"),
        (FileNotFoundError(2, "No such file", "tesseract"), "No such file"),
    ],
)
def test_a_tesseract_that_fails_is_said_and_no_miss_of_the_picture(monkeypatch, fault, words):
    def run(command, check, **named):
        assert check
        raise fault

    monkeypatch.setattr(ocr.subprocess, "run", run)
    with pytest.raises(ModelError, match=f"tesseract failed .*{words}.*--ocr pp"):
        read_with_tesseract(by_rule([HELLO])[0], "en")


@pytest.mark.skipif(shutil.which("tesseract") is None, reason="tesseract is not installed")
def test_the_real_tesseract_reads_and_misses():
    assert read_with_tesseract(by_rule([HELLO])[0], "en") == ["HELLO"]
    assert read_with_tesseract(Image.new("RGB", WIDE, "blue"), "en") == []
    assert read_boxes_with_tesseract(by_rule([HELLO])[0], boxes_of(HELLO)[0], "en") == ["HELLO"]
    assert read_boxes_with_tesseract(Image.new("RGB", WIDE, "blue"), boxes_of(HELLO)[0], "en") == [""]


def test_the_recogniser_reads_known_boxes_and_finds_nothing_on_bare_ground():
    image, boxes = by_rule([LUCK])[0], boxes_of(LUCK)[0]
    assert read_boxes(image, boxes) == ["好运"]
    assert read_boxes(Image.new("RGB", WIDE, "red"), boxes) == [""]


def test_the_finder_says_where_text_is():
    (x, y, width, height), (left, top, right, bottom) = text_boxes(by_rule([HELLO])[0])[0], boxes_of(HELLO)[0][0]
    assert abs(x + width / 2 - (left + right / 2)) < 12 and abs(y + height / 2 - (top + bottom / 2)) < 12


# ---------------------------------------------------------------- the sheet
def test_the_sheet_shows_misses_first_in_red():
    tiles = [Tile(Image.new("RGB", (100, 50), "white"), hit, ("asked", "好 read")) for hit in (True, False)]
    page = sheet(tiles, columns=2)
    assert page.getpixel((GAP - 2, GAP + 10)) == RED
    assert page.getpixel((GAP + COLUMN + GAP - 2, GAP + 10)) == GREEN


def test_the_sheet_is_a_page_and_large_pictures_fit_their_column():
    tiles = [Tile(Image.new("RGB", (1328, 1328), "white"), True) for _ in range(MOST + 9)]
    page = sheet(tiles, columns=8)
    assert page.width == 8 * (COLUMN + GAP) + GAP
    assert page.height < (MOST // 8 + 1) * (COLUMN + 60)


def test_what_was_given_stands_beside_what_came_out():
    given, out = Image.new("RGB", (100, 50), "red"), Image.new("RGB", (200, 100), "lime")
    row = side_by_side([given, out])
    assert row.size == (400 + GAP, 100)
    assert (row.getpixel((199, 50)), row.getpixel((399, 50))) == ((255, 0, 0), (0, 255, 0))
