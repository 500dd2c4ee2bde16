"""Which Linear is packed as what, and why. The first row that fits a Linear's path decides.

A kind packs what is large: the Linears of the transformer's blocks and of the text encoder's layers, 99.8 and 79 % of
their weights. What is small or sensitive stays in 16 bits.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from lanting.core.errors import RequestError
from lanting.nn.rotate import largest_block
from lanting.nn.rounding import fitting_group
from lanting.weights.form import Form

KINDS = ("int8", "fp8", "int4")
GROUP = 64  # inputs that share a scale of int4: at 32 the error is 0.9 times as large and a weight 4.5 bits, not 4.25


@dataclass(frozen=True, slots=True)
class Row:
    """`packed` says whether Linears whose path fits `pattern` are packed at all."""

    pattern: str
    packed: bool
    reason: str


TABLE: dict[str, tuple[Row, ...]] = {
    "transformer": (
        Row(r"time_text_embed\..*", False, "one token's work a step, and its error reaches every block by modulation"),
        Row(r"img_in|txt_in", False, "all latents and words enter through them once; 0.05 % of the weights"),
        Row(r"norm_out\.linear|proj_out", False, "the velocity leaves through them; no later layer makes up for it"),
        Row(r"transformer_blocks\.\d+\.(img|txt)_mod\.1", True, "a third of all weights, and one token's work a step"),
        Row(r"transformer_blocks\..*", True, "the bulk; errors of single Linears average out along the residual"),
    ),
    "controlnet": (
        Row(r"controlnet_blocks\.\d+\.(input|output)_proj", True, "the bulk of a blockwise net"),
        Row(r"controlnet_.*", False, "residuals and control pictures pass through them once"),
        Row(r"control_blocks\.\d+\.(before|after)_proj", False, "the same of a chain"),
        Row(r"control_blocks\..*", True, "the bulk of a chain; modulations as in the transformer"),
        Row(r"transformer_blocks\..*", True, "as in the transformer"),
    ),
    "text_encoder": (
        Row(r"visual\..*", False, "few weights (8 %) with large outliers, and rows that no group size divides"),
        Row(r"lm_head", False, "chooses single words among 152,064; read only by who writes"),
        Row(r"model\.layers\..*", True, "the bulk"),
    ),
}


def packed_reason(component: str, path: str) -> tuple[bool, str]:
    """Whether a Linear is packed, and the reason."""
    for row in TABLE.get(component, ()):
        if re.fullmatch(row.pattern, path):
            return row.packed, row.reason
    return False, "not in the table"


def chooser(
    component: str, kind: str, group: int = GROUP, rotate: bool = False
) -> Callable[[str, tuple[int, int]], Form | None] | None:
    """What `weights.stored` asks for every plain Linear, for one of KINDS; None for "none" and "auto".

    A row that no group divides is packed as int8. Raises RequestError for a kind that is none of ours.
    """
    if kind in ("none", "auto"):
        return None
    if kind not in KINDS:
        raise RequestError(
            "the kind of weights {name} is none we know; use one of {known}",
            name=kind,
            known=", ".join((*KINDS, "none", "auto")),
        )

    def choose(path: str, shape: tuple[int, int]) -> Form | None:
        if not packed_reason(component, path)[0]:
            return None
        rows, columns = shape
        turn = largest_block(columns) if rotate else 0
        if kind == "fp8":  # one scale for all: as ComfyUI's fp8 files, and 8-bit floats gain nothing by more
            return Form("fp8 e4m3", shape, scale=())
        size = fitting_group(columns, group) if kind == "int4" else 0
        if size:
            return Form("int4", shape, scale=(rows, columns // size), group=size, rotate=turn)
        return Form("int8", shape, scale=(rows, 1), rotate=turn)

    return choose
