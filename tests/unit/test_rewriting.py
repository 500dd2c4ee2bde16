"""Rewritten prompts: what may be drawn in place of what was asked, and who may ask for it. No model writes here."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from lanting.core import rewriting
from lanting.core.checkpoint import Checkpoint
from lanting.core.errors import RequestError
from lanting.core.quotes import quoted
from lanting.core.recipe import describe_request, from_json, infotext, request_of_picture, restore_request, to_json
from lanting.core.rewriting import Written, aside, fault, language_of, taken_up, tidy
from lanting.core.types import Recipe, Request, Result
from lanting.plan import Device, cards, detect, job_of, machine_of, plan, release, usual_job
from lanting.plan.costs import Bill, Way
from lanting.plan.job import ASKED
from lanting.plan.kinds import KINDS
from lanting.specs import get_spec, settle, spec_names
from lanting.specs.rewriting import may_rewrite
from lanting.text.templates import IMAGE_PAD, fill, load_template, takes_pictures
from lanting.text.tokenizer import load_tokenizer

LANGUAGES = ("en", "zh")
WRITER = get_spec("qwen-image")


# ---------------------------------------------------------------- what is tidied
@pytest.mark.parametrize(
    ("asked", "said", "words"),
    [
        ("a cat", "  A tabby cat sleeps.\n", "A tabby cat sleeps."),
        ("a cat", "Here is the rewritten prompt:\n\nA tabby cat sleeps.", "A tabby cat sleeps."),
        ("a cat", "Sure! Here's a more detailed description: A tabby cat sleeps.", "A tabby cat sleeps."),
        ("a cat", "**Description:** A **tabby** cat sleeps.", "A tabby cat sleeps."),
        ("a cat", "```text\nA tabby cat sleeps.\n```", "A tabby cat sleeps."),
        ("a cat", '"A tabby cat sleeps."', "A tabby cat sleeps."),
        ("a cat", "“A tabby cat sleeps.”", "A tabby cat sleeps."),
        ('a sign "OPEN"', '"A red sign that reads "OPEN"."', 'A red sign that reads "OPEN".'),
        ('a sign "OPEN"', '"OPEN"', '"OPEN"'),
        ("a cat", "A tabby cat sleeps.\n\nLight falls in.", "A tabby cat sleeps. Light falls in."),
        ("a cat", "- A tabby cat sleeps.", "A tabby cat sleeps."),
        ("一只猫", "好的，以下是改写后的描述：\n一只橘猫。\n阳光照进来。", "一只橘猫。阳光照进来。"),
        ("一只猫", "提示词：一只橘猫。", "一只橘猫。"),
        ('a poem "one\ntwo"', 'A page with "one\ntwo"\non it', 'A page with "one\ntwo" on it'),
        ("a poster", "This is a poster: big letters", "This is a poster: big letters"),
        ("description: a cat", "Description: a tabby cat", "Description: a tabby cat"),
        ("stars", 'Five "**" and **more**', 'Five "**" and more'),
    ],
)
def test_answers_are_tidied(asked, said, words):
    assert tidy(said, asked) == words


# ---------------------------------------------------------------- what is refused
@pytest.mark.parametrize(
    ("asked", "words", "reason"),
    [
        ("a cat", "", rewriting.EMPTY),
        ("a cat", " \n", rewriting.EMPTY),
        ("a cat", "A cat<|im_end|>", rewriting.MARKS),
        ("a cat", "A cat <|image_pad|>", rewriting.MARKS),
        ("a cat", "A cat <im_start>user", rewriting.MARKS),
        ("a cat", "# A cat A cat sleeps", rewriting.MARKS),
        ("a cat", "A cat ```code```", rewriting.MARKS),
        ("a cat", "A <b>cat</b>", rewriting.MARKS),
        ("a cat", "A [cat](http://cat)", rewriting.MARKS),
        ("a cat", "A cat \ufffd", rewriting.MARKS),
        ("a cat", "A cat\x1b[31m", rewriting.MARKS),
        ("a cat", "- A cat\n- A sofa", rewriting.LISTED),
        ("a cat", "1. A cat\n2. A sofa", rewriting.LISTED),
        ("a cat", "I'm sorry, I can't help with that.", rewriting.DECLINED),
        ("一只猫", "抱歉，我无法描述。", rewriting.DECLINED),
        ('a sign "OPEN"', "A red sign that reads OPEN", rewriting.QUOTES),
        ('a sign "OPEN"', 'A red sign that reads "Open"', rewriting.QUOTES),
        ('a sign "OPEN"', 'A red sign that reads "OPEN" and "24 h"', rewriting.QUOTES),
        ('"and" or "and"', 'The word "and"', rewriting.QUOTES),
        ("a sign", 'A red sign that reads "OPEN"', rewriting.QUOTES),
        ('a sign "OPEN"', 'A red sign that reads "OPEN" above "24 h', rewriting.QUOTES),
        ("招牌“茶馆”", "木招牌上写着“茶館”", rewriting.QUOTES),
        ("招牌“茶馆”", "木招牌上写着“茶馆”，旁边有“酒", rewriting.QUOTES),
        ("一只猫", "A tabby cat sleeps.", rewriting.SCRIPT),
        ("a cat", "一只橘猫。", rewriting.SCRIPT),
        ("a cat", "A cat 猫 sleeps", rewriting.SCRIPT),
        ("кошка", "A cat sleeps", rewriting.SCRIPT),
        ("猫の絵", "一只橘猫的画。", rewriting.SCRIPT),
        ("a cat", "1 2 3", rewriting.SCRIPT),
        ("a cat", "A " * 6000, rewriting.ENDLESS),
    ],
)
def test_what_may_spoil_a_picture_is_refused(asked, words, reason):
    assert fault(asked, words) == reason


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ("a cat", "A tabby cat's bowl stands on the floor"),
        ('a sign "OPEN"', 'A red sign that reads “OPEN”; the letters of "OPEN" are white'),
        ('a sign "茶馆"', 'A wooden sign that reads "茶馆"'),
        ("招牌“OPEN 24 h”", "木招牌上写着“OPEN 24 h”，白色的字"),
        ("a T恤", "一件白色的T恤"),
        ("кошка", "Полосатая кошка спит"),
        ("猫の絵", "窓辺で眠る猫の絵"),
        ("**", "stars"),
        ("3 stars", "3. stars stand in a row"),
    ],
)
def test_good_answers_are_taken(asked, words):
    assert fault(asked, tidy(words, asked)) == ""


@pytest.mark.parametrize(
    ("prompt", "language"),
    [
        ("a cat", "en"),
        ("一只猫", "zh"),
        ('a sign "茶馆"', "en"),
        ("招牌“OPEN”", "zh"),
        ("“茶馆”", "zh"),
        ('"OPEN"', "en"),
        ("猫の絵", "en"),
        ("", "en"),
    ],
)
def test_the_words_around_quotes_say_which_language(prompt, language):
    assert language_of(prompt) == language


TEXTS = st.text(st.characters(exclude_categories=("Cs",)), max_size=60)
MARKS = (('"', '"'), ("“", "”"), ("「", "」"), ("『", "』"))


@given(asked=TEXTS, said=TEXTS)
def test_nothing_passes_with_other_lettering(asked, said):
    """Whatever is asked and answered: what passes quotes the same texts and holds no marks of a chat."""
    words = tidy(said, asked)
    if not fault(asked, words):
        assert words.strip() and set(quoted(words)) == set(quoted(asked))
        assert "<|" not in words or "|" not in words.partition("<|")[2]


LETTERING = st.lists(st.text("ab C1", min_size=1, max_size=6).filter(str.strip), max_size=3, unique_by=str.strip)


@given(texts=LETTERING, marks=st.sampled_from(MARKS), drop=st.booleans())
def test_kept_lettering_passes_and_lost_does_not(texts, marks, drop):
    told = [f"{marks[0]}{text}{marks[1]}" for text in texts]
    asked = " ".join(["a sign that says", *told])
    answer = " ".join(["a wooden sign in the evening sun that says", *(told[1:] if drop else told)])
    assert (fault(asked, tidy(answer, asked)) == rewriting.QUOTES) == (drop and bool(told))


@given(said=TEXTS, asked=TEXTS)
def test_tidying_twice_changes_no_lettering(said, asked):
    once = tidy(said, asked)
    if not fault(asked, once):
        assert set(quoted(tidy(once, asked))) == set(quoted(once))


# ---------------------------------------------------------------- how it is asked
@pytest.mark.parametrize("language", LANGUAGES)
def test_templates_are_chats_with_their_places(language):
    for kind, pictures in (("", 0), ("edit-", 2)):
        template = load_template(f"rewrite-{kind}{language}")
        assert takes_pictures(template) == bool(pictures)
        text = fill(template, "a cat", [3] * pictures)
        assert re.fullmatch(
            r"<\|im_start\|>system\n.+<\|im_end\|>\n<\|im_start\|>user\n.+a cat<\|im_end\|>\n<\|im_start\|>assistant\n",
            text,
            re.DOTALL,
        )
        assert text.count(IMAGE_PAD) == 3 * pictures and "{" not in text
        assert text.count("<|im_start|>") == text.count("<|im_end|>") + 1 == 3


# ---------------------------------------------------------------- who may ask
def test_only_who_can_write_is_asked_to():
    able = {name for name in spec_names() if get_spec(name).writes}
    assert "nano" not in able and not any("2.1" in name for name in able)
    assert {"qwen-image", "qwen-image-2512", "qwen-image-edit-2511", "qwen-image-lightning-4"} <= able
    for name in ("nano", "qwen-image-2.1"):
        with pytest.raises(RequestError, match=r"can't rewrite prompts: its text encoder has no lm_head\.weight"):
            settle(Request("a cat", rewrite=True), get_spec(name))
        assert settle(Request("a cat", rewrite=False), get_spec(name)).rewrite is False


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"rewrite": "yes"}, "rewrite must be true or false"),
        ({"rewrite": 1}, "rewrite must be true or false"),
        ({"asked": ("a", "b")}, "does not fit"),
        ({"asked": 5}, "does not fit"),
        ({"unwritten": "x" * 10_001}, "does not fit"),
        ({"prompt": ("a", "b"), "asked": "a"}, "does not fit"),
        ({"prompt": ("a", "b"), "asked": ("a",)}, "does not fit"),
    ],
)
def test_wrong_values_are_a_sentence(values, words):
    with pytest.raises(RequestError, match=words):
        settle(Request(**{"prompt": "a cat", **values}), WRITER)


def test_nothing_to_rewrite_is_a_sentence():
    picture = Image.new("RGB", (64, 64))
    with pytest.raises(RequestError, match="no words to rewrite"):
        settle(Request(" ", task="image_to_image", images=(picture,), rewrite=True), WRITER)
    with pytest.raises(RequestError, match="layers have no prompt"):
        settle(Request("", images=(picture,), rewrite=True), get_spec("qwen-image-layered"))
    assert not may_rewrite(Request(""), WRITER) and may_rewrite(Request("a"), WRITER)
    assert not may_rewrite(Request("a"), get_spec("qwen-image-layered")) and not may_rewrite(
        Request("a"), get_spec("nano")
    )


# ---------------------------------------------------------------- recipes
def rewritten(**values) -> Request:
    settled = settle(Request(("a cat", "a dog"), seed=5, count=2), WRITER)
    return replace(
        settled, prompt=("a tabby cat", "a dog"), asked=("a cat", "a dog"), unwritten=("", "it declined"), **values
    )


def test_a_recipe_has_what_was_asked_and_what_was_drawn():
    each = [describe_request(request_of_picture(rewritten(), index)) for index in range(4)]
    assert [one["prompt"] for one in each] == ["a tabby cat"] * 2 + ["a dog"] * 2
    assert [one["asked"] for one in each] == ["a cat"] * 2 + ["a dog"] * 2
    assert [one.get("unwritten") for one in each] == [None, None, "it declined", "it declined"]
    assert all("rewrite" not in one for one in each)
    recipe = Recipe(each[0], "qwen-image", "w", "text_to_image", {})
    assert from_json(to_json(recipe)) == recipe
    again = settle(restore_request(each[0]), WRITER)
    assert (again.prompt, again.asked, again.rewrite) == ("a tabby cat", "a cat", False)
    assert describe_request(again) == each[0]
    assert 'Asked: "a cat"' in infotext(recipe) and infotext(recipe).startswith("a tabby cat\n")


def test_without_the_wish_nothing_is_recorded():
    table = describe_request(settle(Request("a cat", seed=1), WRITER))
    assert not {"rewrite", "asked", "unwritten"} & set(table)
    wish = describe_request(Request("a cat", rewrite=True))
    assert wish["rewrite"] is True and restore_request(wish).rewrite is True


def test_files_are_named_from_what_was_asked(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    table = describe_request(request_of_picture(rewritten(), 0))
    result = Result((Image.new("RGB", (8, 8)),), (Recipe(table, "m", "w", "text_to_image", {}),), {})
    assert result.save()[0].name.startswith("a-cat")


def test_a_checkpoint_keeps_the_words():
    words = (Written("一只猫" * 300), Written("a dog", "it declined")) * 32
    state = Checkpoint(1, 2, "m", "float32", (1, 1, 1), b"0000", {"steps": "", **aside(words)})
    assert taken_up(Checkpoint.from_bytes(state.to_bytes()).choices) == words
    assert aside(None) == {} and taken_up({}) is None
    for broken in (5, [5], [["a"]], [["a", 5]], [["a", "b", "c"]], [["x" * 10_001, ""]]):
        assert taken_up({"written": broken}) is None


# ---------------------------------------------------------------- plans
HEAD = 2 * 152_064 * 3_584  # bytes of the 7B's in 16 bits


@pytest.mark.parametrize("name", ["qwen-image", "qwen-image-edit-2511"])
def test_plans_count_the_head_where_it_writes(name):
    model, way = release(get_spec(name)), KINDS["bf16"]
    without, with_it = (model.reader(way, "bfloat16", True, writes).every for writes in (False, True))
    assert with_it - without == HEAD
    asked = Request("a cat", images=(Image.new("RGB", (64, 64)),) if "edit" in name else ())
    plain, wish = (job_of(settle(replace(asked, rewrite=one), model.spec), model) for one in (None, True))
    assert plain == replace(wish, writes=False, text=plain.text) and wish.writes and wish.text == 512
    machine = machine_of(cards()[0])
    costs = [plan(model, one, machine) for one in (plain, wish)]
    assert costs[1].peak_vram > costs[0].peak_vram or costs[1].peak_ram > costs[0].peak_ram
    assert costs[1].image_seconds > costs[0].image_seconds


def test_a_budget_that_only_reading_fits_is_none_for_writing():
    """Where the text encoder alone decides, the head is what is missing."""
    model = release(WRITER)
    job = replace(usual_job(model, None), text=300)
    bills = [
        Bill(model, replace(job, writes=writes), detect(), Device("cpu", "cpu", 1 << 40, 1 << 40))
        for writes in (False, True)
    ]
    way = Way(KINDS["int4"], KINDS["bf16"], 60, "none", True, "unload", "ram", 0)
    before, after = (bill.peaks(way)[1] for bill in bills)
    assert HEAD < after - before < 1.2 * HEAD + (250 + 600) * 500_000


def test_the_planner_knows_how_long_its_question_is(tokenizer_folder):
    tokenizer = load_tokenizer(tokenizer_folder)
    names = [f"rewrite-{kind}{language}" for kind in ("", "edit-") for language in LANGUAGES]
    longest = max(len(tokenizer.encode(fill(load_template(name), "", [1])).ids) for name in names)
    assert longest <= ASKED <= longest + 10
