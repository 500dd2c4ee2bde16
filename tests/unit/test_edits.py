"""Edits: the target differs from the source in what the instruction names, and nowhere else."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest

from lanting.core.errors import RequestError
from lanting.train.assets import dictionary
from lanting.train.design import ALIGNS, FACES, PLACES, SQUARE, WIDE, Design, is_hanzi, place, readable_pairs
from lanting.train.designs import DesignMaker, Mix
from lanting.train.draw import render
from lanting.train.edits import KINDS, ONE_PICTURE, TWO_PICTURES, Edit, EditMaker, as_seen, changed_boxes
from lanting.train.wording import without_quotes

FIELDS = {  # what each kind may change; the layout rule does the rest
    "rewrite": {"lines"},
    "ground": {"ground", "ground2"},
    "letters": {"letters"},
    "add": {"concept", "count", "side"},
    "remove": {"concept", "count"},
    "replace": {"concept"},
    "move": {"side"},
    "face": {"face"},
    "translate": {"lines"},
    "border": {"border"},
    "texture": {"texture", "ornament"},
    "scene": {"scene"},
    "ground_from": {"ground", "ground2", "texture"},
    "concept_from": {"concept", "count", "side"},
    "text_from": {"lines"},
}


@pytest.fixture(scope="module")
def edits() -> list[Edit]:
    maker, rng = EditMaker(2, mix=Mix(pictogram=0.5)), random.Random(2)
    return [maker.sample(rng, (WIDE, SQUARE)[i % 2]) for i in range(400)]


def differing(source: Design, target: Design) -> np.ndarray:
    """(H, W) bool."""
    first, second = (render([design])[0].numpy() for design in (source, target))
    return (first != second).any(-1)


def strays(edit: Edit) -> bool:
    """Whether pixels outside the boxes differ."""
    other = differing(edit.sources[0], edit.target)
    for x, y, width, height in edit.changed:
        assert x >= 0 and y >= 0 and x + width <= edit.target.size[0] and y + height <= edit.target.size[1]
        other[y : y + height, x : x + width] = False
    return bool(other.any())


def test_outside_the_changed_boxes_nothing_changes(edits: list[Edit]) -> None:
    bounded = [edit for edit in edits if edit.changed]
    assert len(bounded) > 150 and not [edit for edit in bounded if strays(edit)]


def test_letters_on_a_texture_may_change_everything() -> None:
    """A texture keeps away from the letters' colour."""
    maker, rng = EditMaker(5), random.Random(8)
    found = [maker.sample(rng, WIDE, "letters") for _ in range(200)]
    assert any(edit.target.texture != "plain" for edit in found)
    assert not [edit for edit in found if edit.changed and strays(edit)]


def values(design: Design, name: str) -> list[object]:
    """What an attribute of a picture may be instead."""
    every = {"face": FACES, "align": ALIGNS, "place": PLACES, "border": (False, True)}
    return [value for value in every[name] if value != getattr(design, name)]


def fits(design: Design) -> bool:
    try:
        return bool(place(design))
    except RequestError:
        return False


@pytest.mark.parametrize("name", ["face", "align", "place", "border"])
def test_sources_hide_nothing(edits: list[Edit], name: str) -> None:
    """Of designs that draw one picture the source is always the same: the target must follow from what is seen."""
    asked = [edit for edit in edits if name == "face" or edit.target.lines]
    for edit in asked[::4]:
        source = edit.sources[0]
        for value in values(source, name):
            other = replace(source, **{name: value})
            if fits(other) and not differing(source, other).any():
                assert as_seen(other) == source, (source, value)


def test_what_is_seen_draws_the_same_but_for_the_beginning_of_a_texture() -> None:
    maker, rng = DesignMaker(4, mix=Mix(pictogram=0.4, open=1.0)), random.Random(4)
    for i in range(100):
        design = maker.sample(rng, (WIDE, SQUARE)[i % 2]).design
        seen = as_seen(design)
        assert place(seen) == place(design) and as_seen(seen) == seen
        if design.texture == "plain":
            assert not differing(design, seen).any(), design
        else:
            assert not differing(replace(design, texture="plain"), replace(seen, texture="plain")).any()


