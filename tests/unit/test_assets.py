"""The assets of nano's designs: counts, names, coverage of the fonts, and a licence for every file."""

from __future__ import annotations

import re
from importlib.resources import files
from io import BytesIO

import numpy as np
import pytest
from PIL import ImageFont

from lanting.train import assets

MARKS = "，。！？、：；（）《》“”「」￥"
CHINESE = ("Heiti-Bold", "Songti-Bold", "Kaiti-Bold")
LATIN = ("Sans-Bold", "Serif-Bold", "Hand-Bold")
ASCII = "".join(chr(code) for code in range(33, 127))


def test_hanzi_are_3500_different_characters() -> None:
    assert len(assets.hanzi()) == len(set(assets.hanzi())) == 3500
    assert assets.hanzi()[:3] == "一是人"


def test_phrases_are_made_of_the_characters() -> None:
    phrases = assets.phrases()
    assert 20_000 <= len(phrases) == len(set(phrases))
    assert {len(phrase) for phrase in phrases} == set(range(1, 9))
    assert set("".join(phrases)) <= set(assets.hanzi())


def test_dictionary_pairs_one_word_with_up_to_four_characters() -> None:
    pairs = assets.dictionary()
    assert len(pairs) >= 400 and len({english for english, _ in pairs}) == len(pairs)
    for english, chinese in pairs:
        assert re.fullmatch("[a-z]{2,10}", english) and 1 <= len(chinese) <= 4
        assert set(chinese) <= set(assets.hanzi())


def test_concepts_have_names_of_their_own() -> None:
    concepts = assets.concepts()
    assert len(concepts) >= 1000
    assert len({concept.name_en for concept in concepts}) == len({concept.name_zh for concept in concepts})
    assert len({concept.name_en for concept in concepts}) == len(concepts)
    for concept in concepts[:256]:
        assert re.fullmatch("[a-z]+", concept.name_en) and 1 <= len(concept.name_zh) <= 3
        assert set(concept.name_zh) <= set(assets.hanzi())


def test_every_concept_has_a_picture_of_its_own() -> None:
    pictograms = assets.pictograms()
    assert pictograms.shape == (len(assets.concepts()), 64, 64, 4) and pictograms.dtype == np.uint8
    assert (pictograms[..., 3].max(axis=(1, 2)) > 200).all()
    assert len({tile.tobytes() for tile in pictograms}) == len(pictograms)
    assert np.count_nonzero(pictograms[:256, ..., 3] > 128, axis=(1, 2)).min() > 300  # nothing faint in front


@pytest.mark.parametrize("name", CHINESE + LATIN)
def test_fonts_draw_every_character(name: str) -> None:
    font = ImageFont.truetype(BytesIO(assets.font(name)), 24)
    missing = bytes(font.getmask("\U0010fffd"))
    for character in assets.hanzi() + MARKS if name in CHINESE else ASCII:
        drawn = bytes(font.getmask(character))
        assert any(drawn) and drawn != missing, character


def test_unknown_fonts_are_refused_with_the_names_there_are() -> None:
    with pytest.raises(KeyError, match="Heiti-Bold"):
        assets.font("Comic")


def test_every_file_has_its_licence() -> None:
    told = (files("lanting.train.assets") / "LICENSES.md").read_text(encoding="utf-8")
    fonts = {entry.name for entry in (files("lanting.train") / "fonts").iterdir()}
    for name in ("hanzi.txt", "phrases-zh.txt.gz", "dictionary.tsv", "concepts.tsv", "pictograms.webp"):
        assert f"`{name}`" in told
    for name in CHINESE + LATIN:
        assert f"`fonts/{name}." in told and f"{name}-LICENSE.txt" in fonts
