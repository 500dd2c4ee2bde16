"""In which numbers training multiplies: bfloat16 where the machine does so, float32 where it would only pretend to.

Without instructions for bfloat16 (x86 with no more than AVX2, most with AVX-512, ARM before v8.6) torch turns every
operand into float32 and back: on a Zen 3 core a step then takes several times as long as in float32
(docs/training.md). So the machine is asked what it has. Where nothing is known the answer is float32: should that be
wrong it costs a factor of about two, the other error costs more.

Rejected: `torch.ops.mkldnn._is_mkldnn_bf16_supported` on x86, which says yes to mere AVX-512 too; timing a product,
since processes that train together must agree, and a busy machine answers differently each time.
"""

from __future__ import annotations

import platform
from functools import cache

import torch

FULL, HALF = torch.float32, torch.bfloat16
ARM = ("aarch64", "arm64")


@cache
def native_on_cpu() -> bool:
    """Whether this machine's CPU multiplies bfloat16 itself. torch's own names, all private: one that isn't there
    (a build without oneDNN, as on a Mac) counts as no."""
    if platform.machine().lower() in ARM:
        return bool(getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", bool)())  # looks for instructions there
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(bool(getattr(torch.cpu, name, bool)()) for name in names)


def product_dtype(device: torch.device) -> torch.dtype:
    """What products in training are computed in on a device."""
    return FULL if device.type == "cpu" and not native_on_cpu() else HALF


def cast(device: torch.device) -> torch.autocast:
    """A context in which products on the device are computed in `product_dtype`."""
    return torch.autocast(device.type, dtype=HALF, enabled=product_dtype(device) == HALF)
