"""Judges of colour, pictograms and edits: on pictures drawn here, right ones pass and wrong ones are misses."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

from lanting.evals import follow
from lanting.evals.colors import Ground, free_pixels, ground_of, ink_of, nearest_color
from lanting.evals.draw import by_rule
from lanting.evals.edit import BEST, is_done, nearest_value, outcome, psnr, rest_of
from lanting.evals.follow import FollowReport, colors, measure, measure_freely, spread_of
from lanting.evals.ocr import Judge
from lanting.evals.pictograms import NOTHING, Stamps, boxes_of, count_of, identify, side_of, stamps
from lanting.evals.sets import Case
from lanting.train.design import COLORS, SQUARE, TEXTURES, WIDE, Design, Said
from lanting.train.designs import Labelled
from lanting.train.edits import Edit, changed_boxes

BOX = (20, 20, 120, 40)


def sign(ground, letters, gradient=None) -> np.ndarray:
    image = Image.new("RGB", (160, 80), ground)
    pen = ImageDraw.Draw(image)
    if gradient:
        for y in range(80):
            share = y / 79
            pen.line((0, y, 160, y), tuple(round(a + share * (b - a)) for a, b in zip(ground, gradient, strict=True)))
    pen.text((80, 40), "HELLO", letters, ImageFont.load_default(36), anchor="mm")
    return np.asarray(image, dtype=np.float64)


def design(**changes) -> Design:
    return replace(Design(WIDE, ("FRESH",), "blue", "white"), **changes)


def pixels(*designs: Design) -> np.ndarray:
    return np.asarray(by_rule(designs)[0], dtype=np.float64)


# ---------------------------------------------------------------- colours
@pytest.mark.parametrize(("ground", "letters"), [("blue", "white"), ("yellow", "purple"), ("gray", "black")])
def test_colors_are_measured(ground, letters):
    picture = sign(COLORS[ground], COLORS[letters])
    free = free_pixels((160, 80), [BOX], 8)
    seen = ground_of(picture, free, graded=False)
    assert nearest_color(seen.middle) == ground
    ink = ink_of(picture, [BOX], seen)
    assert ink is not None and nearest_color(ink) == letters


def test_a_gradient_shows_both_its_ends():
    picture = sign(COLORS["white"], COLORS["black"], gradient=COLORS["blue"])
    seen = ground_of(picture, free_pixels((160, 80), [BOX], 8), graded=True)
    assert (nearest_color(seen.top), nearest_color(seen.bottom)) == ("white", "blue")
    assert seen.rows(10, 20).shape == (10, 1, 3)


def test_misplaced_words_do_not_tilt_the_ground():
    wanted = design()
    picture = pixels(wanted)
    picture[60:80] = 0  # a bar of other ink where no text should be
    assert dict(colors(picture, asked(wanted)))["ground"] is True


def test_no_box_has_no_ink_and_a_full_canvas_still_has_a_ground():
    assert ink_of(np.zeros((8, 8, 3)), [], Ground(np.zeros(3), np.zeros(3), 8)) is None
    assert free_pixels((32, 32), [(0, 0, 32, 30)], 16).sum() == 64
    assert ground_of(np.full((8, 8, 3), 9.0), np.zeros((8, 8), bool), graded=True).middle.tolist() == [9, 9, 9]


# ---------------------------------------------------------------- pictograms
@pytest.fixture(scope="module")
def shapes() -> Stamps:
    """Three pictograms of our own: a disc, a bar, a ring."""
    drawn = []
    for shape in range(3):
        image = Image.new("RGBA", (64, 64))
        pen = ImageDraw.Draw(image)
        if shape == 1:
            pen.rectangle((8, 24, 56, 40), fill=(200, 160, 0, 255))
        else:
            pen.ellipse(
                (8, 8, 56, 56), fill=(220, 30, 30, 255) if shape == 0 else None, outline=(0, 90, 0, 255), width=6
            )
        drawn.append(np.asarray(image))
    return Stamps(torch.tensor(np.stack(drawn)))


def lay(shapes: Stamps, number: int, ground=(30, 70, 200), noise=0.0) -> np.ndarray:
    stamp = shapes.pictures[number].numpy()
    alpha = stamp[..., 3:] / 255
    picture = stamp[..., :3] * alpha + np.asarray(ground) * (1 - alpha)
    return picture + np.random.default_rng(0).normal(0, noise, picture.shape)


def test_the_errors_are_mean_squared_errors(shapes):
    patch, under = torch.rand(64, 64, 3) * 255, torch.rand(64, 1, 3) * 255
    laid = torch.lerp(under.expand(3, -1, 64, -1), shapes.pictures[..., :3], shapes.pictures[..., 3:] / 255)
    assert torch.allclose(shapes.errors(patch, under), (laid - patch).square().mean((1, 2, 3)), rtol=1e-3)


@pytest.mark.parametrize("number", [0, 1, 2])
def test_pictograms_are_told_apart_even_through_noise(shapes, number):
    ground = Ground(np.array([30.0, 70, 200]), np.array([30.0, 70, 200]), 64)
    found = identify(lay(shapes, number, noise=12), (0, 0, 64, 64), ground, shapes)
    assert found.concept == number and found.fit > 0.8


def test_bare_ground_and_a_smudge_are_no_pictogram(shapes):
    ground = Ground(np.array([30.0, 70, 200]), np.array([30.0, 70, 200]), 64)
    bare = np.full((64, 64, 3), (30.0, 70, 200))
    assert identify(bare, (0, 0, 64, 64), ground, shapes).concept == NOTHING
    assert identify(bare + 20, (0, 0, 64, 64), ground, shapes).fit < 0.3


def test_the_packaged_pictograms_are_found_where_the_rule_puts_them():
    wanted = design(size=SQUARE, concept=7, count=2, lines=("AB",), side="below")
    seen, boxes = pixels(wanted), boxes_of(wanted)[1]
    ground = Ground(np.asarray(COLORS["blue"], float), np.asarray(COLORS["blue"], float), 192)
    assert [identify(seen, box, ground).concept for box in boxes] == [7, 7]
    rows = {n: boxes_of(replace(wanted, count=n))[1] for n in (1, 2, 3)}
    assert count_of(seen, ground, rows, 7) == 2
    sides = {s: boxes_of(replace(wanted, side=s))[1] for s in ("above", "below")}
    assert side_of(seen, ground, sides) == "below"
    assert side_of(np.full_like(seen, COLORS["blue"]), ground, sides) is None
    assert len(stamps().pictures) >= 1000


# ---------------------------------------------------------------- following
def asked(wanted: Design, **said) -> Case:
    return Case("", wanted, "en", labelled=Labelled(wanted, Said(**said), "", "en"))


def test_a_picture_as_asked_has_every_trait():
    wanted = design(size=SQUARE, concept=3, ground2="black")
    assert measure(by_rule([wanted])[0], asked(wanted)) == dict.fromkeys(
        ("ground", "letters", "pictogram", "count", "side"), True
    )


@pytest.mark.parametrize(
    ("trait", "change"),
    [
        ("ground", {"ground": "purple"}),
        ("ground", {"ground2": "black"}),
        ("letters", {"letters": "yellow"}),
        ("pictogram", {"concept": 4}),
        ("count", {"count": 3}),
        ("side", {"side": "below"}),
    ],
)
def test_each_wrong_trait_is_a_miss(trait, change):
    wanted = design(size=SQUARE, concept=3)
    found = measure(by_rule([replace(wanted, **change)])[0], asked(wanted))
    assert found[trait] is False
    assert [name for name, right in found.items() if not right] == [trait]


@pytest.mark.parametrize("drawn", [1, 3])
@pytest.mark.parametrize("concept", [7, 80])
def test_a_wrong_number_is_no_wrong_pictogram(drawn, concept):
    """Other numbers stand in other places: each pictogram is looked at where it is."""
    wanted = design(size=SQUARE, concept=7, count=2, side="below", lines=("AB",))
    picture = by_rule([replace(wanted, count=drawn, concept=concept)])[0]
    found = measure(picture, asked(wanted))
    assert (found["count"], found["pictogram"], found["side"]) == (False, concept == 7, True)


@pytest.mark.parametrize(("ground", "ground2"), [("white", "black"), ("black", "white")])
def test_letters_that_one_end_of_a_gradient_outshines_are_measured_against_their_own_rows(ground, ground2):
    wanted = design(ground=ground, ground2=ground2, letters="orange")
    assert dict(colors(pixels(wanted), asked(wanted), said_only=False)) == {"ground": True, "letters": True}


def test_what_was_not_said_is_not_judged():
    assert measure(by_rule([design()])[0], asked(design(), ground=False, letters=False)) == {}


@pytest.mark.parametrize("boxes", [[], [(20, 20, 60, 30)]])
def test_a_picture_without_words_counts_in_every_trait_that_was_asked(boxes, monkeypatch):
    monkeypatch.setattr(follow, "text_boxes", lambda image: boxes)
    wanted = design(size=SQUARE, ground="blue", letters="white", place="top", align="left")
    case = asked(wanted, ground=True, letters=True, place=True, align=True)
    bare = Image.new("RGB", SQUARE, COLORS["blue"])
    found = measure_freely(bare, case)
    assert found == {"ground": True, "letters": False} | dict.fromkeys(("place", "align"), bool(boxes))
    assert not FollowReport([case], [], [found], []).hits[0]


def test_the_spread_of_seeds():
    one, other = by_rule([design()])[0], by_rule([design(ground="black")])[0]
    assert spread_of([one, one]) == 0 and spread_of([one]) == 0
    assert spread_of([one, other]) > 0.1


# ---------------------------------------------------------------- edits
def made(kind: str, source: Design, target: Design) -> Case:
    edit = Edit(kind, (source,), target, "", "en", changed_boxes(source, target))
    return Case("", target, "en", (source,), edit)


EDITS = [
    ("ground", design(), design(ground="black")),
    ("letters", design(), design(letters="yellow")),
    ("add", design(), design(concept=3, side="left")),
    ("remove", design(concept=3, side="left"), design()),
    ("replace", design(concept=3, side="left"), design(concept=9, side="left")),
    ("move", design(size=SQUARE, concept=3), design(size=SQUARE, concept=3, side="below")),
    ("face", design(), design(face="typewriter")),
    ("border", design(), design(border=True)),
    ("texture", design(), design(texture="dots")),
    ("scene", design(), design(scene="book")),
]
BLIND = Judge("blind", lambda image, language: [])
SURE = Judge("sure", lambda image, language: ["FRESH"])


@pytest.mark.parametrize(("kind", "source", "target"), EDITS, ids=[kind for kind, *_ in EDITS])
def test_an_edit_is_done_when_it_is_and_not_when_nothing_happened(kind, source, target):
    before, after = by_rule([source])[0], by_rule([target])[0]
    case = made(kind, source, target)
    assert outcome(after, case, SURE).done is True
    assert outcome(before, case, SURE).done is False
    assert outcome(after, case, SURE).kept == BEST


def test_another_face_must_still_spell_the_words():
    case = made("face", design(), design(face="typewriter"))
    assert not is_done(by_rule([case.design])[0], case, BLIND)


def test_a_pictogram_is_not_read_as_a_letter():
    case = made("rewrite", design(concept=3, side="left"), design(lines=("BREAD",), concept=3, side="left"))
    (x, y, width, height) = boxes_of(case.design)[1][0]

    def read(image: Image.Image, language: str) -> list[str]:
        bare = np.asarray(image)[y : y + height, x : x + width]
        return ["BREAD" if (bare == COLORS["blue"]).all() else "OBREAD"]

    image = by_rule([case.design])[0]
    before = image.tobytes()
    assert is_done(image, case, Judge("x", read)) and image.tobytes() == before
    assert read(image, "en") == ["OBREAD"]


@pytest.mark.parametrize("texture", TEXTURES[1:])
def test_a_texture_may_begin_anywhere(texture):
    case = made("texture", design(), design(texture=texture))
    for seed in (0, 7, 26, 45):
        own = design(texture=texture, ornament=seed)
        assert is_done(by_rule([own])[0], case, BLIND)
        for other in set(TEXTURES) - {texture}:
            assert not is_done(by_rule([replace(own, texture=other)])[0], case, BLIND)


def test_new_words_are_read():
    case = made("rewrite", design(), design(lines=("BREAD",)))
    image = by_rule([case.design])[0]
    assert is_done(image, case, Judge("x", lambda image, language: ["bread"]))
    assert not is_done(image, case, Judge("x", lambda image, language: ["FRESH"]))


def test_the_rest_is_compared_outside_the_boxes():
    case = made("rewrite", design(), design(lines=("BREAD",)))
    image = by_rule([case.design])[0]
    spoilt = image.copy()
    spoilt.paste((0, 0, 0), (0, 0, 16, 96))
    kept = outcome(spoilt, case, BLIND).kept
    assert kept is not None and kept < 25
    inside = image.copy()
    x, y, width, height = case.edit.changed[0]
    inside.paste((0, 0, 0), (x, y, x + width, y + height))
    assert outcome(inside, case, BLIND).kept == BEST


def test_without_boxes_the_rest_is_what_the_rule_draws_alike():
    source, target = by_rule([design(), design(ground="black")])
    mask = rest_of(source, target, ())
    assert mask is not None and 0 < mask.mean() < 0.5  # the cores of the letters
    assert psnr(target, source, mask) == BEST
    assert rest_of(Image.new("RGB", (9, 9)), Image.new("RGB", (9, 9), "red"), ()) is None


def test_psnr_is_what_it_is():
    one, other = Image.new("RGB", (9, 9), (100, 100, 100)), Image.new("RGB", (9, 9), (110, 110, 110))
    assert psnr(one, other, np.ones((9, 9), bool)) == pytest.approx(28.13, abs=0.01)


def test_a_model_without_our_rules_is_asked_for_less():
    case = made("texture", design(), design(texture="dots"))
    assert outcome(by_rule([case.design])[0], case, BLIND, ruled=False).done is None
    large = by_rule([design(ground="black")])[0].resize((896, 384))
    assert outcome(large, made("ground", design(), design(ground="black")), BLIND, ruled=False).done is True


def test_the_nearest_value_needs_no_name():
    assert nearest_value(pixels(design(face="serif")), design(), "face") == "serif"
    assert nearest_value(pixels(design(count=1)), design(), "count") == 1
