"""From words to devices and dtypes: what was asked for, or what suits this machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike, fspath

import torch

from lanting.core.errors import RequestError
from lanting.kernels.library import multiplies_bfloat16
from lanting.plan.devices import names_of

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SHORT = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
COMPONENTS = ("transformer", "vae", "text_encoder", "controlnet")
SMALL = 1 << 30  # bytes: below this a CPU runs in float32 where it has no products in bfloat16 that small matrices like

Name = str | PathLike[str]


def names(given: Name | Sequence[Name] | None) -> tuple[str, ...]:
    """One file's or model's name, or several, as text."""
    if given is None:
        return ()
    return (fspath(given),) if isinstance(given, str | PathLike) else tuple(fspath(each) for each in given)


def choose_device(asked: str | None) -> torch.device:
    """The asked device, or the best one present: CUDA, then Apple's GPU, then the CPU."""
    if asked is None:
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(asked)
    except RuntimeError:
        raise RequestError("there is no device '{device}': use cpu, cuda, cuda:N or mps", device=asked) from None
    ready = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not ready.get(device.type, False):
        raise RequestError("the device {device} is not available on this machine: use --device cpu", device=asked)
    if device.type == "cuda" and device.index is not None and device.index >= torch.cuda.device_count():
        raise RequestError(
            "there is no {device}: this machine has {count} CUDA devices, the first is cuda:0",
            **{"device": asked, "count": torch.cuda.device_count()},
        )
    return device


def choose_dtypes(asked: str | None, device: torch.device, transformer_bytes: int) -> dict[str, torch.dtype]:
    """A dtype for every component: one name for all, or "vae=float32,transformer=bfloat16" for some.

    What is not named gets bfloat16, or float32 when the model is small and runs on a CPU that torch alone computes on.
    """
    small = device.type == "cpu" and transformer_bytes < SMALL and not multiplies_bfloat16()
    chosen: dict[str, torch.dtype] = dict.fromkeys(COMPONENTS, torch.float32 if small else torch.bfloat16)
    if asked is None:
        return chosen
    for part in asked.split(","):
        component, equals, name = (piece.strip() for piece in part.rpartition("="))
        dtype = DTYPES.get(SHORT.get(name, name))
        if dtype is None or (equals and component not in COMPONENTS):
            raise RequestError(
                "the dtype '{dtype}' is none we know: use bfloat16, float16 or float32, or one per component, such as "
                "vae=float32 (components: {components})",
                **{"dtype": part, "components": ", ".join(COMPONENTS)},
            )
        chosen |= {component: dtype} if equals else dict.fromkeys(COMPONENTS, dtype)
    return chosen


def say_dtypes(dtypes: Mapping[str, torch.dtype]) -> str:
    """The inverse of `choose_dtypes`, for recipes."""
    names = {component: str(dtype).removeprefix("torch.") for component, dtype in dtypes.items()}
    if len(set(names.values())) == 1:
        return names["transformer"]
    return ",".join(f"{component}={name}" for component, name in names.items())


def devices_of(asked: str | None) -> tuple[str, ...]:
    """The devices of `Engine.open(device=)`, the leader's first; one where one was asked for, and nothing for None.
    Raises RequestError where several are not there or can't draw together."""
    names = names_of(asked, torch.cuda.device_count())
    if len(names) > 1:
        for name in names:
            choose_device(name)
    return names
