"""What the helper heads are asked agrees with the picture: labels and places point at the cells that hold the ink."""

from __future__ import annotations

import random

import numpy as np
import pytest

from lanting.train.assets import concepts
from lanting.train.atlas import alphabet, character_label
from lanting.train.design import PICTOGRAM, SQUARE, TOKEN, UNIT, WIDE, Design, Placement, place
from lanting.train.designs import DesignMaker, Labelled, Mix
from lanting.train.draw import render
from lanting.train.edits import EditMaker
from lanting.train.labels import BASE, WHERE, label_edit, label_grid, label_places
from lanting.train.wording import locate, locate_concept


@pytest.fixture(scope="module")
def drawn() -> list[Labelled]:
    maker, rng = DesignMaker(3, mix=Mix(pictogram=0.4, concepts=1000)), random.Random(3)
    return [maker.sample(rng, (WIDE, SQUARE)[i % 2]) for i in range(400)]


def numbers(design: Design) -> tuple[np.ndarray, Placement]:
    placement = place(design)
    digits = label_grid(design, placement).astype(int)
    return digits[..., 0] * BASE + digits[..., 1], placement


def test_there_are_enough_labels() -> None:
    assert 1 + len(alphabet()) + len(concepts()) < BASE**2
    assert len({character_label(c) for c in alphabet()}) == len(alphabet())


def test_labels_spell_what_stands_on_the_tokens(drawn: list[Labelled]) -> None:
    for labelled in drawn:
        design = labelled.design
        grid, placement = numbers(design)
        assert grid.shape == (design.size[1] // TOKEN, design.size[0] // TOKEN)
        allowed = np.zeros((*grid.shape, 0), dtype=int).tolist()
        for glyph in placement.glyphs:
            for row in range(glyph.y // 2, (glyph.y + glyph.height) // 2):
                for column in range(glyph.x // 2, -(-(glyph.x + glyph.width) // 2)):
                    allowed[row][column].append(character_label(glyph.character))
        for x, y in placement.pictograms:
            for row in range(y // 2, (y + PICTOGRAM) // 2):
                for column in range(x // 2, (x + PICTOGRAM) // 2):
                    allowed[row][column].append(1 + len(alphabet()) + (design.concept or 0))
        for row, labels in enumerate(grid.tolist()):
            for column, label in enumerate(labels):
                here = allowed[row][column]
                assert label in here if any(here) else label == 0, (design, row, column)


def test_every_character_has_a_token_of_its_own_or_a_neighbour(drawn: list[Labelled]) -> None:
    for labelled in drawn:
        if labelled.design.face in ("mono", "typewriter"):
            grid, placement = numbers(labelled.design)
            for glyph in placement.glyphs:
                cell = grid[glyph.y // 2 : (glyph.y + glyph.height) // 2, glyph.x // 2 : (glyph.x + glyph.width) // 2]
                assert (cell == character_label(glyph.character)).all()


def test_labelled_tokens_hold_the_ink(drawn: list[Labelled]) -> None:
    designs = [labelled.design for labelled in drawn if labelled.design.texture == "plain"]
    designs = [d for d in designs if d.ground2 is None and d.scene == "sign" and not d.border and d.ornament % 6 == 0]
    assert len(designs) > 20
    for design in designs:
        picture = render([design])[0].numpy()
        inked = (picture != picture[0, 0]).any(-1)
        tokens = inked.reshape(design.size[1] // TOKEN, TOKEN, design.size[0] // TOKEN, TOKEN).any((1, 3))
        assert not (tokens & (numbers(design)[0] == 0)).any()


def spots_of(labelled: Labelled) -> list[tuple[int, int, int, int]]:
    """The places with one token for every character of the prompt."""
    prompt = labelled.prompt
    return label_places(labelled.design, place(labelled.design), prompt, range(len(prompt)))


def test_places_point_at_the_glyphs(drawn: list[Labelled]) -> None:
    for labelled in drawn:
        design, placement = labelled.design, place(labelled.design)
        found = {token: spot for token, *spot in spots_of(labelled)}
        middle = design.size[0] // UNIT // 2, design.size[1] // UNIT // 2
        lines = locate(labelled.prompt, design.lines)
        for glyph in placement.glyphs:
            column, row, width = found[lines[glyph.line][glyph.index]]
            assert column - WHERE[0] // 2 + middle[0] == glyph.x
            assert (row - WHERE[1] // 2) * 2 + middle[1] in (glyph.y, glyph.y + 1)
            assert width == min(glyph.width, WHERE[2] - 1)
        assert all(0 <= value < size for spot in found.values() for value, size in zip(spot, WHERE, strict=True))


def test_places_point_at_the_first_pictogram(drawn: list[Labelled]) -> None:
    for labelled in drawn:
        design = labelled.design
        if design.concept is None:
            continue
        name = getattr(concepts()[design.concept], f"name_{labelled.language}")
        end = locate_concept(labelled.prompt, name)[-1]
        found = {token: spot for token, *spot in spots_of(labelled)}
        x, y = place(design).pictograms[0]
        assert found[end][0] - WHERE[0] // 2 + design.size[0] // UNIT // 2 == x, labelled
        assert (found[end][1] - WHERE[1] // 2) * 2 + design.size[1] // UNIT // 2 in (y, y + 1), labelled


def test_tokens_may_begin_with_a_space_or_before_the_prompt() -> None:
    design = Design(WIDE, ("cat",), "blue", "white", concept=0, side="left")
    prompt = 'a cat and "cat"'
    found = label_places(design, place(design), prompt, (-3, 0, 1, 5, 9, 11, 12, 13, 14))
    glyphs = {glyph.index: glyph.x for glyph in place(design).glyphs}
    shift = WHERE[0] // 2 - WIDE[0] // UNIT // 2
    assert [(token, column - shift) for token, column, _, _ in found] == [
        (2, place(design).pictograms[0][0]),
        (5, glyphs[0]),
        (6, glyphs[1]),
        (7, glyphs[2]),
    ]
    assert label_places(design, place(design), "nothing of it", range(10)) == []


def test_words_that_an_edit_replaces_stand_where_they_are_now() -> None:
    maker, rng, seen = EditMaker(3, mix=Mix(pictogram=0.4)), random.Random(3), 0
    for _ in range(200):
        edit = maker.sample(rng, WIDE, "rewrite")
        source, target, prompt = edit.sources[0], edit.target, edit.instruction
        starts = range(len(prompt))
        both = label_edit((source, target), (place(source), place(target)), prompt, starts)
        new = label_places(target, place(target), prompt, starts)
        assert set(new) <= set(both) and len({token for token, *_ in both}) == len(both)
        old = {spot for spot in both if spot not in new}
        gone = [line for line in source.lines if line not in target.lines]
        if old:
            seen += 1
            assert len(old) == len(gone[0])
            assert old <= set(label_places(source, place(source), prompt, starts))
    assert seen > 50
