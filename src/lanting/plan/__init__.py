"""What fits this machine, and at what cost: arithmetic on headers, without torch, before a weight is read."""

from lanting.plan.machine import Device, Machine, detect, parse_bytes
from lanting.plan.model import Model, job_of, release, usual_job
from lanting.plan.plan import Plan
from lanting.plan.planner import Budget, RefusalError, plan, survey
from lanting.plan.speeds import Card, cards, find_card, machine_of

__all__ = [
    "Budget",
    "Card",
    "Device",
    "Machine",
    "Model",
    "Plan",
    "RefusalError",
    "cards",
    "detect",
    "find_card",
    "job_of",
    "machine_of",
    "parse_bytes",
    "plan",
    "release",
    "survey",
    "usual_job",
]
