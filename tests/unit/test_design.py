"""The layout rule: whatever is asked, things stand on the grid, inside the canvas and beside each other."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lanting.core.errors import RequestError
from lanting.train.atlas import LATIN
from lanting.train.design import (
    ALIGNS,
    COLORS,
    FACES,
    LARGE,
    MAX_LINES,
    MIN_LUMINANCE_GAP,
    PICTOGRAM,
    PLACES,
    PROPORTIONAL,
    RING,
    SIDES,
    SQUARE,
    STRIP,
    UNIT,
    WIDE,
    Design,
    Placement,
    advance,
    break_lines,
    letters_for,
    luminance,
    place,
    readable_pairs,
)

TEXT = st.text(st.sampled_from(LATIN + " 的一是了我，。！"), min_size=1, max_size=12)
DESIGNS = st.builds(
    Design,
    size=st.sampled_from([STRIP, WIDE, SQUARE, LARGE, (128, 128), (256, 128)]),
    lines=st.lists(TEXT, max_size=MAX_LINES).map(tuple),
    ground=st.just("blue"),
    letters=st.just("white"),
    face=st.sampled_from(FACES),
    align=st.sampled_from(ALIGNS),
    place=st.sampled_from(PLACES),
    concept=st.sampled_from([None, 0, 7]),
    count=st.integers(1, 3),
    side=st.sampled_from(SIDES),
)


def placed(design: Design) -> Placement:
    try:
        return place(design)
    except RequestError as error:
        assert "\n" not in str(error)
        assume(False)
        raise


def boxes_of(placement: Placement) -> list[tuple[int, int, int, int]]:
    return [*placement.boxes, *((x, y, PICTOGRAM, PICTOGRAM) for x, y in placement.pictograms)]


@given(DESIGNS)
@settings(max_examples=400, deadline=None)
def test_everything_is_inside_on_tokens_and_apart(design: Design) -> None:
    placement = placed(design)
    wide, high = design.size[0] // UNIT, design.size[1] // UNIT
    taken = np.zeros((high, wide), dtype=int)
    for x, y, width, height in boxes_of(placement):
        assert x >= 0 and y >= 0 and x + width <= wide and y + height <= high
        assert x % 2 == 0 and y % 2 == 0
        taken[y : y + height, x : x + width] += 1
    assert taken.max(initial=0) <= 1
    outer = taken.copy()
    outer[RING:-RING, RING:-RING] = 0
    assert placement.ring == (not outer.any())


@given(DESIGNS)
@settings(max_examples=200, deadline=None)
def test_glyphs_fill_their_lines_from_left_to_right(design: Design) -> None:
    placement = placed(design)
    scale = 2 if placement.large else 1
    assert len(placement.boxes) == len(design.lines)
    for number, (line, box) in enumerate(zip(design.lines, placement.boxes, strict=True)):
        glyphs = [g for g in placement.glyphs if g.line == number]
        assert "".join(g.character for g in glyphs) == line and [g.index for g in glyphs] == list(range(len(line)))
        assert glyphs[0].x == box[0] and glyphs[-1].x + glyphs[-1].width == box[0] + box[2]
        assert all(a.x + a.width == b.x for a, b in pairwise(glyphs))
        assert all(
            (g.y, g.height, g.width) == (box[1], box[3], advance(design.face, g.character) * scale) for g in glyphs
        )


@given(DESIGNS)
@settings(max_examples=300, deadline=None)
def test_things_stand_where_the_words_say(design: Design) -> None:
    placement = placed(design)
    wide, high = design.size[0] // UNIT, design.size[1] // UNIT
    boxes, stamps = placement.boxes, placement.pictograms
    assert len(stamps) == (0 if design.concept is None else design.count)
    assert [box[1] for box in boxes] == sorted(box[1] for box in boxes)
    if boxes and stamps:
        x, y = stamps[0]
        assert {
            "above": y + PICTOGRAM <= boxes[0][1],
            "below": y >= boxes[-1][1] + boxes[-1][3],
            "left": all(x + PICTOGRAM <= box[0] for box in boxes),
            "right": all(x >= box[0] + box[2] for box in boxes),
        }[design.side]
    if boxes and (not stamps or design.side in ("above", "below")):
        for x, _, width, _ in boxes:
            left, right = x, wide - x - width
            slack = {"left": left - right, "right": right - left, "center": abs(left - right) - 1}[design.align]
            odd = design.align == "right" and width % 2  # lines begin on whole tokens, so an odd one ends a unit early
            assert slack <= RING + odd  # the margin counts also where it is all there is
    everything = boxes_of(placement)
    if everything and not (boxes and stamps and design.side in ("left", "right")):
        above, below = min(y for _, y, _, _ in everything), high - max(y + h for _, y, _, h in everything)
        assert {"top": above <= below, "bottom": above >= below, "middle": abs(above - below) <= 2}[design.place]


@given(DESIGNS, st.sampled_from(readable_pairs()), st.integers(0, 59))
@settings(max_examples=60, deadline=None)
def test_what_the_seed_decides_moves_nothing(design: Design, pair: tuple[str, str], ornament: int) -> None:
    placement = placed(design)
    other = replace(
        design, ground=pair[0], letters=pair[1], scene="book", texture="dots", ornament=ornament, border=True
    )
    assert place(other) == placement


def sign(*lines: str, size: tuple[int, int] = WIDE, **others: object) -> Design:
    return replace(Design(size, lines, "blue", "white"), **others)


@pytest.mark.parametrize(
    ("lines", "size", "large", "origins"),
    [
        (("TAXI",), WIDE, True, [(6, 2)]),
        (("LAPELS",), WIDE, True, [(2, 2)]),
        (("LETTERS",), WIDE, False, [(6, 4)]),
        (("a", "b"), WIDE, False, [(12, 2), (12, 6)]),
        (("HELLO",), SQUARE, True, [(2, 8)]),
        (("LAPELS",), SQUARE, False, [(6, 10)]),
        (("营业中",), WIDE, False, [(8, 4)]),
        (("营业", "Open"), SQUARE, False, [(8, 8), (8, 12)]),
    ],
)
def test_lines_stand_in_the_middle_and_latin_ones_grow(lines, size, large, origins) -> None:
    placement = place(sign(*lines, size=size))
    assert placement.large == large and [box[:2] for box in placement.boxes] == origins


def test_a_pictogram_takes_its_side() -> None:
    assert place(sign("Cat", size=SQUARE, concept=0)).pictograms == ((8, 4),)
    assert place(sign("Cat", concept=0, side="left")).pictograms == ((2, 2),)
    assert place(sign("Cat", concept=0, side="right")).pictograms == ((18, 2),)
    assert len(place(sign(size=SQUARE, concept=0, count=3)).pictograms) == 3


@pytest.mark.parametrize(
    "design",
    [
        sign("a" * 15),
        sign(""),
        sign("a", "", size=SQUARE),
        sign(*"abcde", size=LARGE),
        sign("一二三四五六七八"),
        sign("a", "b", concept=0, side="above"),
        sign("a", size=SQUARE, concept=0, count=2, side="left"),
        sign(size=SQUARE, concept=0, count=4),
        sign(size=(128, 128), concept=0, count=3),
    ],
)
def test_what_does_not_fit_is_refused_in_a_sentence(design: Design) -> None:
    with pytest.raises(RequestError) as caught:
        place(design)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("OPEN", ("OPEN",)),
        ("Fresh Bread", ("Fresh", "Bread")),
        ("  Open   24 h ", ("Open 24 h",)),
        ("No Parking Here Today", ("No Parking", "Here Today")),
        ("one two three four", ("one two", "three four")),
        ("小心地滑", ("小心地滑",)),
    ],
)
def test_quoted_texts_break_by_rule(text: str, lines: tuple[str, ...]) -> None:
    assert break_lines(text) == lines


@pytest.mark.parametrize("text", ["", "   ", "incomprehensible", "one two three four five six seven eight nine ten"])
def test_texts_that_do_not_break_are_refused(text: str) -> None:
    with pytest.raises(RequestError):
        break_lines(text)


def test_advances_are_whole_units() -> None:
    assert all(advance(face, c) == 2 for face in ("mono", "typewriter") for c in LATIN)
    assert all(advance(face, c) in (1, 2, 3) for face in PROPORTIONAL for c in LATIN)
    assert all(advance(face, "l") < advance(face, "m") for face in PROPORTIONAL)
    assert all(advance(face, c) == 4 for face in FACES for c in "营，")


def test_letters_stand_out() -> None:
    assert {ground for ground, _ in readable_pairs()} == set(COLORS)
    for ground in COLORS:
        assert abs(luminance(ground) - luminance(letters_for(ground))) >= MIN_LUMINANCE_GAP
