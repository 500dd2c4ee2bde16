"""The arithmetic of reading scores, on texts whose score is known."""

from __future__ import annotations

import random

import pytest

from lanting.core.readings import edit_distance, normal
from lanting.evals.scores import add_up, compare, pair_up, share_of, words_right


def test_case_spaces_and_wide_marks_do_not_count():
    assert normal("Fresh  BREAD！") == normal("freshbread!")
    assert normal("营业：９点") == "营业:9点"
    assert normal("ß") == "ss"


def test_edit_distance_is_levenshtein():
    assert edit_distance("kitten", "sitting") == 3
    assert edit_distance("", "abc") == edit_distance("abc", "") == 3
    assert edit_distance("兰亭序", "兰亭叙") == 1


def test_lines_are_paired_with_the_fewest_edits_each_used_once():
    assert pair_up(["bread", "break"], ["break", "breed"]) == ["breed", "break"]
    assert pair_up(["ab", "ab"], ["ab"]) in (["ab", ""], ["", "ab"])
    assert pair_up(["ab"], ["xy"]) == [""]
    assert pair_up([], ["x"]) == [] and pair_up(["x"], []) == [""]


@pytest.mark.parametrize(
    ("asked", "read", "right"),
    [
        ("Fresh Bread", "FreshBread", 2),
        ("Fresh Bread", "Frsh Bread", 1),
        ("Fresh Bread", "Fresh Breads", 1),
        ("Fresh Bread", "F resh B read", 2),
        ("Fresh Bread", "Frexsh Bread", 1),
        ("Fresh Bread", "", 0),
    ],
)
def test_words_count_when_all_their_letters_stand_side_by_side_and_no_more(asked, read, right):
    assert words_right(asked, read) == (right, 2)


def test_a_perfect_picture_and_an_empty_one():
    good, bad = compare(["Open 24 h", "营业"], ["营业", "OPEN 24H"]), compare(["Open 24 h", "营业"], [])
    assert (good.lines_right, good.lines, good.words_right, good.words) == (2, 2, 4, 4)
    assert (good.characters_right, good.characters) == (9, 9)
    assert (bad.lines_right, bad.words_right, bad.characters_right, bad.ned) == (0, 0, 0, 0)


def test_what_was_not_asked_for_lowers_ned_and_the_picture_is_not_clean():
    clean, cluttered = compare(["HELLO"], ["HELLO"]), compare(["HELLO"], ["HELLO", "sale"])
    assert clean.ned == 1 and cluttered.ned == pytest.approx(5 / 9)
    assert (cluttered.lines_right, cluttered.characters_right) == (1, 5)
    assert clean.clean and not cluttered.clean and not compare(["HELLO"], ["HELLP"]).clean


def test_a_line_may_be_asked_twice_and_must_be_there_twice():
    assert compare(["ha", "ha"], ["ha"]).lines_right == 1
    assert compare(["ha", "ha"], ["ha", "HA"]).lines_right == 2


def test_a_line_broken_in_two_is_still_read():
    assert compare(["Fresh Bread", "Open"], ["Fresh", "Bread", "Open"]).lines_right == 2
    assert compare(["Fresh Bread"], ["Fresh", "Brea"]).lines_right == 0


def test_wilson_where_pictures_are_trials():
    share = share_of([1] * 93 + [0] * 7)
    assert (share.value, share.right, share.total) == (0.93, 93, 100)
    assert share.low == pytest.approx(0.8625, abs=1e-3) and share.high == pytest.approx(0.9657, abs=1e-3)


def test_nothing_wrong_is_not_certainty():
    share = share_of([2] * 20, [2] * 20)
    assert share.value == share.high == 1 and share.low == pytest.approx(0.839, abs=2e-3)  # 20 pictures, not 40 lines
    assert (share_of([]).low, share_of([]).high, share_of([]).value) == (0, 1, 0)


@pytest.mark.parametrize(("rights", "totals"), [([5 / 12], None), ([1], [2]), ([1] * 3, [2] * 3), ([0.1] * 7, None)])
def test_pictures_that_are_all_alike_are_no_certainty(rights: list[float], totals: list[int] | None):
    """Resampling one picture, or equal ones, gives the same share every time: an interval without width."""
    share = share_of(rights, totals)
    assert 0 <= share.low < share.value - 0.05 and share.value + 0.05 < share.high <= 1


def test_lines_that_fail_together_widen_the_interval():
    together = share_of([2, 0] * 50, [2] * 100)
    apart = share_of([1] * 96 + [0, 2] * 2, [2] * 100)
    assert together.value == apart.value == 0.5
    assert together.high - together.low > 0.15 > apart.high - apart.low


def test_intervals_hold_the_truth_about_as_often_as_they_say():
    rng, held = random.Random(0), 0
    for _ in range(200):
        rights = [sum(rng.random() < 0.9 for _ in range(3)) for _ in range(80)]
        share = share_of(rights, [3] * 80)
        held += share.low <= 0.9 <= share.high
    assert 0.90 <= held / 200 <= 0.99


def test_pictures_add_up():
    score = add_up([compare(["HELLO"], ["HELLO"]), compare(["WORLD", "PEACE"], ["WORLO"])])
    assert (score.lines.right, score.lines.total) == (1, 3)
    assert (score.characters.right, score.characters.total) == (9, 15)
    assert score.as_json()["exact_lines"]["share"] == pytest.approx(1 / 3, abs=1e-4)
