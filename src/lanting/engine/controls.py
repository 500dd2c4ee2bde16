"""Whether what steers a drawing is there and fits it: said when the request is settled, before a weight is read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lanting.core.errors import ModelError, RequestError
from lanting.core.types import Request

if TYPE_CHECKING:
    from lanting.engine.models import Models


def check_control(request: Request, models: Models) -> Request:
    """The same settled request. Raises RequestError or ModelError where its control pictures can't be followed."""
    task, net = request.task or "", models.control
    if not task.startswith("controlnet"):
        return request
    if request.options.get("in_context"):
        if net is not None:
            raise RequestError("in context a LoRA follows the control picture: leave the ControlNet out")
        if not models.loras:
            raise RequestError("in context a LoRA follows the control picture: open the model together with one")
        return request
    if net is None:
        raise ModelError("{task} needs a ControlNet: open the model together with one", task=task)
    if net.masked and task == "controlnet":
        raise RequestError("the ControlNet {name} repaints: give it a mask, white where to draw", name=net.path.name)
    if not net.masked and task == "controlnet_inpaint":
        raise RequestError("the ControlNet {name} reads no mask: leave it out", name=net.path.name)
    return request


def check_devices(models: Models) -> None:
    """Raises RequestError where several devices can't share a picture because of the ControlNet."""
    if models.control is not None and models.control.blockwise:
        raise RequestError(
            "the ControlNet {name} acts inside of the transformer, and one device has to draw: name one",
            name=models.control.path.name,
        )
