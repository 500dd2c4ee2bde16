"""Nano's tokenizer: official format, prefixes that pipelines can drop, letters that stay letters."""

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from lanting.text.templates import load_template
from lanting.train.assets import concepts, hanzi
from lanting.train.edits import KINDS
from lanting.train.vocabulary import (
    PREFIXES,
    SPECIALS,
    VOCAB_SIZE,
    build_tokenizer,
    characters,
    outside_quotes,
    template_words,
)
from lanting.train.wording import describe, instruct
from lanting.train.wording_names import plural
from random_designs import draw

SUFFIX = "<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    build_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


@pytest.fixture(scope="module")
def prompts() -> list[str]:
    """1,000 sentences and 1,000 instructions, half of each Chinese."""
    rng, found = random.Random(2), []
    for number in range(1000):
        language = ("en", "zh")[number % 2]
        design, said = draw(rng, language)
        other, _ = draw(rng, language, count=max(1, len(design.lines)))
        design = design if design.lines else replace(design, lines=("OPEN",))
        kind = rng.choice(KINDS)
        if kind in ("remove", "replace", "move"):
            design = replace(design, concept=5)
        if kind == "add":
            other = replace(other, lines=design.lines, concept=7)
        found += [
            describe(design, said, rng, language),
            instruct(kind, (design, replace(other, concept=8)), rng, language, rng.choice((1, 2))),
        ]
    return found


def ids(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False).ids


def tokens(tokenizer: Tokenizer, text: str) -> list[str]:
    return tokenizer.encode(text, add_special_tokens=False).tokens


@pytest.mark.parametrize(("prefix", "count"), PREFIXES)
def test_prefixes_have_the_length_that_pipelines_drop(tokenizer: Tokenizer, prefix: str, count: int) -> None:
    assert count in (34, 64)
    head = ids(tokenizer, prefix)
    assert len(head) == count
    for prompt in (
        "",
        " ",
        "a sign",
        'Picture 1: <|vision_start|><|image_pad|><|vision_end|>"Hi"',
        "你好",
        "\n",
    ):
        assert ids(tokenizer, prefix + prompt + SUFFIX)[:count] == head


def test_prefixes_are_the_templates_of_the_tasks() -> None:
    assert [load_template(name).split("{")[0] for name in ("text-to-image", "edit")] == [
        prefix for prefix, _ in PREFIXES
    ]


@pytest.mark.parametrize("remove", [None, "tokenizer.json"])
def test_transformers_reads_the_same_ids(folder: Path, tokenizer: Tokenizer, prompts, tmp_path, remove) -> None:
    from transformers import Qwen2Tokenizer

    for file in folder.iterdir():
        if file.name != remove:
            (tmp_path / file.name).write_bytes(file.read_bytes())
    official = Qwen2Tokenizer.from_pretrained(tmp_path)
    texts = [PREFIXES[0][0] + prompt + SUFFIX for prompt in [*prompts, " ", "", "写 “你好” é 龘"]]
    assert official(texts)["input_ids"] == [ids(tokenizer, text) for text in texts]
    assert official.pad_token_id == tokenizer.token_to_id("<|endoftext|>")
    assert official.eos_token_id == tokenizer.token_to_id("<|im_end|>")


def test_template_words_are_one_token_behind_a_space(tokenizer: Tokenizer) -> None:
    assert {
        "sign",
        "that",
        "says",
        "handwritten",
        "frame",
        "grey",
        "orange",
        "strawberry",
        "picture",
        "translate",
    } <= set(template_words())
    for word in template_words():
        assert len(ids(tokenizer, " " + word)) == 1
        assert len(ids(tokenizer, word)) == len(word)


def test_training_prompts_use_only_known_words(prompts: list[str]) -> None:
    plurals = {word for concept in concepts() for word in plural(concept.name_en.lower()).split()}
    unknown = {word for prompt in prompts for word in outside_quotes(prompt)} - set(template_words()) - plurals
    assert unknown <= {"english", "chinese"}


def test_every_chinese_character_and_mark_is_one_token(tokenizer: Tokenizer) -> None:
    assert set(hanzi()) | set("，。！？、：；（）《》“”‘’「」￥") <= set(characters())
    for character in characters():
        assert len(ids(tokenizer, character)) == 1
    text = "一块红色的招牌，写着“欢迎光临”。"
    assert tokens(tokenizer, text) != list(text) and len(ids(tokenizer, text)) == len(text)
    assert len(ids(tokenizer, "龘")) == 2 or len(ids(tokenizer, "龘")) == 3


def test_counting_pictures_is_cheap(tokenizer: Tokenizer) -> None:
    assert len(ids(tokenizer, "Picture 1: <|vision_start|><|image_pad|><|vision_end|>Picture 2: ")) == 5


@pytest.mark.parametrize("text", ["HELLO", "sign", "Bread", "a1!?&-'.,%$:", "that"])
def test_quoted_text_is_spelled(tokenizer: Tokenizer, text: str) -> None:
    assert tokens(tokenizer, f'a sign that says "{text}"')[4:] == ['Ġ"', *text, '"']


def test_every_byte_survives(tokenizer: Tokenizer) -> None:
    text = 'Ünï 你好 🙂\t"\\" of the \r\n sign  end '
    assert tokenizer.decode(ids(tokenizer, text)) == text
    assert {len(ids(tokenizer, special)) for special in SPECIALS} == {1}


def test_the_vocabulary_has_its_size(folder: Path, tokenizer: Tokenizer) -> None:
    assert 0 <= VOCAB_SIZE - tokenizer.get_vocab_size() < 64 and VOCAB_SIZE % 64 == 0
    assert sorted(tokenizer.get_vocab().values()) == list(range(tokenizer.get_vocab_size()))
    assert json.loads((folder / "tokenizer_config.json").read_text())["tokenizer_class"] == "Qwen2Tokenizer"


def test_prompts_are_short(tokenizer: Tokenizer, prompts: list[str]) -> None:
    lengths = [len(ids(tokenizer, prompt)) for prompt in prompts]
    assert max(lengths) < 80 and sum(lengths) / len(lengths) < 28
