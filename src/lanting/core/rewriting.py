"""What a language model made of a prompt: tidied where that is harmless, refused where it may spoil the picture.

A picture must never get worse in silence, so what is checked is what can be checked: that quoted words, which are the
lettering of the picture, are all there, letter by letter, and no others; that the answer is words and nothing else, of
a length that is read, in the script it was asked in. Whether it means what was asked is not checked: nothing here
could judge that. Rejected: mending quotes, which puts words where the model did not mean them.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from lanting.core.quotes import QUOTED, quoted
from lanting.core.types import note

LONGEST = 10_000  # characters, as of every prompt
# notes, so that whoever reads them does so in their language
EMPTY = note("the answer was empty").sentence
MARKS = note("the answer held marks that are no words").sentence
LISTED = note("the answer was a list").sentence
DECLINED = note("the text encoder declined").sentence
QUOTES = note("quoted words were changed, left out or added").sentence
SCRIPT = note("the answer was in another script").sentence
ENDLESS = note("the answer was too long").sentence
LONG = note("the prompt is as long as prompts may be").sentence

FENCED = re.compile(r"\A```[^\n`]*\n?(.*?)\n?```\Z", re.DOTALL)
CHAT = re.compile(r"<\|[^|]*\||<(?:im_start|im_end|endoftext)>|\ufffd")
LAYOUT = re.compile(r"```|\*\*|__|^\s{0,3}#{1,6}\s|</?[a-zA-Z][^<>]*>|\]\(", re.MULTILINE)
ITEM = re.compile(r"^\s*(?:[-*•·]\s+|\d{1,2}[.)]\s+|\d{1,2}、)(?=\S)", re.MULTILINE)
NOD = r"\A(?:sure(?: thing)?|certainly|absolutely|of course|okay|好的|当然(?:可以)?|没问题)\s*[!！.。,，:：]+\s*"
KINDS = "prompts?|descriptions?|instructions?|versions?|captions?|rewrites?|answer|output|response"
SORTS = (
    "the|your|my|an?|new|final|revised|rewritten|improved|detailed|expanded|enhanced|full|edit(?:ing)?|image|picture"
)
HERE = "here(?:'s|’s| is)|this is|below is|the following is"
TITLE = rf"\A(?:(?:{HERE})\b[^\n:：\"“]{{0,80}}?\b|(?:(?:{SORTS})\s+)*)(?:{KINDS})"
OPENINGS = (
    re.compile(NOD, re.IGNORECASE),
    re.compile(TITLE + r"\b[^\n:：\"“.]{0,40}[:：]\s*", re.IGNORECASE),
    re.compile(
        r"\A[^\n:：“”\"「」。，]{0,24}(?:提示词|描述|指令|版本|如下|结果|回答|答案|说明)[^\n:：“”\"「」。]{0,8}[:：]\s*"
    ),
)
REFUSAL = re.compile(
    r"\A\W*(?:i(?:'m|’m| am) sorry|sorry,|i (?:can(?:'t|’t|not)|am unable|won(?:'t|’t))|as an ai|unfortunately, i"
    r"|抱歉|对不起|很遗憾|我(?:无法|不能|没法)|作为(?:一个)?(?:人工智能|AI|语言模型))",
    re.IGNORECASE,
)
PAIRS = (('"', '"'), ("“", "”"), ("「", "」"), ("『", "』"), ("'", "'"), ("‘", "’"))
STRAY = re.compile(r"[\"“”「」『』]")
SCRIPTS = {
    "CJK": "han",
    "HIRAGANA": "kana",
    "KATAKANA": "kana",
    "KATAKANA-HIRAGANA": "kana",
}  # others by the first word of a letter's name


@dataclass(frozen=True, slots=True)
class Written:
    """What is drawn instead of a prompt, or with a reason the prompt itself."""

    words: str
    reason: str = ""


def around_quotes(text: str) -> str:
    """The text without what it quotes; all of it where it is nothing but quotes."""
    rest = QUOTED.sub(" ", text)
    return rest if any(letter.isalpha() for letter in rest) else text


def scripts(text: str) -> Counter[str]:
    """Letters outside quotes, counted by script."""
    names = (unicodedata.name(letter, "").partition(" ")[0] for letter in around_quotes(text) if letter.isalpha())
    return Counter(SCRIPTS.get(name, name) for name in names)


def language_of(prompt: str) -> str:
    """'zh' where the words around quotes have Chinese characters (and are not Japanese), else 'en'."""
    found = scripts(prompt)
    return "zh" if found["han"] and not found["kana"] else "en"


def tidy(said: str, asked: str) -> str:
    """An answer as one paragraph, without a fence, opening phrases, bold type and marks around the whole."""
    text = said.strip()
    if fenced := FENCED.match(text):
        text = fenced[1].strip()
    text = outside(text, re.compile(r"\*\*|__"), "").strip()
    for opening in OPENINGS:
        found = opening.match(text)
        if found and found.end() < len(text) and not opening.match(asked):
            text = text[found.end() :]
    text = unwrapped(text, asked)
    if "\n" not in text and not ITEM.match(asked):
        text = ITEM.sub("", text, count=1) if ITEM.match(text) else text
    if ITEM.search(text):
        return text  # a list: `fault` says so
    return outside(text, re.compile(r"\s*\n\s*"), "" if language_of(text) == "zh" else " ").strip()


def outside(text: str, pattern: re.Pattern[str], new: str) -> str:
    """`pattern` replaced where it is not quoted."""
    parts, end = list[str](), 0
    for match in QUOTED.finditer(text):
        parts += [pattern.sub(new, text[end : match.start()]), match[0]]
        end = match.end()
    return "".join([*parts, pattern.sub(new, text[end:])])


def unwrapped(text: str, asked: str) -> str:
    """Without quotation marks around the whole answer; those of quoted words stay."""
    for first, last in PAIRS:
        if len(text) > 2 and text[0] == first and text[-1] == last:
            inside = text[1:-1].strip()
            if not same_quotes(asked, text) and same_quotes(asked, inside):
                return inside
    return text


def same_quotes(asked: str, words: str) -> bool:
    """Whether everything quoted in `asked` is quoted in `words`, as often at least, letter by letter, nothing else is,
    and no quotation mark is left open."""
    wanted, found = Counter(quoted(asked)), Counter(quoted(words))
    stray = len(STRAY.findall(QUOTED.sub("", words))) > len(STRAY.findall(QUOTED.sub("", asked)))
    return wanted <= found and set(found) <= set(wanted) and not stray


def same_script(asked: str, words: str) -> bool:
    """Chinese stays Chinese, and everything else what it mostly is, without Chinese characters it had not."""
    before, after = scripts(asked), scripts(words)
    if not before:
        return True
    if language_of(asked) == "zh":
        return language_of(words) == "zh" and after["han"] >= after["LATIN"]
    if before["kana"]:
        return after["kana"] > 0
    if after["han"] and not before["han"]:
        return False
    return bool(after) and max(after, key=lambda name: after[name]) == max(before, key=lambda name: before[name])


def fault(asked: str, words: str) -> str:
    """Why an answer can't be drawn in place of `asked`, in a few words; "" where it can."""
    if not words.strip():
        return EMPTY
    if len(words) > LONGEST:
        return ENDLESS
    if REFUSAL.match(words) and not REFUSAL.match(asked):
        return DECLINED
    plain, before = QUOTED.sub("", words), QUOTED.sub("", asked)
    if ITEM.search(plain) and "\n" in plain:
        return LISTED
    if not same_quotes(asked, words):
        return QUOTES
    if CHAT.search(words) or len(LAYOUT.findall(plain)) > len(LAYOUT.findall(before)):
        return MARKS
    if any(unicodedata.category(letter) in ("Cc", "Cs", "Co") and letter not in "\n\t" for letter in words):
        return MARKS
    return "" if same_script(asked, words) else SCRIPT


def aside(written: Sequence[Written] | None) -> dict[str, Any]:
    """What a checkpoint keeps of it."""
    return {} if written is None else {"written": [[one.words, one.reason] for one in written]}


def taken_up(choices: Mapping[str, Any]) -> tuple[Written, ...] | None:
    """The inverse; None where nothing was written, or it can't be read."""
    rows: Any = choices.get("written")
    if not isinstance(rows, list):
        return None
    found = [tuple(cast("list[Any]", row)) for row in cast("list[Any]", rows) if isinstance(row, list)]
    sound = len(found) == len(cast("list[Any]", rows)) and all(
        len(row) == 2 and all(isinstance(text, str) and len(text) <= LONGEST for text in row) for row in found
    )
    return tuple(Written(*row) for row in found) if sound else None
