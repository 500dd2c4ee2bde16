"""A transformer's files and LoRAs as one set of weights: for those who want the sum in a file of its own.

A view over the files: each changed weight is expanded, summed in float32 and rounded once, when it is read; no more
than one is in memory. Rejected: merging a built network, which would have to fit into memory first.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lanting.core.errors import ModelError
from lanting.nn.lora import Change, Factors, LoraLinear
from lanting.weights.checkpoint import TORCH, Checkpoint
from lanting.weights.forms import FLOATS, shapes
from lanting.weights.headers import TensorInfo
from lanting.weights.lora import load_parts
from lanting.weights.lora_file import Lora
from lanting.weights.quantize import dense_reader


@dataclass(frozen=True)
class MergedCheckpoint(Checkpoint):
    """A checkpoint whose Linears contain LoRAs."""

    base: Checkpoint | None = None
    loras: tuple[Lora, ...] = ()

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        assert self.base is not None
        found: dict[str, Tensor] = {}
        for name in names:
            path, _, part = name.rpartition(".")
            if part in ("weight", "bias") and any(path in lora.pieces for lora in self.loras):
                found[name] = self._merged(path, part)
            else:
                found |= self.base.read([name])
        return found

    def _merged(self, path: str, part: str) -> Tensor:
        """One weight or bias with everything added."""
        assert self.base is not None
        read, bias = dense_reader(self.base), f"{path}.bias"
        with torch.device("meta"):
            linear = nn.Linear(1, 1, bias in self.base.infos)
        linear.weight = nn.Parameter(read(f"{path}.weight").float(), requires_grad=False)
        linear.out_features, linear.in_features = linear.weight.shape
        if bias in self.base.infos:
            linear.bias = nn.Parameter(read(bias).float(), requires_grad=False)
        parts: list[Factors | Change] = []
        for index, lora in enumerate(self.loras):
            found = load_parts(lora, torch.float32, torch.device("cpu"), index, only=path)
            parts += [each for _, each in found]
        wrapped = LoraLinear(linear, parts, [lora.strength for lora in self.loras])
        if part == "weight":
            return wrapped.dense(torch.float32)
        shifted = wrapped.bias(getattr(torch, TORCH[self.infos[bias].dtype]))
        assert shifted is not None
        return shifted


def merge_loras(checkpoint: Checkpoint, loras: Sequence[Lora]) -> Checkpoint:
    """The same tensors with the LoRAs in them; changed weights read as float32. Those of strength 0 are left out.

    Raises ModelError for a LoRA that adds a bias where the model has none.
    """
    chosen = tuple(lora for lora in loras if lora.strength)
    infos, sides = dict(checkpoint.infos), shapes(checkpoint)
    for lora in chosen:
        for path, piece in lora.pieces.items():
            if {"bias", "up_bias"} & piece.keys.keys() and f"{path}.bias" not in infos:
                raise ModelError(
                    "{file} changes the bias of {module}, which has none: use a LoRA that was made for this model",
                    **{"file": lora.path.name, "module": path},
                )
            weight, bias = f"{path}.weight", f"{path}.bias"
            infos[weight] = _float32(replace(infos[weight], shape=sides[weight]))
            if bias in infos and infos[bias].dtype not in FLOATS:
                infos[bias] = _float32(infos[bias])
    own = checkpoint
    return MergedCheckpoint(own.label, own.where, infos, own.metadata, own.layers, base=own, loras=chosen)


def _float32(info: TensorInfo) -> TensorInfo:
    """As if it lay in a file as plain numbers."""
    return TensorInfo("F32", info.shape, info.start, info.start + 4 * info.count)
