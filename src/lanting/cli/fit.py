"""The plan behind a drawing verb: made before the engine opens, told in one line, handed over to be obeyed.

nano fits everywhere and is planned only where a budget is given. A model that can't be found, or a device that only
torch knows, is left to the engine, whose sentences say what is wrong.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from lanting.core.errors import LantingError, ModelError, RequestError
from lanting.core.types import Request
from lanting.specs import parse_size, settle

if TYPE_CHECKING:
    from lanting.cli.draw import Wish
    from lanting.cli.screen import Screen
    from lanting.plan import Budget, Machine, Model, Plan

PRECISIONS = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


@dataclass(frozen=True, slots=True)
class Limits:
    """`--vram` and `--ram` as they were typed."""

    vram: str | None = None
    ram: str | None = None

    def __bool__(self) -> bool:
        return self.vram is not None or self.ram is not None

    def budget(self) -> Budget:
        """In bytes. Raises RequestError."""
        from lanting.plan import Budget, parse_bytes

        return Budget(*(None if text is None else parse_bytes(text) for text in (self.vram, self.ram)))


def fit(request: Request, wish: Wish, screen: Screen) -> dict[str, Any]:
    """What `Engine.open` is to be told: {"plan": Plan}, or nothing. Raises RefusalError where nothing fits."""
    if wish.model == "nano" and not wish.limits:
        return {}
    from lanting.plan import detect

    try:
        chosen = planned(request, wish, detect(), wish.limits.budget())
    except (ModelError, UnknownDeviceError):
        if wish.limits:
            raise
        return {}
    if wish.limits or not chosen.trivial:
        screen.note("{plan}", plan=chosen.sentence())
        writes = {"rewrite": True} if request.rewrite else {}
        return {"plan": chosen, **writes} | ({} if wish.limits.vram is None else {"vram": wish.limits.vram})
    return {}


class UnknownDeviceError(RequestError):
    """The device that was asked for is none that was found without torch."""


def planned(request: Request, wish: Wish, machine: Machine, budget: Budget) -> Plan:
    """The plan for a request. Raises ModelError where there is no such model here."""
    from lanting.plan import job_of, plan
    from lanting.weights.find import locate
    from lanting.weights.sized import beside, planned_model

    folder = locate(wish.model, {"text_encoder": wish.weights.text_encoder, "vae": wish.weights.vae})
    extra = beside(wish.loras, wish.controlnets)
    model = replace(planned_model(folder), precision=precision(wish.dtype), extra=extra)
    size = parse_size(wish.size, folder.spec) if wish.size else request.size
    settled = settle(replace(request, size=size), model.spec)
    try:
        machine.device(wish.device)
    except LantingError as error:
        raise UnknownDeviceError(error.sentence, **error.values) from None
    return plan(model, job_of(settled, model), machine, budget, wish.device, wish.weights.quant)


def precision(asked: str | None) -> str | None:
    """Of the transformer, from --dtype; wrong words are the engine's to refuse."""
    words = [part.strip().removeprefix("transformer=") for part in (asked or "").split(",")]
    names = [PRECISIONS.get(word, word) for word in words]
    return next((name for name in names if name in PRECISIONS.values()), None)


def model_named(name: str) -> Model:
    """A model that is here, or the arithmetic of a release that is not. Raises ModelError."""
    from lanting.plan import release
    from lanting.specs import get_spec, spec_names
    from lanting.weights.find import locate
    from lanting.weights.sized import planned_model

    if name not in spec_names():
        return planned_model(locate(name))
    try:
        return planned_model(locate(name))
    except ModelError:
        return release(get_spec(name))
