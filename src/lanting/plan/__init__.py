"""What fits this machine, and at what cost: arithmetic on headers, without torch, before a weight is read."""

from lanting.plan.plan import Plan

__all__ = ["Plan"]
