"""Reading what an earlier run of training kept, in a sentence where that can't be done.

Runs replace their checkpoints whole, so one that is torn was copied by half, or its disk was full or lost power.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch

from lanting.core.errors import ModelError


def read_checkpoint(path: Path, device: torch.device | str = "cpu") -> Any:
    """What `torch.save` wrote to `path`, on a device. Raises ModelError for a file that is damaged or another's."""
    try:
        return torch.load(path, weights_only=True, map_location=device)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ModelError("{path} can't be read: remove it to begin anew", path=path) from error
