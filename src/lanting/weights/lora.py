"""LoRAs from files to a network: their tensors read, scaled, and hung on its Linears."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from lanting.core.errors import ModelError, first_line
from lanting.nn.deltas import Decomposed, Delta, Full, Hadamard, Kronecker, LowRank, Shift
from lanting.nn.lora import Change, Factors, attach
from lanting.weights.lora_file import Lora
from lanting.weights.lora_pieces import Piece


def attach_loras(transformer: nn.Module, loras: Sequence[Lora], dtype: torch.dtype, device: torch.device) -> int:
    """Hang all LoRAs of a strength other than 0 on the model. Returns how many Linears got something.

    A LoRA's number for `nn.lora.set_strengths` is its place in `loras`.
    """
    parts: dict[str, list[Factors | Change]] = {}
    for index, lora in enumerate(loras):
        if lora.strength == 0:
            continue
        for module, part in load_parts(lora, dtype, device, index):
            parts.setdefault(module, []).append(part)
    return attach(transformer, parts, [lora.strength for lora in loras])


def load_parts(
    lora: Lora, dtype: torch.dtype, device: torch.device, index: int = 0, only: str | None = None
) -> Iterator[tuple[str, Factors | Change]]:
    """(path of a Linear, what the file adds to it), its scale included and its strength not; of all Linears, or of
    `only` one. Raises ModelError."""
    pieces = lora.pieces if only is None else {only: lora.pieces[only]} if only in lora.pieces else {}
    try:
        with safe_open(str(lora.path), framework="pt") as file:
            for module, piece in pieces.items():
                tensors = {
                    role: _rows(file.get_tensor(key), role, piece).to(
                        device, torch.float32 if role == "magnitude" else dtype
                    )
                    for role, key in piece.keys.items()
                    if role != "alpha"
                }
                for part in _parts(piece, tensors, index):
                    yield module, part
    except (SafetensorError, OSError) as error:
        raise ModelError("{path} can't be read: {reason}", path=str(lora.path), reason=first_line(error)) from None


def _rows(tensor: Tensor, role: str, piece: Piece) -> Tensor:
    """This Linear's share of a tensor that several have in common; lengths of rows lose their second axis."""
    if role == "magnitude" and tensor.shape[-1:] == (1,) and tensor.ndim == 2:
        tensor = tensor[:, 0]
    if piece.rows is None or role == "down" or (role == "magnitude" and tensor.ndim == 2):
        return tensor
    return tensor[slice(*piece.rows)]


def _parts(piece: Piece, tensors: Mapping[str, Tensor], index: int) -> Iterator[Factors | Change]:
    if piece.form == "lora" and "magnitude" not in tensors:
        yield Factors(tensors["down"], tensors["up"], piece.scale, index)
    elif piece.form != "bias":
        delta = _delta(piece, tensors)
        yield Change(Decomposed(delta, tensors["magnitude"]) if "magnitude" in tensors else delta, index)
    if "bias" in tensors:
        yield Change(Shift(tensors["bias"]), index)
    if "up_bias" in tensors:  # PEFT adds it within what alpha scales
        yield Change(Shift(tensors["up_bias"] * piece.scale), index)


def _delta(piece: Piece, tensors: Mapping[str, Tensor]) -> Delta:
    if piece.form == "lora":
        return LowRank(tensors["down"], tensors["up"], piece.scale)
    if piece.form == "loha":
        return Hadamard(*(tensors[f"hada_{role}"] for role in ("w1_a", "w1_b", "w2_a", "w2_b")), scale=piece.scale)
    if piece.form == "diff":
        return Full(tensors["diff"])
    w1 = tensors.get("lokr_w1")
    if w1 is None:
        w1 = (tensors["lokr_w1_a"].float() @ tensors["lokr_w1_b"].float()).to(tensors["lokr_w1_a"].dtype)
    w2 = (tensors["lokr_w2"],) if "lokr_w2" in tensors else (tensors["lokr_w2_b"], tensors["lokr_w2_a"])
    return Kronecker(w1, w2, piece.scale)
