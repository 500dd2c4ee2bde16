"""Tasks: (Studio, Request) -> Canvas and nothing else. A new task is a function and a line in `TASKS`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from lanting.core import Request
from lanting.flow.loop import Canvas
from lanting.tasks.controlnet import controlnet, controlnet_inpaint
from lanting.tasks.edit import edit, edit_inpaint
from lanting.tasks.image_to_image import image_to_image
from lanting.tasks.inpaint import inpaint
from lanting.tasks.layered import layered
from lanting.tasks.studio import Studio
from lanting.tasks.text_to_image import text_to_image

Task = Callable[[Studio, Request], Canvas]

TASKS: Mapping[str, Task] = MappingProxyType(
    {
        "text_to_image": text_to_image,
        "image_to_image": image_to_image,
        "inpaint": inpaint,
        "edit": edit,
        "edit_inpaint": edit_inpaint,
        "layered": layered,
        "controlnet": controlnet,
        "controlnet_inpaint": controlnet_inpaint,
    }
)

__all__ = ["TASKS", "Studio", "Task"]
