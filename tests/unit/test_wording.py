"""Sentences for designs: they state what they should, and say where it stands."""

import random
from dataclasses import replace

import pytest

from lanting.train import wording_edits, wording_edits_zh, wording_en, wording_held_out, wording_zh
from lanting.train.assets import concepts
from lanting.train.design import Design, Said
from lanting.train.draw import render
from lanting.train.edits import KINDS, EditMaker
from lanting.train.wording import describe, instruct, locate, locate_concept, outside_quotes
from lanting.train.wording_names import article, plural
from random_designs import draw


def name_of(design: Design, language: str) -> str:
    assert design.concept is not None
    return getattr(concepts()[design.concept], f"name_{language}")


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("held_out", [False, True])
def test_lines_and_pictogram_are_said_and_found(language: str, held_out: bool) -> None:
    rng = random.Random(3)
    for _ in range(1500):
        design, said = draw(rng, language)
        prompt = describe(design, said, rng, language, held_out)
        assert "{" not in prompt and "  " not in prompt and "，，" not in prompt and prompt == prompt.strip()
        found = locate(prompt, design.lines)
        assert ["".join(prompt[i] for i in line) for line in found] == list(design.lines), prompt
        assert [line[0] for line in found] == sorted(line[0] for line in found)
        if design.concept is None:
            continue
        where = locate_concept(prompt, name_of(design, language))
        word = "".join(prompt[i] for i in where).lower()
        assert word in {name_of(design, language), plural(name_of(design, language))}, prompt
        if language == "zh":
            assert prompt[where[0] - 1] == "个"


@pytest.mark.parametrize("language", ["en", "zh"])
def test_stated_facts_are_stated_and_others_are_not(language: str) -> None:
    rng = random.Random(4)
    room = wording_zh if language == "zh" else wording_en
    for _ in range(1500):
        design, said = draw(rng, language, count=1)
        design = replace(design, lines=("77",), ground2=None, ground="purple", letters="pink", concept=None)
        prompt = describe(design, said, rng, language).lower()
        ground, letters = ("紫", "粉") if language == "zh" else ("purple", "pink")
        assert (ground in prompt) == said.ground and (letters in prompt) == said.letters, prompt
        assert said.face == any(word in prompt for word in room.FACES[design.face]), (prompt, design)
        assert said.border == any(word in prompt for word in ("边框", "border", "frame")), prompt
        if said.border:
            assert design.border != any(
                word in prompt for word in ("没有边", "无边", "不要边", "no border", "no frame")
            )


def test_the_same_generator_gives_the_same_sentence() -> None:
    design, said = draw(random.Random(1), "en")
    assert describe(design, said, random.Random(5), "en") == describe(design, said, random.Random(5), "en")


def test_many_skeletons_and_none_in_both_sides_of_the_split() -> None:
    design, said = Design((192, 192), ("77",), "red", "white"), Said(letters=False)
    for language in ("en", "zh"):
        rng = random.Random(2)
        trained = {describe(design, said, rng, language) for _ in range(3000)}
        reserved = {describe(design, said, rng, language, True) for _ in range(300)}
        assert len(trained) > 100 and len(reserved) > 20
    assert min(len(wording_en.SKELETONS), len(wording_zh.SKELETONS)) >= 32


@pytest.mark.parametrize(
    ("prompt", "lines", "wanted"),
    [
        ('a sign "A B"', ("A", "B"), ["A", "B"]),
        ("招牌「你好」", ("你", "好"), ["你", "好"]),
        ('"and" and "and"', ("and", "and"), ["and", "and"]),
        ("a sign 'no'", ("yes",), [""]),
        ('change "a" to "b"', ("keep", "b"), ["", "b"]),
        ('"it\'s" on red', ("it's",), ["it's"]),
    ],
)
def test_locate(prompt: str, lines: tuple[str, ...], wanted: list[str]) -> None:
    assert ["".join(prompt[i] for i in line) for line in locate(prompt, lines)] == wanted


def test_repeated_lines_stand_in_different_places() -> None:
    first, second = locate('"and" and "and"', ("and", "and"))
    assert first == [1, 2, 3] and second == [11, 12, 13]


@pytest.mark.parametrize(
    ("prompt", "name", "start"),
    [
        ("a book cover with a book above the text", "book", 20),
        ("an orange sign with an orange", "orange", 23),
        ('a sign "cat" with a dog', "cat", None),
        ("书封面“书”，有一个书", "书", 10),
        ("三个樱桃", "樱桃", 2),
    ],
)
def test_locate_concept(prompt: str, name: str, start: int | None) -> None:
    found = locate_concept(prompt, name)
    assert found == ([] if start is None else list(range(start, start + len(name))))


def test_outside_quotes_knows_all_marks() -> None:
    assert outside_quotes("A red 'one' “two” 「three」 ‘four’ \"five\" don't") == ["a", "red", "don", "t"]


def test_articles_and_plurals() -> None:
    assert [article(name) for name in ("apple", "unicorn", "hourglass", "ufo")] == [
        "an apple",
        "a unicorn",
        "an hourglass",
        "a ufo",
    ]
    names = ("cherry", "fox", "wolf", "glass of milk", "boy", "peach", "potato")
    assert [plural(n) for n in names] == [
        "cherries",
        "foxes",
        "wolves",
        "glasses of milk",
        "boys",
        "peaches",
        "potatoes",
    ]


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("kind", KINDS)
def test_instructions(kind: str, language: str) -> None:
    rng, seen = random.Random(6), set()
    before = Design((192, 192), ("OPEN", "now"), "red", "white", concept=0, border=False)
    after = Design((192, 192), ("OPEN", "later"), "blue", "yellow", None, "serif", "poster", concept=1, side="left",
                   border=True, texture="stripes")  # fmt: skip
    if kind in ("add", "concept_from"):
        before = replace(before, concept=None)
    if kind == "add":
        before = replace(before, lines=after.lines)
    if kind == "remove":
        after = replace(before, concept=None)
    for refs in (1, 2):
        for _ in range(60):
            text = instruct(kind, (before, after), rng, language, refs)
            assert text and "{" not in text and "  " not in text
            seen.add(text)
    assert len(seen) >= 6


@pytest.mark.parametrize("language", ["en", "zh"])
def test_held_out_instructions_are_met_by_nobody(language: str) -> None:
    met, kept = (
        (wording_edits.EDITS, wording_held_out.HELD_OUT_EN)
        if language == "en"
        else (wording_edits_zh.EDITS, wording_held_out.HELD_OUT_ZH)
    )
    assert set(met) == set(kept)
    for form, phrasings in kept.items():
        assert len(phrasings) > 1 and not set(phrasings) & set(met[form])
        assert "{new}" not in "".join(phrasings) or "{new}" in "".join(met[form])
    before = Design((192, 192), ("OPEN", "now"), "red", "white", concept=0)
    after = replace(before, lines=("OPEN", "later"))
    said = {instruct("rewrite", (before, after), random.Random(i), language, 1, True) for i in range(40)}
    plain = {instruct("rewrite", (before, after), random.Random(i), language) for i in range(400)}
    assert len(said) > 2 and not said & plain


def test_a_new_face_of_chinese_is_one_that_looks_new() -> None:
    maker = EditMaker(5)
    for _ in range(30):
        edit = maker.sample(size=(224, 96), kind="face")
        assert (render([edit.sources[0]]) != render([edit.target])).any()
