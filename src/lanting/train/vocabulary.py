"""The tokenizer of a tiny Qwen-Image model: the official format and specials, a few thousand entries.

A tiny model must spell, so text is bytes. A Chinese character and a Chinese mark are one token each, grown from
their bytes; nothing ever merges across characters. Only the words of the prompts and the names of the pictograms
are whole English tokens, and only behind a space, which is what the letters of a quoted text do not stand behind.
Growing a word letter by letter makes its beginnings tokens too; they are most of the entries. Pipelines drop a
fixed count of tokens in front of the prompt (34 for pictures from text, 64 for edits). Bytes would make those
prefixes far longer, so most of each system message is one added token and just enough of its end stays bytes.
Rejected: byte-pair merges learnt from text, as they hide the letters.
"""

import json
import re
from functools import cache
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from lanting.train.assets import concepts, hanzi
from lanting.train.wording import outside_quotes, wording_words

WHOLE_NAMES: int | None = None  # pictograms whose English names are whole tokens, commonest first; None: all
ROUND = 64  # the embedding's rows are a multiple of this
HANZI_MARKS = "，。！？、：；（）《》“”‘’「」￥"
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)  # Qwen2's own pre-tokenizer
PAD, END = "<|endoftext|>", "<|im_end|>"
SPECIALS = (
    PAD,
    "<|im_start|>",
    END,
    *(f"<|{name}_{edge}|>" for name in ("object_ref", "box", "quad", "vision") for edge in ("start", "end")),
    *(f"<|{name}_pad|>" for name in ("vision", "image", "video")),
)
MARKERS = (
    *("<tool_call>", "</tool_call>"),
    *(f"<|{name}|>" for name in ("fim_prefix", "fim_middle", "fim_suffix", "fim_pad", "repo_name", "file_sep")),
)
PICTURES = tuple(f"Picture {number}: " for number in (1, 2, 3))  # how the edit template counts pictures
_FRAME = "<|im_start|>system\n{}<|im_end|>\n<|im_start|>user\n"
_DESCRIBE = (
    "Describe the image by detailing the color, shape, size, texture, quantity, text, spatial relationships "
    "of the objects and background:"
)
_EDIT = (
    "Describe the key features of the input image (color, shape, size, texture, objects, background), then "
    "explain how the user's text instruction should alter or modify the image. Generate a new image that "
    "meets the user's requirements while maintaining consistency with the original input where appropriate."
)
PREFIXES = ((_FRAME.format(_DESCRIBE), 34), (_FRAME.format(_EDIT), 64))  # text, tokens that pipelines drop


def template_words() -> list[str]:
    """Every English word that is one token behind a space, sorted: those of the wording and of all pictograms."""
    names = " ".join(concept.name_en.lower() for concept in concepts()[:WHOLE_NAMES])
    return sorted({*wording_words(), *re.findall(r"(?<![a-z0-9])[a-z]+", names)})


def characters() -> list[str]:
    """The Chinese characters and marks that are one token, commonest first."""
    names = (character for concept in concepts() for character in concept.name_zh if ord(character) > 0x2000)
    return list(dict.fromkeys([*HANZI_MARKS, *hanzi().strip(), *names]))


def byte_symbols() -> list[str]:
    """The printable stand-in of each byte 0..255 in a byte-level vocabulary (GPT-2's table)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spare = iter(range(256, 512))
    return [chr(byte if byte in plain else next(spare)) for byte in range(256)]


def _merges(words: list[str], characters: list[str]) -> list[tuple[str, str]]:
    """Merges that grow characters from their bytes, and ` word` from its space letter by letter.

    Inside a word nothing ever merges: all beginnings hold the space.
    """
    symbols = byte_symbols()
    space = symbols[ord(" ")]
    pairs: dict[tuple[str, str], None] = {(space, '"'): None}
    for unit in [*characters, *(" " + word for word in words)]:
        first, *rest = (symbols[byte] for byte in unit.encode())
        for symbol in rest:
            pairs[first, symbol] = None
            first += symbol
    return list(pairs)


@cache
def _vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """(ids, merges) of the byte pairs: bytes, then merges in their order."""
    merges = _merges(template_words(), characters())
    return {token: i for i, token in enumerate([*byte_symbols(), *(a + b for a, b in merges)])}, merges


def vocabulary_size() -> int:
    """Rows of the embedding: the number of entries, rounded up to a multiple of `ROUND`."""
    used = len(_vocabulary()[0]) + len(SPECIALS) + len(MARKERS) + len(PICTURES) + 1 + len(PREFIXES)
    return -(-used // ROUND) * ROUND


VOCAB_SIZE = vocabulary_size()


def make_tokenizer() -> Tokenizer:
    """The tokenizer in memory. Raises `ValueError` if it is too large or a prefix misses its length."""
    vocab, merges = _vocabulary()
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, fuse_unk=False, byte_fallback=False))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in SPECIALS])
    heads = [_head(tokenizer, text, count) for text, count in PREFIXES]
    plain = [*MARKERS, "assistant\n", *heads, *PICTURES]
    tokenizer.add_tokens([AddedToken(text, normalized=False, special=False) for text in plain])
    counts = [len(tokenizer.encode(text, add_special_tokens=False)) for text, _ in PREFIXES]
    if tokenizer.get_vocab_size() > VOCAB_SIZE or counts != [count for _, count in PREFIXES]:
        raise ValueError(f"vocabulary of {tokenizer.get_vocab_size()} entries, prefixes of {counts} tokens")
    return tokenizer


def _head(tokenizer: Tokenizer, prefix: str, count: int) -> str:
    """The longest beginning of the system message that, as one token, leaves `count` tokens in the prefix."""
    start, stop = prefix.index("system\n"), prefix.index("<|im_end|>")
    around = len(tokenizer.encode(prefix[:start] + prefix[stop:], add_special_tokens=False))
    for cut in range(stop - 1, start, -1):
        if around + 1 + len(tokenizer.encode(prefix[cut:stop], add_special_tokens=False)) == count:
            return prefix[start:cut]
    raise ValueError(f"no beginning of the system message leaves {count} tokens")


def build_tokenizer(folder: Path) -> Tokenizer:
    """Write the tokenizer as the six files of an official `tokenizer/` folder; returns it."""
    tokenizer = make_tokenizer()
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    tokenizer.model.save(str(folder))  # vocab.json, merges.txt
    added = tokenizer.get_added_tokens_decoder()
    entries = {
        str(index): {
            "content": token.content,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": token.special,
        }
        for index, token in sorted(added.items())
    }
    extra = list(SPECIALS[1:])
    config = {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": entries,
        "additional_special_tokens": extra,
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": END,
        "errors": "replace",
        "model_max_length": 131072,
        "pad_token": PAD,
        "padding_side": "right",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    _write(folder / "tokenizer_config.json", config)
    _write(folder / "added_tokens.json", {token.content: index for index, token in sorted(added.items())})
    special = {"additional_special_tokens": extra, "eos_token": END, "pad_token": PAD}
    _write(folder / "special_tokens_map.json", special)
    return tokenizer


def _write(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


__all__ = [
    "PREFIXES",
    "SPECIALS",
    "VOCAB_SIZE",
    "build_tokenizer",
    "byte_symbols",
    "characters",
    "make_tokenizer",
    "outside_quotes",
    "template_words",
]
