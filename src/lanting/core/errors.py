"""Errors are sentences for a person: what is wrong, then what to do next.

A `LantingError` is never shown with a traceback; the command line prints it and leaves with its exit code.
It may keep its sentence as a template plus values, so that a surface can say it in another language
(`core.lang`); a finished string (an f-string) is fine too and is then shown as it is.
"""

from __future__ import annotations


def first_line(error: BaseException) -> str:
    """What any exception says, as one line; the name of its kind where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


class LantingError(Exception):
    """Anything we can explain. `exit_code` 2: the request was wrong; 1: we failed."""

    exit_code = 2

    def __init__(self, sentence: str = "", **values: object) -> None:
        super().__init__(sentence.format(**values) if values else sentence)
        self.sentence = sentence
        self.values = values


class RequestError(LantingError):
    """A value in the request can't be used (size, steps, guidance, a missing picture)."""


class PictureError(LantingError):
    """A picture file can't be read, is too large, or can't be written."""


class ModelError(LantingError):
    """A model or weights file is unknown, incomplete, damaged or of the wrong shape."""


class NotFiniteError(LantingError):
    """A network left the range of its numbers, and no safer way of computing brought it back."""

    exit_code = 1


class OutputError(LantingError):
    """A result can't be written where it was asked to go."""
