"""What programs that quantize language models call their tensors, by names alone; without torch.

AWQ and GPTQ keep a Linear's codes in `X.qweight`, compressed-tensors in `X.weight_packed`. To everything here they are
`X.weight` from the moment a file is opened, so that a config is read off them and a network finds them as it does any
other. Nunchaku's `qweight`, which has no `scales` beside it, keeps its name.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from lanting.core.errors import ModelError
from lanting.core.lang import Phrase

if TYPE_CHECKING:
    from lanting.weights.checkpoint import Checkpoint

PACKING = "quantization_config"  # in a config.json, and then as JSON in `Checkpoint.metadata`: how all are packed
MODELOPT = "modelopt"  # NVIDIA's, as `quant_method`
APART = {  # files that said it before config.json did, or say it beside
    "hf_quant_config.json": MODELOPT,
    "quantize_config.json": "gptq",
    "quantization_config.json": "sdnq",
}
CODES = {"qweight": "scales", "weight_packed": "weight_scale"}  # what codes are called -> what is beside them then
SIDES = (  # beside them, and no part of the network
    *("qzeros", "scales", "g_idx"),
    *("weight_shape", "weight_zero_point", "weight_g_idx", "weight_global_scale"),
    *("q_scale", "k_scale", "v_scale"),  # for caches of few bits
    *("input_global_scale", "input_zero_point", "output_scale", "output_zero_point"),  # for kernels of few-bit inputs
)
REFUSED = {  # a tensor that only one program writes -> its scheme, which nothing here reads
    "encoded_exponent": Phrase("DFloat11 without its config.json"),
    "q_weight": "EXL2",
    "trellis": "EXL3",
    "W_q": "HQQ",
    "weight_scales": "EETQ",
    "codebooks": "AQLM",
    "centroids": "VPTQ",
    "_data": "quanto",
    "B": "Marlin",
    "bitmask": "2:4 sparse",
    "weight_bitmask": "2:4 sparse",
    "scale_packed": "Marlin 2:4",
}


def our_codes(names: Iterable[str]) -> dict[str, str]:
    """Our name -> name as it is, of all."""
    names = list(names)
    known = set(names)
    found = {name: name for name in names}
    for name in names:
        path, dot, part = name.rpartition(".")
        ours = f"{path}.weight"
        if dot and part in CODES and f"{path}.{CODES[part]}" in known and ours not in known:
            del found[name]
            found[ours] = name
    return found


def as_weights(checkpoint: Checkpoint) -> Checkpoint:
    """The same tensors, codes under the name of a weight."""
    names = our_codes(checkpoint.infos)
    return checkpoint.renamed(names) if any(ours != theirs for ours, theirs in names.items()) else checkpoint


def packing_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """What the folder's config.json says of how all is packed; empty where it says nothing."""
    return table_of(checkpoint.metadata.get(PACKING, "{}"))


@lru_cache(maxsize=8)
def table_of(text: str) -> dict[str, Any]:
    """Asked for each weight, and never changed."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):  # a file's own note, whoever wrote it
        found = None
    return found if isinstance(found, dict) else {}


def unreadable(checkpoint: Checkpoint, path: str, what: str) -> ModelError:
    return ModelError(
        "the {label} stores {path} as {what}, which this version can't read: get a bf16, fp8, int8 or GGUF file of the "
        "same model",
        **{"label": checkpoint.label, "path": path, "what": what},
    )


def contradicts(checkpoint: Checkpoint, path: str, error: str) -> ModelError:
    return ModelError(
        "the {label} contradicts itself in {path} ({error}): download it again",
        **{"label": checkpoint.label, "path": path, "error": error},
    )
