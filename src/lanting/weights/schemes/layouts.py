"""Packed weights of other programs, put in the order in which our Linears hold them.

A `Form` with a `layout` names the parts as the file has them; the function here makes the Linear's buffers of them.
What a layout is told by is in the module that reads the headers of its program.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from lanting.weights.form import Form
from lanting.weights.schemes import codes, ordered, svdq, svdq_tiles
from lanting.weights.schemes.compressed import BYTES, COMPRESSED, FLOATS, OPTIMIZED
from lanting.weights.schemes.gptq import AWQ, GPTQ, GPTQ_V2
from lanting.weights.schemes.mlx import MLX
from lanting.weights.schemes.sdnq import SDNQ, TURNED

Parts = Mapping[str, Tensor]
LAYOUTS: dict[str, Callable[[Form, Parts], dict[str, Tensor]]] = {
    svdq.PLAIN: svdq_tiles.low_rank,
    svdq.SHIFTED: svdq_tiles.low_rank,
    svdq.ROWS: svdq_tiles.modulation,
    svdq.SIX: svdq_tiles.modulation,
    MLX: ordered.mlx,
    SDNQ: ordered.sdnq,
    TURNED: ordered.sdnq,
    AWQ: codes.awq,
    GPTQ: codes.gptq,
    GPTQ_V2: codes.gptq,
    COMPRESSED: codes.compressed,
    BYTES: codes.whole_numbers,
    FLOATS: codes.few_bits,
    OPTIMIZED: codes.few_bits,
}
"""Layout -> (a form, its parts by the names they have in `Form.names`) -> the Linear's buffers; the bias only where the
form names one."""
