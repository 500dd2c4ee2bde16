"""Files as nunchaku has them, packed number by number from a description of its tiles, and what they mean.

`Meant` and `Turned` compute as nunchaku's own forward pass does, in the plainest way: shifted inputs, rows in turns of
six, and what was added to a modulation's scales taken off again.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lanting.nn.mmdit import QwenImageTransformer, TransformerConfig
from lanting.nn.single_stream import QwenImage21Transformer, SingleStreamConfig

SHAPE = TransformerConfig(2, 4, 32, 32, axes_dims_rope=(4, 14, 14))  # words as tiny readers make them
SHIFT = 0.171875
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])
FUSED = {"attn.to_qkv": ("to_q", "to_k", "to_v"), "attn.add_qkv_proj": ("add_q_proj", "add_k_proj", "add_v_proj")}
SINGLE = ("attn.to_out.0", "attn.to_add_out", *(f"{s}_mlp.net.{n}" for s in ("img", "txt") for n in ("0.proj", "2")))
State = dict[str, Tensor]


class Meant(nn.Module):
    """R ((x + shift) / smooth) + up (down x) + bias."""

    def __init__(self, *parts: Tensor, shift: float = 0.0):
        super().__init__()
        self.parts, self.shift = [each.float() for each in parts], shift

    def forward(self, x: Tensor) -> Tensor:
        residual, smooth, down, up, bias = self.parts
        return F.linear((x + self.shift) / smooth, residual) + F.linear(F.linear(x, down), up) + bias


class Plain(nn.Module):
    """A modulation as it is."""

    def __init__(self, weight: Tensor, bias: Tensor):
        super().__init__()
        self.weight, self.bias = weight, bias.float()

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class Turned(Plain):
    """One whose results are of the first feature six, then of the second six ..."""

    def forward(self, x: Tensor) -> Tensor:
        six = F.linear(x, self.weight, self.bias).unflatten(-1, (-1, 6)).transpose(-1, -2)  # (..., 6, D)
        return (six - torch.tensor([0, 1, 0, 0, 1, 0])[:, None]).flatten(-2)


def at(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """The numbers of rows and columns of a matrix, flat."""
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    return row.flatten(), column.flatten()


def tiled_codes(codes: Tensor) -> Tensor:
    """(out, in) of 0 to 15 -> qweight int8 (out, in / 2)."""
    rows, columns = codes.shape
    n, k = at(rows, columns)
    tile = n // 128 * (columns // 64) + k // 64
    lane = n % 128 // 16 * 32 + n % 8 * 4 + k % 32 // 8  # of eight rows and four words
    word = (tile * 256 + lane) * 4 + n % 16 // 8 * 2 + k % 64 // 32
    flat = torch.zeros(rows * columns, dtype=torch.uint8)
    flat[word * 8 + k % 8] = codes.flatten().to(torch.uint8)
    return (flat[::2] | flat[1::2] << 4).view(torch.int8).view(rows, -1)


def tiled_rows(numbers: Tensor) -> Tensor:
    """(rows, groups) -> (groups, rows); (rows,) stays a vector."""
    rows, groups = numbers.shape[0], numbers.numel() // numbers.shape[0]
    n, g = at(rows, groups)
    place = n // 128 * groups * 128 + g * 128 + n % 128 // 16 * 16 + n % 8 // 2 * 4 + n % 16 // 8 * 2 + n % 2
    flat = torch.empty_like(numbers.flatten())
    flat[place] = numbers.flatten()
    return flat if numbers.ndim == 1 else flat.view(groups, rows)


def tiled_small(scales: Tensor) -> Tensor:
    """e4m3 (rows, groups of 16) -> (groups, rows)."""
    rows, groups = scales.shape
    n, g = at(rows, groups)
    place = (n // 128 * (groups // 4) + g // 4) * 512 + n % 8 * 64 + n % 32 // 8 * 16 + n % 128 // 32 * 4 + g % 4
    flat = torch.empty(rows * groups, dtype=torch.uint8)
    flat[place] = scales.view(torch.uint8).flatten()
    return flat.view(scales.dtype).view(groups, rows)


def tiled_thin(matrix: Tensor, down: bool) -> Tensor:
    """`down` (rank, in) -> (in, rank), or `up` (out, rank) -> (out, rank)."""
    n, k = at(*matrix.shape)
    tiles = (k // 16 * (matrix.shape[0] // 16) + n // 16) if down else (n // 16 * (matrix.shape[1] // 16) + k // 16)
    place = tiles * 256 + n % 8 * 32 + k % 8 // 2 * 8 + n % 16 // 8 * 4 + k % 16 // 8 * 2 + k % 2
    flat = torch.empty_like(matrix.flatten())
    flat[place] = matrix.flatten()
    return flat.view(matrix.shape[::-1] if down else matrix.shape)


def tiled_affine(codes: Tensor) -> Tensor:
    """A modulation's (out, in) of 0 to 15 -> qweight int32 (out / 4, in / 2)."""
    rows, columns = codes.shape
    n, k = at(rows, columns)
    word = ((n // 4 * (columns // 64) + k // 64) * 4 + n % 4) * 16 + k % 64 // 32 * 8 + k % 8  # of 16 bits
    flat = torch.zeros(rows * columns, dtype=torch.uint8)
    flat[word * 4 + k % 32 // 8] = codes.flatten().to(torch.uint8)
    return (flat[::2] | flat[1::2] << 4).view(torch.int32).view(rows // 4, columns // 2)


@dataclass(frozen=True)
class Numbers:
    """What `make.py` gives deepcompressor, by formulas, so that the tests have it, too. Scales are powers of two and
    bfloat16 holds everything exactly."""

    rows: int = 128
    columns: int = 128

    def codes(self, low: int = -8) -> Tensor:
        """(rows, columns) from `low` to `low` + 15."""
        n, k = torch.arange(self.rows)[:, None], torch.arange(self.columns)
        return (n * 31 + k * 17 + n * k * 7 + n // 16 + k // 32) % 16 + low

    def scales(self, group: int) -> Tensor:
        """(rows, groups)"""
        n, g = torch.arange(self.rows)[:, None], torch.arange(self.columns // group)
        return torch.exp2(-((n * 3 + n // 16 + g * 5) % 8).float())

    @property
    def smooth(self) -> Tensor:
        return 1 + torch.arange(self.columns) % 128 / 128

    @property
    def bias(self) -> Tensor:
        return torch.arange(self.rows) / 64 - 1

    def thin(self, count: int, rank: int = 16) -> Tensor:
        """(count, rank)"""
        return (torch.arange(count * rank) % 251).view(count, rank) / 128 - 1


def low_rank(rows: int, columns: int, kind: str, rank: int) -> tuple[State, tuple[Tensor, ...]]:
    """A Linear with random contents: its tensors, and (R, smooth, down, up, bias)."""
    codes, smooth = torch.randint(16, (rows, columns)), (torch.rand(columns) + 0.5).bfloat16()
    down, up = (torch.randn(rank, columns) / 40).bfloat16(), (torch.randn(rows, rank) / 8).bfloat16()
    bias = (torch.randn(rows) / 8).bfloat16()
    tensors = {
        "qweight": tiled_codes(codes),
        "smooth_factor": tiled_rows(smooth),
        "smooth_factor_orig": torch.rand(columns).bfloat16(),  # read by nobody
        "proj_down": tiled_thin(down, down=True),
        "proj_up": tiled_thin(up, down=False),
        "bias": tiled_rows(bias),
    }
    if kind == "int4":
        scales = (torch.rand(rows, columns // 64) / 50).bfloat16()
        tensors["wscales"], values = tiled_rows(scales), codes - 16 * (codes > 7)
        residual = values * scales.float().repeat_interleave(64, 1)
    else:
        small, second = (torch.rand(rows, columns // 16) * 9).to(torch.float8_e4m3fn), torch.rand(rows).bfloat16()
        whole = torch.tensor([0.0045]).bfloat16()
        tensors |= {"wscales": tiled_small(small), "wcscales": tiled_rows(second), "wtscale": whole}
        residual = E2M1[codes] * (small.float() * (second.float() * whole.float())[:, None]).repeat_interleave(16, 1)
    return tensors, (residual, smooth, down, up, bias)


def affine(rows: int, columns: int) -> tuple[State, tuple[Tensor, Tensor]]:
    """A modulation: its tensors, and (weight, bias) in the order in which they are stored."""
    codes, scales = torch.randint(16, (rows, columns)), (torch.rand(rows, columns // 64) / 50).bfloat16()
    zeros, bias = (-7.5 * scales * torch.rand_like(scales)), (torch.randn(rows) / 4 + 1).bfloat16()
    tensors = {"qweight": tiled_affine(codes), "bias": bias}
    tensors |= {"wscales": scales.T.contiguous(), "wzeros": zeros.T.contiguous()}
    weight = codes * scales.float().repeat_interleave(64, 1) + zeros.float().repeat_interleave(64, 1)
    return tensors, (weight, bias)


def file_and_net(kind: str, rank: int, whole: bool = True) -> tuple[State, QwenImageTransformer]:
    """A whole transformer as nunchaku's file of it, and one that computes as nunchaku does; or (not `whole`) with the
    same tensors for the network as it is: nothing fused, shifted or in turns."""
    torch.manual_seed(0)
    fused = FUSED if whole else {f"attn.{name}": (name,) for names in FUSED.values() for name in names}
    net = QwenImageTransformer(SHAPE).eval().requires_grad_(False)
    tensors = {name: each.bfloat16() for name, each in net.state_dict().items()}
    net.load_state_dict({name: each.float() for name, each in tensors.items()})
    for place in range(SHAPE.num_layers):
        stem, block = f"transformer_blocks.{place}", net.transformer_blocks[place]
        tensors = {name: each for name, each in tensors.items() if not name.startswith(stem) or "norm" in name}
        for path in ("img_mod.1", "txt_mod.1"):
            made, (weight, bias) = affine(6 * SHAPE.width, SHAPE.width)
            tensors |= {f"{stem}.{path}.{part}": each for part, each in made.items()}
            put(block, path, Turned(weight, bias) if whole else Plain(weight, bias))
        for path in (*fused, *SINGLE):
            names = [f"attn.{name}" for name in fused[path]] if path in fused else [path]
            linear = block.get_submodule(names[0])
            assert isinstance(linear, nn.Linear)
            made, parts = low_rank(linear.out_features * len(names), linear.in_features, kind, rank)
            residual, smooth, down, up, bias = parts
            tensors |= {f"{stem}.{path}.{part}": each for part, each in made.items()}
            shift = SHIFT if whole and kind == "int4" and path.endswith("net.2") else 0.0
            thirds = zip(*(each.chunk(len(names)) for each in (residual, up, bias)), strict=True)
            for name, (some, ups, biases) in zip(names, thirds, strict=True):
                put(block, name, Meant(some, smooth, down, ups, biases, shift=shift))
    return tensors, net


def single_file_and_net() -> tuple[State, QwenImage21Transformer]:
    """Qwen-Image-2.1: nothing is fused, and biases of zeros are in the file."""
    torch.manual_seed(3)
    net = QwenImage21Transformer(SingleStreamConfig(2, 4, 32, 48, 16, 16, axes_dims_rope=(4, 14, 14))).eval()
    net.requires_grad_(False)
    tensors = {name: each.bfloat16() for name, each in net.state_dict().items()}
    net.load_state_dict({name: each.float() for name, each in tensors.items()})
    for path, linear in list(net.named_modules()):
        if path.startswith("transformer_blocks.") and isinstance(linear, nn.Linear):
            made, (*parts, bias) = low_rank(linear.out_features, linear.in_features, "nvfp4", 16)
            del tensors[f"{path}.weight"]
            tensors |= {f"{path}.{part}": each for part, each in (made | {"bias": bias.zero_()}).items()}
            put(net, path, Meant(*parts, bias))
    return tensors, net


def put(root: nn.Module, path: str, new: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(root.get_submodule(parent), name, new)


def notes(rank: int, **config: object) -> dict[str, str]:
    """A file's metadata."""
    about = {"_class_name": "QwenImageTransformer2DModel", "num_layers": SHAPE.num_layers, **config}
    return {"config": json.dumps(about), "quantization_config": json.dumps({"method": "svdquant", "rank": rank})}
