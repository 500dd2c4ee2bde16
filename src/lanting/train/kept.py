"""What long runs keep: one run at a time, and read again in a sentence where that can't be done.

Runs replace their checkpoints whole, so one that is torn was copied by half, or its disk was full or lost power.
"""

from __future__ import annotations

import errno
import os
import pickle
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from lanting.core.errors import ModelError
from lanting.core.files import replace_file, unwritable

# what reading a file raises that is torn or no such file
BAD = (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, EOFError)
BAD += (pickle.UnpicklingError, SafetensorError)
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO)  # disks that take nothing more


@contextmanager
def alone(result: Path) -> Iterator[None]:
    """Nobody else works on `result`, a file or a folder, meanwhile: two would take turns at one checkpoint.
    The folder that it lies in is made.

    The system lets go of the lock of a process that is killed. Raises ModelError where another holds it, OutputError
    where nothing can be written, or no more.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(result / ".lock" if result.is_dir() else result.with_name(f".{result.name}.lock"))
    try:
        result.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        raise ModelError(
            "{path} is being written by another run: wait for that, or write elsewhere", path=result
        ) from None
    except NotImplementedError:  # a file system without locks
        with disk_said(result):
            yield
        return
    except OSError as error:
        raise unwritable(result, error) from None
    try:
        with disk_said(result):
            yield
    finally:
        with suppress(PermissionError):  # Windows keeps a file that is open, and removes this one when it is released
            Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


@contextmanager
def disk_said(result: Path) -> Iterator[None]:
    """Raises OutputError where work on `result` fails because the disk takes nothing more."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise unwritable(result, error) from None


def write_tensors(path: Path, tensors: Mapping[str, Tensor], notes: Mapping[str, str] | None = None) -> None:
    """A safetensors file for whom the person's files are: `save_file` alone lets nobody but the owner read it."""
    path.touch()
    mode = path.stat().st_mode
    try:
        save_file(dict(tensors), str(path), metadata=dict(notes) if notes else None)
    except SafetensorError as error:
        if code := re.search(r"os error (\d+)", str(error)):
            raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from None
        raise
    path.chmod(mode)


def write_checkpoint(path: Path, state: Mapping[str, Any]) -> None:
    """What `read_checkpoint` reads, whole or not at all even where power fails. Raises OSError."""

    def write(part: Path) -> None:
        try:
            with part.open("wb") as file:  # of a path torch doesn't say why it can't be written
                torch.save(state, file)
        except RuntimeError as error:
            raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None

    replace_file(path, write, wait=True)


@contextmanager
def own_file(path: Path) -> Iterator[None]:
    """Raises ModelError where what a run kept at `path` is read inside, and is damaged or another's."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except BAD as error:
        raise ModelError("{path} can't be read: remove it to begin anew", path=path) from error


def read_checkpoint(path: Path, device: torch.device | str = "cpu", needs: Sequence[str] = ()) -> Any:
    """What `write_checkpoint` wrote to `path`, on a device. Raises ModelError, also where one of `needs` is missing."""
    with own_file(path):
        state = torch.load(path, weights_only=True, map_location=device)
        if missing := [name for name in needs if name not in state]:
            raise KeyError(*missing)
        return state


def same_run(path: Path, own: Mapping[str, Any], before: Mapping[str, Any]) -> None:
    """Raises ModelError unless what was begun at `path` was begun with what this run has; it names the first thing."""
    if other := [one for one in {**own, **before} if own.get(one) != before.get(one)]:
        raise ModelError(
            "{path} was begun with another {what}: remove it to begin anew, or write elsewhere with -o",
            **{"path": path, "what": other[0]},
        )
