"""Load the Qwen2 tokenizer of a model folder, with the same ids as transformers' Qwen2Tokenizer.

Qwen-Image publishes its tokenizer as vocab.json, merges.txt and a list of added tokens; newer files are one
tokenizer.json. Both give a plain `tokenizers.Tokenizer`: nothing here needs a class of its own.
"""

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE

from lanting.core.errors import ModelError

# Qwen2 splits numbers into single digits and keeps a leading space or sign with a word.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


def load_tokenizer(folder: Path) -> Tokenizer:
    """Read tokenizer.json, or vocab.json + merges.txt + tokenizer_config.json. Raises ModelError."""
    try:
        if (folder / "tokenizer.json").is_file():
            return whole(Tokenizer.from_file(str(folder / "tokenizer.json")))
        bpe = BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
    except Exception as error:  # the library raises bare Exception for missing and for damaged files
        raise ModelError(
            "the tokenizer in {folder} can't be read ({error}); download the model's tokenizer folder again",
            folder=folder,
            error=error,
        ) from error
    tokenizer = Tokenizer(bpe)
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    for number, token in sorted(added_tokens(folder).items()):
        tokenizer.add_tokens([token])
        if tokenizer.token_to_id(token.content) != number:
            raise ModelError(
                "the tokenizer in {folder} numbers {token} as {number}, which its vocabulary doesn't allow;"
                " download the model's tokenizer folder again",
                folder=folder,
                token=token.content,
                number=number,
            )
    return tokenizer


def whole(tokenizer: Tokenizer) -> Tokenizer:
    """One that neither cuts nor pads: transformers saves with a tokenizer how it was called last."""
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def added_tokens(folder: Path) -> dict[int, AddedToken]:
    """Added tokens by id, from tokenizer_config.json or the older added_tokens.json (all of them special)."""
    config: dict[str, Any] = {}
    if (folder / "tokenizer_config.json").is_file():
        config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    if decoder := config.get("added_tokens_decoder"):
        return {int(number): added_token(entry) for number, entry in decoder.items()}
    if (folder / "added_tokens.json").is_file():
        added = json.loads((folder / "added_tokens.json").read_text(encoding="utf-8"))
        return {number: AddedToken(content, special=True, normalized=False) for content, number in added.items()}
    return {}


def added_token(entry: dict[str, Any]) -> AddedToken:
    known = {name: entry[name] for name in ("single_word", "lstrip", "rstrip", "normalized") if name in entry}
    return AddedToken(entry["content"], special=entry.get("special", False), **known)
