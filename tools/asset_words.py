"""Characters and phrases by use, from the frequency dictionary of jieba (MIT)."""

import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

DICT = "python3-jieba/usr/lib/python3/dist-packages/jieba/dict.txt"
UNFIT = Path(__file__).with_name("unfit_zh.txt")  # pieces of words that have no place on a sign for everyone
KINDS = {"n", "v", "a", "i", "l", "vn", "d", "t", "b", "s", "ad", "an", "o"}  # parts of speech, as jieba names them
TRADITIONAL = "後於麽"  # in GB 2312 only as names
QUOTAS = {1: 500, 2: 11_000, 3: 4_000, 4: 4_500, 5: 900, 6: 400, 7: 400, 8: 200}


def read_words(packages: Path) -> list[tuple[str, int, str]]:
    """(word, count, part of speech) of every entry."""
    lines = (packages / DICT).read_text(encoding="utf-8").splitlines()
    return [(word, int(count), kind) for word, count, kind in (line.split(" ") for line in lines)]


def most_used(words: Iterable[tuple[str, int, str]], covered: set[int], always: str, limit: int) -> str:
    """The ``limit`` most used simplified characters, most used first; those of ``always`` are among them in any case.

    A character's use is the sum of the counts of the words it stands in. Simplified is what GB 2312 encodes.
    """
    use: Counter[str] = Counter()
    alone: dict[str, int] = {}
    for word, count, _ in words:
        if len(word) == 1:
            alone[word] = count
        for char in word:
            use[char] += count
    kept = [
        char
        for char in use
        if ord(char) in covered and _simplified(char) and not _misread(char, alone.get(char, 0) / use[char])
    ]
    kept.sort(key=lambda char: (char not in always, -use[char], char))
    return "".join(sorted(kept[:limit], key=lambda char: (-use[char], char)))


def phrases(words: Iterable[tuple[str, int, str]], hanzi: str) -> list[str]:
    """Words of 1-8 characters of ``hanzi``, most used first, ``QUOTAS`` of each length.

    Names of people, places, bodies and brands, numbers, and words with anything of ``unfit_zh.txt`` are left out.
    """
    drawn, unfit = set(hanzi), re.compile("|".join(UNFIT.read_text(encoding="utf-8").split()))
    chosen: list[tuple[int, str]] = []
    left = dict(QUOTAS)
    for word, count, kind in sorted(words, key=lambda entry: (-entry[1], entry[0])):
        if kind not in KINDS or not drawn.issuperset(word) or unfit.search(word) or not left.get(len(word)):
            continue
        left[len(word)] -= 1
        chosen.append((count, word))
    return [word for _, word in chosen]


def _misread(char: str, alone: float) -> bool:
    """Whether a count comes from UTF-8 text that was read as GBK: half a common character, and in hardly any word."""
    lead, trail = char.encode("gb2312")
    return alone > 0.8 and 0xE4 <= lead <= 0xEF and trail <= 0xBF


def _simplified(char: str) -> bool:
    if not re.match(r"[\u4e00-\u9fff]", char) or char in TRADITIONAL:
        return False
    try:
        char.encode("gb2312")
    except UnicodeEncodeError:
        return False
    return True
