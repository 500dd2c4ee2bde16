"""Files that are written whole or not at all: under a temporary name beside their own, which they get when complete."""

from __future__ import annotations

import os
import secrets
import shutil
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from pathlib import Path

from lanting.core.errors import OutputError

LONGEST = 50  # characters of a name that a temporary one begins with: file systems end names at 255 bytes
HELD = (0.02, 0.05, 0.1, 0.2, 0.4)  # seconds between tries to replace a file that another program has open


def beside(path: Path) -> Path:
    """A hidden name in the same folder, which no other process takes: .NAME.xxxxxxxx.part."""
    return path.with_name(f".{path.name[:LONGEST]}.{secrets.token_hex(4)}.part")


@contextmanager
def replacing(path: Path, wait: bool = False) -> Generator[Path]:
    """A neighbour to write; it takes the place of `path` when the block ends, and is gone where that failed.

    wait  until its contents are on the disk, so that a machine that loses power keeps the old file or the new one
    """
    part = beside(path)
    try:
        yield part
        if wait:
            sync(part)
        put(part, path)
    finally:
        part.unlink(missing_ok=True)


def put(part: Path, path: Path) -> None:
    """Give a finished file its name. Windows refuses for a moment where a search or a scanner for viruses reads it."""
    for seconds in HELD if os.name == "nt" else ():
        with suppress(PermissionError):
            os.replace(part, path)
            return
        time.sleep(seconds)
    os.replace(part, path)


def replace_file(path: Path, write: Callable[[Path], object], wait: bool = False) -> None:
    """Let `write` fill a neighbour of `path`, which then takes its place."""
    with replacing(path, wait) as part:
        write(part)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    if os.name == "nt" and path.is_dir():  # which Windows neither opens nor needs
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)  # Windows refuses what is open for reading
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def unwritable(path: Path, error: OSError) -> OutputError:
    """The sentence for a file that the system refuses."""
    return OutputError("{path} can't be written: {reason}", path=path, reason=error.strerror or error)


@contextmanager
def writing(path: Path, size: int) -> Generator[Path]:
    """`replacing` for a result of `size` bytes. Raises OutputError where there is no room for it or nothing may be
    written."""
    try:
        if (free := shutil.disk_usage(path.parent).free) < size:
            raise OutputError(
                "{folder} has {free:.1f} GB free and the file needs {size:.1f}: make room, or write elsewhere",
                folder=path.parent,
                free=free / 1e9,
                size=size / 1e9,
            )
        with replacing(path, wait=True) as part:
            yield part
    except OSError as error:
        raise unwritable(path, error) from None
