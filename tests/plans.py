"""Plans for tests: everything resident, and what a test changes of it."""

from __future__ import annotations

from typing import Any

from lanting.plan import Plan

RESIDENT: dict[str, Any] = {
    "model": "tiny",
    "device": "cpu",
    "dtype": "float32",
    "transformer": "fp32",
    "text_encoder": "fp32",
    "blocks": 2,
    "resident_blocks": 2,
    "streamed": "none",
    "modulation_table": False,
    "encoder": "keep",
    "parked": "disk",
    "vae_tile": 0,
    "peak_vram": 0,
    "peak_ram": 0,
    "disk": 0,
}


def plan(**changes: Any) -> Plan:
    return Plan(**{**RESIDENT, **changes})
