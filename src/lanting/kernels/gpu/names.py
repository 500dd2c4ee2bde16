"""What a GPU's kernels and attention will be, as far as it can be told without torch: for whoever shows a machine."""

from __future__ import annotations

import os
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

VARIABLE = "LANTING_ATTENTION"
OLDEST = (8, 0)  # Ampere: what Triton still compiles products of int8 for
HOPPER = ("fa3", "cudnn", "fa2", "flash", "efficient", "math")
OLDER = ("fa2", "flash", "cudnn", "efficient", "math")
PACKAGES = {"fa3": "flash_attn_interface", "fa2": "flash_attn"}  # what brings them; the others are PyTorch's


def usual(capability: tuple[int, int]) -> tuple[str, ...]:
    """The order in which attentions are tried."""
    return HOPPER if capability >= (9, 0) else OLDER


def candidates(capability: tuple[int, int]) -> tuple[str, ...]:
    """Attentions that are installed, first what LANTING_ATTENTION asks for; the first one that is right is taken."""
    asked = os.environ.get(VARIABLE, "auto").strip().lower() or "auto"
    every = usual(capability) if asked == "auto" else tuple(dict.fromkeys((asked, *usual(capability))))
    return tuple(name for name in every if name not in PACKAGES or find_spec(PACKAGES[name]) is not None)


def triton() -> str:
    """Its version; empty where it is not installed."""
    for name in ("triton", "pytorch-triton", "triton-windows"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return ""
