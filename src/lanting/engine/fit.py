"""From a budget to a plan, for `Engine.open`: how much memory may be used, in place of what to do about it.

The size of the pictures is not known yet, so the plan is made for the release's usual ones; the command line, which
knows the request, plans for that and hands the plan over.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypedDict

import torch

from lanting.core.errors import RequestError
from lanting.plan import Budget, Plan, detect, parse_bytes, plan, usual_job
from lanting.plan.costs import DRIVER
from lanting.weights.find import ModelFolder
from lanting.weights.sized import planned_model


class Fit(TypedDict, total=False):
    """How a model is to fit its machine; see `Engine.open`."""

    plan: Plan | None
    vram: str | int | None
    ram: str | int | None
    rewrite: bool


def planned(folder: ModelFolder, fit: Fit, beside: Callable[[], int] = lambda: 0, **wish: Any) -> Plan | None:
    """The plan that was given, or the best one within the budgets; None where there is neither.

    beside  bytes of LoRAs and ControlNets, which take their size beside the model
    wish    `device` and `quant`, as `lanting.plan.plan` takes them
    Raises RequestError where nothing fits, and for a budget that is no number.
    """
    budget = Budget(*(in_bytes(fit.get(name)) for name in ("vram", "ram")))
    copies = str(wish.get("device")).split(",").count("cpu")  # processes that share the computer's memory
    free = budget.vram is None and budget.ram is None
    given = fit.get("plan")
    if given is not None:
        check_copies(given, copies)
    if given is not None or (free and copies < 2):
        return given
    model = replace(planned_model(folder), extra=beside())
    machine = detect()
    if free and not machine.ram_free:  # not known here
        return None
    job = replace(usual_job(model, None), writes=bool(fit.get("rewrite")) and folder.spec.writes)
    chosen = plan(model, job, machine, budget, **wish)
    return None if free and chosen.trivial else chosen


def check_copies(given: Plan, copies: int) -> None:
    """Whether so many processes can follow a plan side by side. Raises RequestError."""
    free, wanted = detect().ram_free if copies > 1 else 0, given.peak_ram * copies
    if free and wanted > free:
        raise RequestError(
            "{count} processes need {wanted:.1f} GB by this plan and {free:.1f} GB are free: name fewer devices",
            **{"count": copies, "wanted": wanted / 1e9, "free": free / 1e9},
        )


def in_bytes(amount: str | int | None) -> int | None:
    """ "12G", "850M" or a number."""
    return parse_bytes(amount) if isinstance(amount, str) else amount


def hold(device: torch.device, vram: str | int | None) -> None:
    """Make a budget hard where the allocator can: beyond it CUDA's says that memory is out, whatever the card has."""
    limit = in_bytes(vram)
    if limit is not None and device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        index = torch.cuda.current_device() if device.index is None else device.index
        torch.cuda.set_per_process_memory_fraction(min(max(limit - DRIVER, 0) / total, 1.0), index)
