"""Whether what steers a drawing is there and fits it: said when the request is settled, before a weight is read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lanting.core.errors import ModelError, RequestError
from lanting.core.types import Request
from lanting.specs.settle import check_mask_size, repainting

if TYPE_CHECKING:
    from lanting.engine.models import Models


def check_control(request: Request, models: Models) -> Request:
    """The same settled request. Raises RequestError or ModelError where its control pictures can't be followed."""
    task, nets = request.task or "", models.controls
    if not task.startswith("controlnet"):
        return request
    if request.options.get("in_context"):
        return _check_in_context(request, models)
    if not nets:
        raise ModelError("{task} needs a ControlNet: open the model together with one", task=task)
    _check_count(request, models)
    given, masked, chains = len(request.images), [net for net in nets if net.masked], [net for net in nets if net.chain]
    if masked and task == "controlnet":
        name = masked[0].path.name
        raise RequestError("the ControlNet {name} repaints: give it a mask, white where to draw", name=name)
    if not (masked or chains) and task == "controlnet_inpaint":
        names = ", ".join(net.path.name for net in nets)
        raise RequestError("the ControlNet {name} reads no mask: leave it out", name=names)
    if masked and len(nets) == 1 and given > 1:
        raise RequestError(
            "the ControlNet {name} repaints one picture, and {given} were given", name=nets[0].path.name, given=given
        )
    if request.mask is not None:
        for number in repainting([net.masked for net in nets], [net.chain for net in nets]):
            check_mask_size(request.mask, request.images[number])
        if chains and len(nets) == 1:
            _check_both(request, nets[0].path.name)
    return request


def _check_in_context(request: Request, models: Models) -> Request:
    """As `check_control`, where a LoRA follows the picture."""
    if models.single_stream:
        raise RequestError("{model} follows no picture in context: give a ControlNet", model=models.spec.name)
    if models.controls:
        raise RequestError("in context a LoRA follows the control picture: leave the ControlNet out")
    if not models.loras:
        raise RequestError("in context a LoRA follows the control picture: open the model together with one")
    return request


def _check_count(request: Request, models: Models) -> None:
    """Of several nets each has its own picture."""
    nets, given = len(models.controls), len(request.images)
    if nets > 1 and given != nets:
        raise RequestError(
            "{nets} ControlNets and {pictures} control pictures were given: give each net one, in the same order",
            **{"nets": nets, "pictures": given},
        )


def _check_both(request: Request, name: str) -> None:
    """Of one net of VideoX-Fun's under a mask: the first picture is repainted, and another followed in it."""
    given = len(request.images)
    if given > 2:
        raise RequestError(
            "the ControlNet {name} repaints one picture and follows one in it, and {given} were given",
            **{"name": name, "given": given},
        )
    every = (request.options.get(option) for option in ("control_scale", "control_start", "control_end"))
    if any(isinstance(value, list | tuple) and len(value) > 1 for value in every):
        raise RequestError("the ControlNet {name} reads both pictures at once: give one number for both", name=name)


def check_devices(models: Models) -> None:
    """Raises RequestError where several devices can't share a picture because of a ControlNet."""
    for net in models.controls:
        if net.blockwise or net.chain:
            raise RequestError(
                "the ControlNet {name} acts inside of the transformer, and one device has to draw: name one",
                name=net.path.name,
            )
