"""A prompt rewritten by the text encoder, which is a language model with eyes: in detail, or left as it was.

The first answer is the likeliest one, token by token; where it can't be used (`core.rewriting` says when), a few more
are drawn, each from a generator seeded with its number. So the words depend on prompt, pictures and model alone: all
pictures of a batch, and every seed that is tried, show the same words, and a drawing that is taken up again finds them
again. Rejected: the seed of the picture, with which no two pictures could be compared; and drawing the first answer
too, as chats do: words that change from one time to the next are of no use here.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence

import torch
from PIL import Image

from lanting.core.rewriting import ENDLESS, LONG, Written, fault, language_of, tidy
from lanting.nn.qwen_vl import Sampling
from lanting.text.encoder import PromptEncoder

MOST = 512  # tokens of a prompt that are read, its closing words included
AGAIN = 3  # answers that are drawn after the likeliest one
FREE = (0.7, 0.8)  # temperature and top_p of those


def rewrite(
    encoder: PromptEncoder, prompt: str, images: Sequence[Image.Image] = (), most: int = MOST
) -> Generator[int, None, Written]:
    """Yields how many tokens were said so far; at the end the words, or the prompt and why it stays.

    images  what an instruction is about, as the encoder sees it in drawing
    most    tokens that a prompt may have, its closing words included
    Raises RequestError where the encoder can't see.
    """
    encoder.refuse([prompt], images)
    name = f"rewrite-{'edit-' if images else ''}{language_of(prompt)}"
    closing = (encoder.edit_template if images else encoder.template).rpartition("{prompt}")[2]
    room = most - len(encoder.tokens(closing))
    if len(encoder.tokens(prompt)) >= room:
        return Written(prompt, LONG)
    reason, told = "", 0
    for attempt in range(1 + AGAIN):
        temperature, top_p = FREE if attempt else (0.0, 1.0)
        sampling = Sampling(room + 1, temperature, top_p, stop=encoder.ends())
        generator = torch.Generator(encoder.model.device).manual_seed(attempt) if attempt else None
        said: list[int] = []
        for token in encoder.write(name, prompt, images, sampling, generator):
            said.append(token)
            yield told + len(said)
        told += len(said)
        words = tidy(encoder.words_of(said), prompt)
        reason = ENDLESS if len(said) > room or len(encoder.tokens(words)) > room else fault(prompt, words)
        if not reason:
            return Written(words)
    return Written(prompt, reason)