def test_new_textures_are_laid_one_way() -> None:
    maker, rng = EditMaker(6), random.Random(6)
    found = [maker.sample(rng, WIDE, "texture") for _ in range(200)]
    laid = {(e.target.texture, e.target.ornament % 6, e.target.ornament) for e in found if e.target.texture != "plain"}
    assert len(laid) == len({key[:2] for key in laid})


def test_something_changes(edits: list[Edit]) -> None:
    """Three faces share their Chinese characters, so another of these faces shows only on Latin ones."""
    for edit in edits:
        if not differing(edit.sources[0], edit.target).any():
            assert edit.kind == "face" and all(is_hanzi(c) for line in edit.target.lines for c in line), edit


def test_only_what_the_kind_names_differs(edits: list[Edit]) -> None:
    for edit in edits:
        source, target = edit.sources[0], edit.target
        found = {name for name in vars(source) if getattr(source, name) != getattr(target, name)}
        assert found and found <= FIELDS[edit.kind], edit
        assert len(edit.sources) == (2 if edit.kind in TWO_PICTURES else 1)
        assert edit.changed == changed_boxes(source, target)
        for design in (*edit.sources, target):
            assert len(design.lines) <= 2
            place(design)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_can_be_made(kind: str) -> None:
    maker, rng = EditMaker(1, mix=Mix(pictogram=0.5)), random.Random(1)
    assert all(maker.sample(rng, SQUARE, kind).kind == kind for _ in range(5))


@pytest.mark.parametrize("pictures", [1, 2])
def test_the_number_of_pictures_can_be_chosen(pictures: int) -> None:
    maker, rng = EditMaker(1), random.Random(1)
    found = [maker.sample(rng, WIDE, pictures=pictures) for _ in range(20)]
    assert all(len(edit.sources) == pictures for edit in found)
    assert {edit.kind for edit in found} <= set(ONE_PICTURE if pictures == 1 else TWO_PICTURES)


def test_instructions_quote_the_new_words(edits: list[Edit]) -> None:
    quoting = [edit for edit in edits if edit.kind == "rewrite"]
    assert len(quoting) > 30
    for edit in quoting:
        new = [line for line in edit.target.lines if line not in edit.sources[0].lines]
        assert all(line in edit.instruction for line in new), edit
        assert without_quotes(edit.instruction).strip()


def test_translations_are_pairs_of_the_dictionary(edits: list[Edit]) -> None:
    pairs = {(english, chinese) for english, chinese in dictionary()}
    found = [edit for edit in edits if edit.kind == "translate"]
    assert len(found) > 10
    for edit in found:
        (old,), (new,) = edit.sources[0].lines, edit.target.lines
        english, chinese = (new, old) if is_hanzi(old[0]) else (old, new)
        assert (english.lower(), chinese) in pairs
        assert new != english or english.isupper()  # nobody says which case is meant


def test_colours_stay_readable(edits: list[Edit]) -> None:
    pairs = set(readable_pairs())
    recoloured = [e.target for e in edits if e.kind in ("ground", "letters", "ground_from") and e.target.lines]
    assert recoloured and all((t.ground, t.letters) in pairs for t in recoloured)  # a lower colour is not looked at


def test_one_seed_is_one_stream(edits: list[Edit]) -> None:
    first, second = EditMaker(7), EditMaker(7)
    assert [first.sample() for _ in range(10)] == [second.sample() for _ in range(10)]
    maker, rng = EditMaker(9, mix=Mix(pictogram=0.5)), random.Random(2)
    assert [maker.sample(rng, (WIDE, SQUARE)[i % 2]) for i in range(10)] == edits[:10]
