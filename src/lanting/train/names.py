"""Codes for the names of pictograms: the words of a name add up to the code of its picture.

A name of several words, or of several Chinese characters, has no row of its own in the table of embeddings, and a
network that meets a name a few hundred times does not learn a thousand pictures by heart (docs/LOG.md). But a thousand
words are as many unknowns as there are names: least squares finds a part of the code for each, so that the sum over a
name is nearly its picture's code, and attention is good at sums. English words use the channels that the codes of
characters use; Chinese characters keep theirs there and get the picture's in the channels that are left over.
Rejected: one token for a whole name, since text in quotes is spelled with the same characters.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from tokenizers import Tokenizer
from torch import Tensor

from lanting.train.assets import concepts
from lanting.train.wording import wording_words

RIDGE = 0.1  # keeps rare words from growing large for the sake of one name
LETTERS = frozenset(range(256))  # tokens of single bytes, which quoted texts are spelled with
ADDED = 0.7  # strength of a picture's code beside a character's own


def token_names(tokenizer: Tokenizer, language: str) -> list[list[int]]:
    """The token ids of every pictogram's name as a prompt has it in the middle of a sentence."""
    names = [c.name_zh if language == "zh" else " " + c.name_en for c in concepts()]
    return [e.ids for e in tokenizer.encode_batch(names, add_special_tokens=False)]


def common_words(tokenizer: Tokenizer) -> frozenset[int]:
    """Letters, and words that sentences use for other things too (`red`, `face`): they keep what they mean."""
    found = tokenizer.encode_batch([" " + word for word in wording_words()], add_special_tokens=False)
    return LETTERS | {e.ids[0] for e in found}


def shares(names: Sequence[Sequence[int]], codes: Tensor, fixed: Collection[int] = ()) -> tuple[list[int], Tensor]:
    """(tokens, (n, width)): rows whose sums over the tokens of each name come near its code (names, width).

    Tokens in `fixed` count as zeros. Ridge regression in float64.
    """
    tokens = sorted({token for name in names for token in name if token not in fixed})
    place = {token: i for i, token in enumerate(tokens)}
    counts = torch.zeros(len(names), len(tokens), dtype=torch.float64)
    for row, name in enumerate(names):
        for token in name:
            if token in place:
                counts[row, place[token]] = 1.0
    normal = counts.T @ counts + RIDGE * torch.eye(len(tokens), dtype=torch.float64)
    return tokens, torch.linalg.solve(normal, counts.T @ codes.double()).float()


@torch.no_grad()
def give_names(table: Tensor, tokenizer: Tokenizer, english: Tensor, chinese: Tensor) -> int:
    """Write the codes of all names into a table of embeddings (vocabulary, width); returns how many rows changed.

    `english` (concepts, width) lies in the channels of codes, `chinese` (concepts, width) in the others.
    """
    words, rows = shares(token_names(tokenizer, "en"), english, common_words(tokenizer))
    table[words] = rows.to(table)
    characters, more = shares(token_names(tokenizer, "zh"), chinese, LETTERS)
    table[characters] += ADDED * more.to(table)
    return len(words) + len(characters)
