"""Values and errors that every room may use; no torch."""

from lanting.core.errors import LantingError, ModelError, OutputError, PictureError, RequestError
from lanting.core.types import TASK_NAMES, Progress, Recipe, Request, Result

__all__ = [
    "TASK_NAMES",
    "LantingError",
    "ModelError",
    "OutputError",
    "PictureError",
    "Progress",
    "Recipe",
    "Request",
    "RequestError",
    "Result",
]
