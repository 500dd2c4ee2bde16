"""The sign renderer: its layout rule, its split, and pictures that keep what the sign says."""

import random
import re

import numpy as np
import pytest

from lanting.core.errors import RequestError
from lanting.train.sign_texts import is_held_out, words
from lanting.train.signs import (
    ALPHABET,
    COLORS,
    FACES,
    MIN_LUMINANCE_GAP,
    SIZES,
    SQUARE,
    TOKEN,
    WIDE,
    Sign,
    SignMaker,
    break_lines,
    labels,
    layout,
    letters_for,
    luminance,
    pixels,
    readable_pairs,
    render,
)


def make(lines: tuple[str, ...], size: tuple[int, int] = WIDE, frame: bool = False, face: str = "sans") -> Sign:
    return Sign("", lines, "blue", "white", face, frame, size)


@pytest.fixture(scope="module")
def drawn() -> list[Sign]:
    maker, rng = SignMaker(3), random.Random(11)
    return [maker.sample(rng) for _ in range(3000)]


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("OPEN", ("OPEN",)),
        ("Fresh Bread", ("Fresh", "Bread")),
        ("Open 24 h", ("Open 24 h",)),
        ("  Open   24 h ", ("Open 24 h",)),
        ("No Parking Here Today", ("No Parking", "Here Today")),
        ("one two three four", ("one two", "three four")),
    ],
)
def test_lines_break_by_rule(text: str, lines: tuple[str, ...]) -> None:
    assert break_lines(text) == lines


@pytest.mark.parametrize("text", ["", "   ", "incomprehensible", "a text that is far too long for two lines"])
def test_texts_that_do_not_fit_are_refused(text: str) -> None:
    with pytest.raises(RequestError, match="one or two lines"):
        break_lines(text)


@pytest.mark.parametrize(
    ("lines", "size", "cell", "origins"),
    [
        (("TAXI",), WIDE, 2, ((3, 1),)),
        (("LAPELS",), WIDE, 2, ((1, 1),)),
        (("LETTERS",), WIDE, 1, ((3, 2),)),
        (("a", "b"), WIDE, 1, ((6, 1), (6, 3))),
        (("HELLO",), SQUARE, 2, ((1, 4),)),
        (("LAPELS",), SQUARE, 1, ((3, 5),)),
        (("ab", "abcde"), SQUARE, 2, ((4, 2), (1, 6))),
        (("ab", "abcdef"), SQUARE, 1, ((5, 4), (3, 6))),
    ],
)
def test_layout_is_a_function_of_lengths(lines, size, cell, origins) -> None:
    plan = layout(lines, size, False)
    assert (plan.cell, plan.origins) == (cell, origins)
    assert layout(["x" * len(line) for line in lines], size, True).origins == origins  # whatever the frame and text


def test_a_frame_without_room_is_left_out() -> None:
    assert layout(["a" * 10], SQUARE, True).frame
    assert not layout(["a" * 11], SQUARE, True).frame
    assert layout(["a" * 12], WIDE, True).frame


@pytest.mark.parametrize("lines", [[], [""], ["a", "b", "c"], ["a" * 13]])
def test_layout_refuses_what_does_not_fit(lines: list[str]) -> None:
    with pytest.raises(RequestError):
        layout(lines, WIDE, False)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("face", FACES)
def test_ink_stays_in_the_cells_and_off_the_frame(size: tuple[int, int], face: str) -> None:
    for line in ("Wgj@"[:3], "Qgjpy$MW%"):
        plain = (pixels(make((line,), size, face=face)) != COLORS["blue"]).any(-1)
        framed = (pixels(make((line,), size, True, face)) != COLORS["blue"]).any(-1)
        cells = np.kron(labels(make((line,), size)) > 0, np.ones((TOKEN, TOKEN), dtype=bool))
        assert plain.any() and not (plain & ~cells).any()
        ring = framed & ~plain
        rows, columns = np.nonzero(ring)
        assert rows.min() == columns.min() == 4
        assert not ring[TOKEN:-TOKEN, TOKEN:-TOKEN].any() and (framed & cells == plain).all()


