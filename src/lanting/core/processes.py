"""Processes that we start, and what is different about them on Windows.

A worker's pipes are its own: it takes them off the numbers 0 and 1 before anything else runs, so that what a library
prints does not end up between our lines. On Windows there is a second reason. While a thread waits for a pipe that is
standard input, every library that asks about standard input as it is loaded waits too (numpy's does, and torch loads
numpy), for ever where nothing more is sent.
"""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path
from typing import Any, BinaryIO


def apart() -> dict[str, Any]:
    """For Popen: a process that Ctrl-C at our terminal does not reach, since we say when it ends."""
    if os.name == "nt":
        return {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}  # type: ignore[attr-defined]
    return {"start_new_session": True}


def as_typed(path: Path | str) -> str:
    """A path as it is typed behind a command."""
    return subprocess.list2cmdline([str(path)]) if os.name == "nt" else shlex.quote(str(path))


def own_pipes() -> tuple[BinaryIO, BinaryIO]:
    """(standard input, standard output) for the caller alone: everybody else reads nothing, and writes to stderr."""
    orders, answers = os.dup(0), os.dup(1)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    return os.fdopen(orders, "rb"), os.fdopen(answers, "wb")
