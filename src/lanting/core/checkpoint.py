"""A drawing put aside: the latents after a step, as plain bytes, so that another process can go on from there.

`Engine.stream` yields checkpoints when asked to and takes one back. The mark says what was being drawn with what;
a checkpoint with another mark belongs to another picture and is refused. Rejected: pickles and torch files, which
run code or need torch to be told apart.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lanting.core.errors import RequestError

FORMAT = 1
LONGEST_HEAD = 4 << 20  # bytes; 64 prompts that were rewritten are below
MOST_BYTES = 1 << 30  # of latents: 64 pictures of 4096 x 4096 in float32 are below


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Where a drawing is after `step` of `steps`."""

    step: int
    steps: int
    mark: str  # a hash of the settled request, the weights and what else decides the pixels
    dtype: str  # "bfloat16", "float16", "float32"
    shape: tuple[int, ...]  # of the latents: (B, N, C)
    latents: bytes  # little-endian, as in memory
    choices: Mapping[str, Any] = field(default_factory=dict[str, Any])  # what was decided so far, see `Request`

    def to_bytes(self) -> bytes:
        """One line of JSON, then the latents."""
        head = {"lanting-checkpoint": FORMAT} | {name: getattr(self, name) for name in ("step", "steps", "mark")}
        head |= {"dtype": self.dtype, "shape": list(self.shape), "choices": dict(self.choices)}
        return json.dumps(head).encode() + b"\n" + self.latents

    @classmethod
    def from_bytes(cls, data: bytes) -> Checkpoint:
        """The inverse; a RequestError for anything else."""
        head, _, latents = data.partition(b"\n")
        try:
            if len(head) > LONGEST_HEAD or len(latents) > MOST_BYTES:
                raise ValueError("too long")
            table: dict[str, Any] = json.loads(head)
            if table["lanting-checkpoint"] != FORMAT:
                raise ValueError("of another version")
            shape = tuple(int(side) for side in table["shape"])
            choices = dict(table.get("choices") or {})
            numbers = (int(table["step"]), int(table["steps"]), str(table["mark"]), str(table["dtype"]))
            return cls(*numbers, shape, latents, choices)
        except (ValueError, KeyError, TypeError):
            raise RequestError("this is no checkpoint of a drawing: start the drawing anew") from None
