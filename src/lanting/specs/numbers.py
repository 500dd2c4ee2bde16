"""Numbers from people: in range, or one sentence that says the range."""

from __future__ import annotations

import math
from typing import Any

from lanting.core.errors import RequestError


def whole(name: str, value: Any, low: int, high: int) -> int:
    """A whole number in low..high, or a RequestError that says so."""
    if isinstance(value, int) and not isinstance(value, bool) and low <= value <= high:
        return value
    raise RequestError(
        "{name} must be a whole number from {low} to {high}, not {value}",
        **{"name": name, "low": low, "high": high, "value": value},
    )


def number(name: str, value: Any, low: float, high: float) -> float:
    """A finite number in low..high, or a RequestError that says so."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        exact = float(value) if abs(value) < 2**53 else math.inf
        if math.isfinite(exact) and low <= exact <= high:
            return exact
    raise RequestError(
        "{name} must be a number from {low} to {high}, not {value}",
        **{"name": name, "low": low, "high": high, "value": value},
    )
