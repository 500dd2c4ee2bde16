"""Lanting (兰亭): the engine that runs the Qwen-Image family on your own machine.

The public names load when first used, so that `import lanting` costs milliseconds and no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lanting.core.errors import LantingError, ModelError, OutputError, PictureError, RequestError
    from lanting.core.pictures import open_mask, open_picture
    from lanting.core.recipe import read_recipe
    from lanting.core.save import save_picture
    from lanting.core.types import Progress, Recipe, Request, Result
    from lanting.engine import Engine

__version__ = "0.1.0"

__all__ = [
    "Engine",
    "LantingError",
    "ModelError",
    "OutputError",
    "PictureError",
    "Progress",
    "Recipe",
    "Request",
    "RequestError",
    "Result",
    "open_mask",
    "open_picture",
    "read_recipe",
    "save_picture",
]

_HOMES = {
    "Engine": "lanting.engine",
    "open_mask": "lanting.core.pictures",
    "open_picture": "lanting.core.pictures",
    "read_recipe": "lanting.core.recipe",
    "save_picture": "lanting.core.save",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"lanting has no {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES.get(name, "lanting.core")), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
