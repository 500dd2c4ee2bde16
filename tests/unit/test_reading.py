"""The judge: arithmetic of its scores, and that it reads signs drawn by rule (and notices wrong ones)."""

from __future__ import annotations

import sys

import pytest
from PIL import Image

from lanting.core.readings import edit_distance, hits, normalized_distance
from lanting.evals.scores import wilson
from lanting.reading import MissingJudgeError
from lanting.reading.reader import read_lines, reader, squeeze
from lanting.train.design import SQUARE, WIDE, Design
from lanting.train.draw import render


def sign(*lines, size=WIDE):
    return Image.fromarray(render([Design(size, tuple(lines), "blue", "white")])[0].numpy())


@pytest.mark.parametrize(("lines", "size"), [(("HELLO",), WIDE), (("Fresh", "Bread"), WIDE), (("Open 24 h",), SQUARE)])
def test_signs_drawn_by_rule_are_read(lines, size):
    assert read_lines(sign(*lines, size=size)) == [squeeze(line) for line in lines]


def test_a_wrong_word_and_an_empty_picture_are_noticed():
    assert hits(["HELLO"], read_lines(sign("HELPO"))) == [False]
    assert read_lines(Image.new("RGB", (224, 96), "blue")) == []


def test_case_and_spaces_do_not_count():
    assert hits(["Open 24 h", "BREAD"], ["open24h", "Bread"]) == [True, True]
    assert hits(["a"], []) == [False]


def test_edit_distance():
    assert edit_distance("kitten", "sitting") == 3
    assert edit_distance("", "abc") == edit_distance("abc", "") == 3
    assert normalized_distance(["ab", "cd"], ["ABCD"]) == 0
    assert normalized_distance(["ab"], []) == 1
    assert normalized_distance([], []) == 0


def test_wilson_interval():
    low, high = wilson(93, 100)
    assert low == pytest.approx(0.8625, abs=1e-3) and high == pytest.approx(0.9657, abs=1e-3)
    assert wilson(0, 0) == (0.0, 1.0)


def test_without_the_extra_one_sentence_says_how_to_get_it(monkeypatch):
    reader.cache_clear()
    monkeypatch.setitem(sys.modules, "rapidocr", None)
    with pytest.raises(MissingJudgeError, match="pip install"):
        reader()
    reader.cache_clear()
