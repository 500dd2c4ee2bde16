"""Several devices in one word: "cuda:0,cuda:1", "cuda:all", "cpu,cpu". No torch: plans are made for them, too."""

from __future__ import annotations

from lanting.core.errors import RequestError

ALL = "cuda:all"
MOST = 16  # devices of one picture
KINDS = ("cuda", "cpu")


def names_of(asked: str | None, cards: int) -> tuple[str, ...]:
    """The devices of a word, the one that leads first; the word itself where it names one, nothing where it is None.

    cards  CUDA devices of this machine
    Whether they are there is not looked at. Raises RequestError where they can't draw one picture together.
    """
    if asked is None:
        return ()
    if asked == ALL:
        return tuple(f"cuda:{index}" for index in range(min(cards, MOST))) or ("cuda",)
    if "," not in asked:
        return (asked,)
    words = [word.strip() for word in asked.split(",")]
    words = ["cuda:0" if word == "cuda" else word for word in words]
    kinds = {word.partition(":")[0] for word in words}
    if any(not known(word) for word in words) or len(kinds) > 1:
        raise RequestError(
            "one picture can't be drawn on {devices}: give CUDA devices, as cuda:0,cuda:1, or cpu,cpu", devices=asked
        )
    if kinds == {"cuda"} and len(set(words)) < len(words):
        raise RequestError("{devices} names a GPU twice: name each once", devices=asked)
    if len(words) > MOST:
        raise RequestError("{count} devices are too many for a picture: give up to {most}", count=len(words), most=MOST)
    return tuple(words)


def known(word: str) -> bool:
    """Whether a word is one of several devices'."""
    kind, colon, index = word.partition(":")
    return (kind == "cpu" and not colon) or (kind == "cuda" and index.isdecimal() and index == str(int(index)))
