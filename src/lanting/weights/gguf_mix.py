"""Which tensor of a transformer gets which GGUF type, mix by mix; no torch.

The mixes follow what ComfyUI-GGUF's converter and llama.cpp mean by their names, so a file called Q4_K_M holds what
people expect of one. The rules, in the order in which they apply, the first that fits decides:

    tensor                                       type           why
    one side, or at most 1,024 weights           F32            biases and norms: no size, and readers want them exact
    img_in, txt_in, proj_out, norm_out,          as they are    every latent, word and velocity goes through them once;
      time_text_embed                                           0.2 % of the file; "as they are" is bfloat16
    blocks at both ends (K mixes from 2 to 5     `ends`         their errors are carried through all blocks, or are not
      bits, M sizes)                                            made good by any that follow
    to_v, add_v_proj                             `value`        what attention copies; queries and keys are normed after
    img_mlp.net.2, txt_mlp.net.2                 `down`         inputs with outliers, after the activation
    everything else, modulation included         `base`         modulation is a third of the weights, and others' files
                                                                quantize it like this too

Rows that a K type's blocks of 256 do not fill get a type with blocks of 32 that has at least as many bits, and rows
that those don't fill either stay 16-bit floats.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from lanting.nn.blocks import TYPES

SENSITIVE = ("img_in.", "txt_in.", "proj_out.", "norm_out.", "time_text_embed.")
SMALL = 1024  # weights
VALUE = re.compile(r"\.(to_v|add_v_proj)\.weight$")
DOWN = re.compile(r"\.(img_mlp|txt_mlp)\.net\.2\.weight$")
BLOCK = re.compile(r"^transformer_blocks\.(\d+)\.")
NARROW = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}


@dataclass(frozen=True, slots=True)
class Mix:
    """`number` is what `general.file_type` says. `early`: another type for the values of the first blocks, and of how
    many of them."""

    number: int
    base: str
    value: str = ""
    down: str = ""
    ends: str = ""
    early: tuple[int, str] = (0, "")


MIXES = {
    "bf16": Mix(32, "BF16"),
    "f16": Mix(1, "F16"),
    "q8_0": Mix(7, "Q8_0"),
    "q6_k": Mix(18, "Q6_K"),
    "q5_k_m": Mix(17, "Q5_K", value="Q6_K", down="Q6_K", ends="Q6_K"),
    "q5_k_s": Mix(16, "Q5_K"),
    "q5_1": Mix(9, "Q5_1"),
    "q5_0": Mix(8, "Q5_0", down="Q5_1"),
    "q4_k_m": Mix(15, "Q4_K", value="Q6_K", down="Q6_K", ends="Q5_K"),
    "q4_k_s": Mix(14, "Q4_K", down="Q5_K", early=(2, "Q5_K")),
    "q4_1": Mix(3, "Q4_1"),
    "q4_0": Mix(2, "Q4_0", down="Q4_1"),
    "q3_k_l": Mix(13, "Q3_K", value="Q5_K", down="Q5_K", ends="Q4_K"),
    "q3_k_m": Mix(12, "Q3_K", value="Q4_K", down="Q4_K", ends="Q4_K"),
    "q3_k_s": Mix(11, "Q3_K", ends="Q4_K"),
    "q2_k": Mix(10, "Q2_K", value="Q3_K", ends="Q4_K"),
}


def tensor_types(shapes: Mapping[str, tuple[int, ...]], mix: str) -> dict[str, str]:
    """Name -> block type of every tensor of a transformer. Raises KeyError for a mix that is not in `MIXES`."""
    chosen = MIXES[mix]
    plain = "F16" if chosen.base == "F16" else "BF16"  # the releases are bfloat16
    last = max((int(found[1]) for name in shapes if (found := BLOCK.match(name))), default=-1)
    return {name: _type(name, shape, chosen, last, plain) for name, shape in shapes.items()}


def tensor_bytes(shape: tuple[int, ...], kind: str) -> int:
    return prod(shape) // TYPES[kind].values * TYPES[kind].size


def _type(name: str, shape: tuple[int, ...], mix: Mix, last: int, plain: str) -> str:
    if len(shape) < 2 or prod(shape) <= SMALL:
        return "F32"
    if name.startswith(SENSITIVE) or len(shape) > 2:
        return plain
    found = BLOCK.match(name)
    block = int(found[1]) if found else -1
    kind = mix.base
    if mix.ends and block in (0, last):
        kind = mix.ends
    elif VALUE.search(name):
        kind = mix.early[1] if 0 <= block < mix.early[0] else mix.value or kind
    elif DOWN.search(name):
        kind = mix.down or kind
    return fitting(kind, shape[-1], plain)


def fitting(kind: str, columns: int, plain: str) -> str:
    """The type itself, or one whose blocks fill the rows."""
    for candidate in (kind, NARROW.get(kind, kind)):
        if columns % TYPES[candidate].values == 0:
            return candidate
    return plain
