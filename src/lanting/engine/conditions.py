"""What decides the pixels besides the request and the weights: for recipes, and for what is remembered of a machine."""

from __future__ import annotations

import platform
from typing import TYPE_CHECKING

import torch

from lanting.engine.choose import say_dtypes
from lanting.kernels.library import instruction_set

if TYPE_CHECKING:
    from lanting.engine.models import Models


def key_of(models: Models) -> str:
    """Everything that decides whether a model's numbers fit: device, dtypes, weights, LoRAs, what computes."""
    versions = {name: value for name, value in versions_of(models).items() if name not in ("lanting", "python")}
    loras = [f"{lora.sha256}:{lora.strength:g}" for lora in models.loras]
    return " ".join([models.fingerprint, *versions.values(), *loras])


def versions_of(models: Models) -> dict[str, str]:
    """What else decides the pixels, besides request and weights."""
    from lanting import __version__

    return {
        "lanting": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": str(models.device) if models.device.type == "cpu" else device_name(models.device),
        "dtype": say_dtypes(models.dtypes),
        **({"kernels": name} if models.device.type == "cpu" and (name := instruction_set()) else {}),
        **({"quant": kind} if (kind := models.kind("transformer")) != "none" else {}),
    }


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
