"""`--draft`: a model's few-step twin, to see many pictures soon; `lanting finish` draws the one you like in full.

A draft and its finish begin at the same noise, so the one shows what the other will be (`benchmarks/drafts.py`).
Rejected: a smaller draft, whose noise, and so whose picture, is another.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from lanting.core.errors import RequestError
from lanting.specs import distilled_releases, get_spec, spec_names


def drafting(model: str, loras: tuple[str, ...]) -> tuple[str, tuple[str, ...]]:
    """The model and the LoRAs to draft with: the release's Lightning, one that is here before one to be pulled; else
    the few-step LoRA that the model brings. Raises RequestError where there is neither."""
    if model in spec_names() and (get_spec(model).lora or (few := distilled_releases(model))):
        return model if get_spec(model).lora else first_here(few), loras
    if loras and any(map(few_step(model), loras)):
        return model, loras
    if brought := few_step_lora(model):
        return model, (brought, *loras)
    raise RequestError(
        "{model} has no few-step release to draft with: leave --draft out, or give a Lightning with --lora", model=model
    )


def first_here(releases: tuple[str, ...]) -> str:
    """The first release that is on this machine, or the first."""
    from lanting.weights.home import downloaded

    return next((name for name in releases if downloaded(name) is not None), releases[0])


def few_step_lora(model: str) -> str:
    """The name of a few-step LoRA that a model's folder brings; "" where there is none, or no folder yet."""
    from lanting.weights.find import LORAS, locate
    from lanting.weights.home import downloaded

    if model in spec_names() and model != "nano" and downloaded(model) is None:
        return ""
    own = sorted((locate(model).path / LORAS).glob("*.safetensors"))
    return next((path.stem for path in own if wants_few_steps(path)), "")


def few_step(model: str) -> Callable[[str], bool]:
    """Whether FILE[:STRENGTH] was distilled for few steps, for a model. It raises ModelError where that is no file."""
    from lanting.weights.find import locate
    from lanting.weights.lora_file import find_lora, split_strength

    folder = locate(model).path
    return lambda lora: wants_few_steps(find_lora(folder, split_strength(lora)[0]))


def wants_few_steps(path: Path) -> bool:
    from lanting.weights.headers import read_metadata
    from lanting.weights.lora_wishes import wishes_of

    return wishes_of(path, read_metadata(path)).few
