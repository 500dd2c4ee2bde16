"""What a person is told of prompts that were rewritten."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lanting.core.types import Recipe

if TYPE_CHECKING:
    from lanting.cli.screen import Screen


def tell(recipes: Sequence[Recipe], screen: Screen) -> None:
    """The words that were drawn, a line for each prompt that was rewritten."""
    pairs = dict.fromkeys((one.request.get("asked"), one.request["prompt"]) for one in recipes)
    for asked, words in pairs:
        if asked is not None and asked != words:
            screen.line("prompt: {prompt}", prompt=" ".join(str(words).split()))


def as_json(recipe: Recipe) -> dict[str, Any]:
    """What was asked, what was drawn, and why it is the same where that was not wished."""
    asked = recipe.request
    if asked.get("asked") is None:
        return {}
    return {name: asked[name] for name in ("prompt", "asked", "unwritten") if asked.get(name) is not None}
