"""Packed weights of other programs, put in the order in which our Linears hold them.

A `Form` with a `layout` names the parts as the file has them; the function here makes the Linear's buffers of them.
What a layout is told by is in the module that reads the headers of its program.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from lanting.weights.forms import Form

Parts = Mapping[str, Tensor]
LAYOUTS: dict[str, Callable[[Form, Parts], dict[str, Tensor]]] = {}
"""Layout -> (a form, its parts by the names they have in `Form.names`) -> the Linear's buffers but for the bias."""
