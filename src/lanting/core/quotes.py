"""What a prompt quotes: the words that a picture is to show.

Quotation marks of English and Chinese. A straight or curly single mark inside a word is an apostrophe.
"""

from __future__ import annotations

import re

QUOTED = re.compile(
    r"\"([^\"]*)\"|“([^”]*)”|「([^」]*)」|『([^』]*)』|‘([^’]*)’|(?<![A-Za-z0-9])'([^']*)'(?![A-Za-z0-9])"
)


def quoted(prompt: str) -> tuple[str, ...]:
    """The quoted texts in their order, white space around them aside; empty ones are left out."""
    found = (next(text for text in match.groups() if text is not None) for match in QUOTED.finditer(prompt))
    return tuple(text.strip() for text in found if text.strip())