@pytest.mark.parametrize("face", FACES)
@pytest.mark.parametrize("line", ["ab", "abcdefgh"])
def test_every_character_looks_different_and_the_same_everywhere(face: str, line: str) -> None:
    """A glyph is the same at each position of a line, and no two of the alphabet are alike."""
    step = TOKEN * layout((line,), WIDE, False).cell

    def cells(text: str) -> list[bytes]:
        column, row = layout((text,), WIDE, False).origins[0]
        image = pixels(make((text,), WIDE, face=face))[row * TOKEN : row * TOKEN + 2 * step]
        return [image[:, column * TOKEN + i * step :][:, :step].tobytes() for i in range(len(text))]

    seen = {character: cells(character * len(line)) for character in ALPHABET}
    assert all(len(set(copies)) == 1 for copies in seen.values())
    assert len({copies[0] for copies in seen.values()}) == len(ALPHABET)


def test_labels_spell_the_lines(drawn: list[Sign]) -> None:
    for sign in drawn[:500]:
        plan, grid = layout(sign.lines, sign.size, sign.frame), labels(sign)
        assert grid.shape == (sign.size[1] // TOKEN, sign.size[0] // TOKEN)
        for line, (column, row) in zip(sign.lines, plan.origins, strict=True):
            ids = grid[row : row + 2 * plan.cell, column : column + plan.cell * len(line)]
            assert (ids == ids[0]).all()
            assert "".join(" " if i == 0 else ALPHABET[i - 1] for i in ids[0, :: plan.cell]) == line
        assert (grid > 0).sum() == 2 * plan.cell**2 * sum(len(line.replace(" ", "")) for line in sign.lines)


def test_pictures_are_rgb_of_the_asked_size(drawn: list[Sign]) -> None:
    for sign in drawn[:50]:
        image = render(sign)
        assert image.mode == "RGB" and image.size == sign.size
        assert image.getpixel((0, 0)) == COLORS[sign.ground]
        assert COLORS[sign.letters] in image.get_flattened_data()


def test_colours_are_readable_and_defaults_follow_the_rule(drawn: list[Sign]) -> None:
    pairs = set(readable_pairs())
    assert len(pairs) >= 30
    for sign in drawn:
        assert (sign.ground, sign.letters) in pairs
        assert abs(luminance(sign.ground) - luminance(sign.letters)) >= MIN_LUMINANCE_GAP
        outside = re.sub(r'"[^"]*"', "", sign.prompt).lower().replace("grey", "gray")
        if not re.search(rf"\b{sign.letters}\b", outside):
            assert sign.letters == letters_for(sign.ground)
        named = re.search(r"\b(serif|typewriter|handwritten|casual)\b", outside.replace("sans-serif", "sans"))
        assert (named is not None) == (sign.face != "sans")
        assert bool(re.search(r"\b(frame|border|outline)\b", outside.replace("no frame", ""))) == sign.frame


def test_prompts_say_the_lines(drawn: list[Sign]) -> None:
    """The quotes of a prompt, broken by the rule, are the lines of the picture: nothing is left to guess."""
    for sign in drawn:
        quotes = re.findall(r'"([^"]*)"', sign.prompt)
        assert sign.lines == (break_lines(quotes[0]) if len(quotes) == 1 else tuple(quotes))


def test_sizes_and_lengths_are_balanced(drawn: list[Sign]) -> None:
    large = sum(layout(s.lines, s.size, s.frame).cell == 2 for s in drawn) / len(drawn)
    assert 0.33 < large < 0.5
    lengths = [len(line) for sign in drawn for line in sign.lines]
    assert all(lengths.count(n) / len(lengths) > 0.03 for n in range(2, 13))
    assert 0 < lengths.count(1) / len(lengths) < 0.03
    assert 0.5 < sum(s.size == WIDE for s in drawn) / len(drawn) < 0.7


def test_held_out_texts_are_never_trained(drawn: list[Sign]) -> None:
    everything, reserved = words()
    assert len(reserved) == 2000 and len(everything) == 24000
    trained = {word for sign in drawn for line in sign.lines for word in line.split()}
    assert not [word for word in trained if is_held_out(word)]
    maker, rng = SignMaker(0, held_out=True), random.Random(5)
    fresh = [word for _ in range(300) for line in maker.sample(rng).lines for word in line.split()]
    long = [word for word in fresh if len(word.rstrip("!?.")) >= 4]
    assert len(long) > 200 and all(map(is_held_out, long))


def test_the_same_seed_gives_the_same_signs() -> None:
    first, second = SignMaker(4), SignMaker(4)
    assert [first.sample() for _ in range(20)] == [second.sample() for _ in range(20)]
    assert first.sample(random.Random(1), size=SQUARE) == second.sample(random.Random(1), size=SQUARE)
    assert first.sample(size=SQUARE).size == SQUARE
