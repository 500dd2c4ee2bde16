"""Prompt templates are text files, word for word as the model was trained, with two places left open.

`{prompt}` stands for the person's words. `{pictures:ENTRY}` stands for ENTRY once per picture, in which
`{n}` counts from 1 and `<|image_pad|>` is repeated once per picture token. Rejected: templates as Python
strings with a literal count of tokens to drop; the count follows from the file and the tokenizer.
"""

import re
from collections.abc import Sequence
from importlib import resources

from lanting.core.errors import ModelError

IMAGE_PAD = "<|image_pad|>"
PICTURES = re.compile(r"\{pictures:((?:[^{}]|\{n\})*)\}")


def load_template(name: str) -> str:
    """The template called `name`, for instance 'text-to-image', 'edit', 'edit-plus' or 'caption-en'."""
    folder = resources.files("lanting.specs") / "templates"
    path = folder / f"{name}.txt"
    if not path.is_file():
        known = ", ".join(sorted(file.name.removesuffix(".txt") for file in folder.iterdir()))
        raise ModelError("there is no prompt template called {name}; use one of: {known}", name=name, known=known)
    return path.read_text(encoding="utf-8")


def takes_pictures(template: str) -> bool:
    """Whether the template has a place for pictures."""
    return PICTURES.search(template) is not None


def opening(template: str) -> str:
    """The constant text in front of the first open place; its tokens aren't passed on to the transformer."""
    return re.split(r"\{prompt\}|\{pictures:", template, maxsplit=1)[0]


def fill(template: str, prompt: str, picture_tokens: Sequence[int] = ()) -> str:
    """The whole text for a prompt and for pictures of so many tokens each."""

    def entries(place: re.Match[str]) -> str:
        return "".join(
            place[1].replace("{n}", str(n)).replace(IMAGE_PAD, IMAGE_PAD * count)
            for n, count in enumerate(picture_tokens, 1)
        )

    return PICTURES.sub(entries, template).replace("{prompt}", prompt)
