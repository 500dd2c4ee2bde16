"""Whether a prompt may be rewritten by the model's own text encoder, and what a recipe says of one that was."""

from __future__ import annotations

from typing import Any, cast

from lanting.core.errors import RequestError
from lanting.core.rewriting import LONGEST
from lanting.core.types import Request, prompts_of
from lanting.specs.model_spec import ModelSpec


def settle_rewrite(request: Request, task: str, spec: ModelSpec) -> bool:
    """Whether it is to be. Raises RequestError where this model can't, and where there is nothing to rewrite."""
    for told in (request.asked, request.unwritten):
        _check_told(told, request.prompt)
    if not isinstance(request.rewrite, bool | None):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise RequestError("{name} must be true or false, not {value}", name="rewrite", value=request.rewrite)
    if not request.rewrite:
        return False
    check_writes(spec)
    if task == "layered":
        raise RequestError("layers have no prompt to rewrite: leave the prompt empty, and the picture is described")
    if not all(map(str.strip, prompts_of(request))):
        raise RequestError("there are no words to rewrite: say what to draw")
    return True


def check_writes(spec: ModelSpec) -> None:
    """Raises RequestError where a model's text encoder can't write."""
    if not spec.writes:
        raise RequestError(
            "{model} can't rewrite prompts: its text encoder has no lm_head.weight here, which writes words; leave "
            "rewrite out, or use a release of Qwen-Image with its whole text encoder",
            model=spec.name,
        )


def may_rewrite(request: Request, spec: ModelSpec) -> bool:
    """Whether it could be, for whoever makes it a default."""
    layered = request.task == "layered" or spec.tasks == ("layered",)
    return spec.writes and not layered and all(map(str.strip, prompts_of(request)))


def _check_told(told: Any, prompt: str | tuple[str, ...]) -> None:
    """Recipes come from strangers' files. Raises RequestError."""
    if told is None:
        return
    words = cast("tuple[Any, ...]", told if isinstance(told, tuple) else (told,))
    alike = isinstance(told, str) if isinstance(prompt, str) else len(words) == len(prompt)
    if not alike or not all(isinstance(one, str) and len(one) <= LONGEST for one in words):
        raise RequestError("what the recipe says was asked does not fit its prompt: leave it out")
