"""What long runs keep: one run at a time, and read again in a sentence where that can't be done.

Runs replace their checkpoints whole, so one that is torn was copied by half, or its disk was full or lost power.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from lanting.core.errors import ModelError
from lanting.core.files import unwritable


@contextmanager
def alone(result: Path) -> Iterator[None]:
    """Nobody else works on `result`, a file or a folder, meanwhile: two would take turns at one checkpoint.

    The system lets go of the lock of a process that is killed. Raises ModelError where another holds it, OutputError
    where nothing can be written.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(result / ".lock" if result.is_dir() else result.with_name(f".{result.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ModelError(
            "{path} is being written by another run: wait for that, or write elsewhere", path=result
        ) from None
    except NotImplementedError:  # a file system without locks
        yield
        return
    except OSError as error:
        raise unwritable(result, error) from None
    try:
        yield
    finally:
        with suppress(PermissionError):  # Windows keeps a file that is open, and removes this one when it is released
            Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


def write_tensors(path: Path, tensors: Mapping[str, Tensor], notes: Mapping[str, str] | None = None) -> None:
    """A safetensors file for whom the person's files are: `save_file` alone lets nobody but the owner read it."""
    path.touch()
    mode = path.stat().st_mode
    save_file(dict(tensors), str(path), metadata=dict(notes) if notes else None)
    path.chmod(mode)


def read_checkpoint(path: Path, device: torch.device | str = "cpu") -> Any:
    """What `torch.save` wrote to `path`, on a device. Raises ModelError for a file that is damaged or another's."""
    try:
        return torch.load(path, weights_only=True, map_location=device)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ModelError("{path} can't be read: remove it to begin anew", path=path) from error
