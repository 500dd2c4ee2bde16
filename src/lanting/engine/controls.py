"""Whether what steers a drawing is there and fits it: said when the request is settled, before a weight is read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lanting.core.errors import ModelError, RequestError
from lanting.core.types import Request
from lanting.specs.settle import check_mask_size

if TYPE_CHECKING:
    from lanting.engine.models import Models


def check_control(request: Request, models: Models) -> Request:
    """The same settled request. Raises RequestError or ModelError where its control pictures can't be followed."""
    task, nets = request.task or "", models.controls
    if not task.startswith("controlnet"):
        return request
    if request.options.get("in_context"):
        if nets:
            raise RequestError("in context a LoRA follows the control picture: leave the ControlNet out")
        if not models.loras:
            raise RequestError("in context a LoRA follows the control picture: open the model together with one")
        return request
    if not nets:
        raise ModelError("{task} needs a ControlNet: open the model together with one", task=task)
    given, masked = len(request.images), [net for net in nets if net.masked]
    if len(nets) > 1 and given != len(nets):
        raise RequestError(
            "{nets} ControlNets and {pictures} control pictures were given: give each net one, in the same order",
            **{"nets": len(nets), "pictures": given},
        )
    if masked and task == "controlnet":
        name = masked[0].path.name
        raise RequestError("the ControlNet {name} repaints: give it a mask, white where to draw", name=name)
    if not masked and task == "controlnet_inpaint":
        names = ", ".join(net.path.name for net in nets)
        raise RequestError("the ControlNet {name} reads no mask: leave it out", name=names)
    if masked and len(nets) == 1 and given > 1:
        raise RequestError(
            "the ControlNet {name} repaints one picture, and {given} were given", name=nets[0].path.name, given=given
        )
    if request.mask is not None:
        for net, image in zip(nets, request.images, strict=False):
            if net.masked:
                check_mask_size(request.mask, image)
    return request


def check_devices(models: Models) -> None:
    """Raises RequestError where several devices can't share a picture because of a ControlNet."""
    for net in models.controls:
        if net.blockwise:
            raise RequestError(
                "the ControlNet {name} acts inside of the transformer, and one device has to draw: name one",
                name=net.path.name,
            )
