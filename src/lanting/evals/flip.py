"""FLIP: how different two pictures look to a person who flips between them, 0 (the same) to 1.

After P. Andersson, J. Nilsson, T. Akenine-Möller, M. Oskarsson, K. Åström, M. D. Fairchild: "FLIP: A Difference
Evaluator for Alternating Images" (HPG 2020), for pictures of low dynamic range. Every constant below is the paper's.
Colours are blurred as the eye blurs them and compared in a uniform space; where edges and points differ as well, the
colour difference counts for more. Rejected: mean squared error, which calls a shifted texture and a wrong colour alike.
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import conv2d, pad

PIXELS_PER_DEGREE = 0.7 * (3840 / 0.7) * math.pi / 180  # 0.7 m from a screen 0.7 m and 3840 pixels wide: 67.02
# contrast sensitivity of the three opponent channels: a1, b1, a2, b2 of two Gaussians
SENSITIVITY = {"A": (1.0, 0.0047, 0.0, 1e-5), "RG": (1.0, 0.0053, 0.0, 1e-5), "BY": (34.1, 0.04, 13.5, 0.025)}
WIDEST_B = 0.04
COLOR_POWER, COLOR_CUT, COLOR_TOP = 0.7, 0.4, 0.95  # q_c, p_c, p_t
FEATURE_WIDTH, FEATURE_POWER = 0.082, 0.5  # w in degrees, q_f

# linear sRGB -> XYZ, from the primaries and the white point D65 as exact fractions
TO_XYZ = torch.tensor(
    [
        [10135552 / 24577794, 8788810 / 24577794, 4435075 / 24577794],
        [2613072 / 12288897, 8788810 / 12288897, 887015 / 12288897],
        [1425312 / 73733382, 8788810 / 73733382, 70074185 / 73733382],
    ],
    dtype=torch.float64,
)
FROM_XYZ = torch.linalg.inv(TO_XYZ)
WHITE = TO_XYZ.sum(1)  # XYZ of (1, 1, 1)


def flip(one: Tensor, other: Tensor, ppd: float = PIXELS_PER_DEGREE) -> Tensor:
    """The map of differences, (H, W) float32 in [0, 1].

    one, other  (H, W, 3) sRGB: uint8, or floats in [0, 1]
    ppd         pixels per degree of the viewer's eye

    Raises ValueError where the two differ in size.
    """
    if one.shape != other.shape:
        raise ValueError(f"pictures of one size are compared, not {tuple(one.shape)} and {tuple(other.shape)}")
    first, second = (_opponent(_linear(picture)) for picture in (one, other))  # (3, H, W)
    color = _redistribute(_hyab(_hunt(_seen(first, ppd)), _hunt(_seen(second, ppd))) ** COLOR_POWER)
    return (color ** (1 - _features(first[0], second[0], ppd))).float()


def mean_flip(one: Tensor, other: Tensor, ppd: float = PIXELS_PER_DEGREE) -> float:
    """The mean of the map: one number for a pair of pictures."""
    return float(flip(one, other, ppd).mean())


def _linear(picture: Tensor) -> Tensor:
    """sRGB (H, W, 3) -> linear (3, H, W) float64 in [0, 1]."""
    values = picture.double() / (255 if picture.dtype == torch.uint8 else 1)
    values = values.clamp(0, 1).permute(2, 0, 1)
    return torch.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def _mix(matrix: Tensor, planes: Tensor) -> Tensor:
    return torch.einsum("ij,jhw->ihw", matrix, planes)


def _opponent(linear: Tensor) -> Tensor:
    """Linear RGB -> YCxCz, an opponent space that is linear in light: (3, H, W)."""
    x, y, z = _mix(TO_XYZ, linear) / WHITE[:, None, None]
    return torch.stack((116 * y - 16, 500 * (x - y), 200 * (y - z)))


def _seen(opponent: Tensor, ppd: float) -> Tensor:
    """What is left of YCxCz behind the eye's blur, as linear RGB in [0, 1]: (3, H, W)."""
    blurred = torch.cat(
        [_convolve(plane, _sensitivity(name, ppd)) for name, plane in zip(SENSITIVITY, opponent, strict=True)]
    )
    y = (blurred[0] + 16) / 116
    xyz = torch.stack((y + blurred[1] / 500, y, y - blurred[2] / 200)) * WHITE[:, None, None]
    return _mix(FROM_XYZ, xyz).clamp(0, 1)


def _hunt(linear: Tensor) -> Tensor:
    """Linear RGB -> CIELab whose colourfulness falls with the lightness (Hunt's effect): (3, H, W)."""
    ratio, delta = _mix(TO_XYZ, linear) / WHITE[:, None, None], 6 / 29
    x, y, z = torch.where(ratio > delta**3, ratio.clamp_min(1e-12) ** (1 / 3), ratio / (3 * delta**2) + 4 / 29)
    lightness = 116 * y - 16
    return torch.stack((lightness, 0.01 * lightness * 500 * (x - y), 0.01 * lightness * 200 * (y - z)))


def _hyab(one: Tensor, other: Tensor) -> Tensor:
    """Distance for large colour differences: lightness by the city block, colour straight: (H, W)."""
    apart = one - other
    return apart[0].abs() + torch.linalg.vector_norm(apart[1:], dim=0)


@cache
def _largest() -> float:
    """The largest colour difference there is, between green and blue, in the units of `_redistribute`."""
    green, blue = torch.eye(3, dtype=torch.float64)[1:, :, None, None]  # (3, 1, 1) each
    return float(_hyab(_hunt(green), _hunt(blue))) ** COLOR_POWER


def _redistribute(difference: Tensor) -> Tensor:
    """To [0, 1]: the lower part of the range gets most of it, since large differences look equally large."""
    most = _largest()
    cut = COLOR_CUT * most
    low = COLOR_TOP / cut * difference
    return torch.where(difference < cut, low, COLOR_TOP + (difference - cut) / (most - cut) * (1 - COLOR_TOP))


def _features(one: Tensor, other: Tensor, ppd: float) -> Tensor:
    """How much edges and points differ, (H, W) in [0, 1]; `one`, `other`: the lightness planes Y (H, W)."""
    worst = torch.zeros_like(one)
    for kernel in _detectors(ppd):
        found = [
            torch.linalg.vector_norm(
                torch.cat([_convolve((y + 16) / 116, kernel), _convolve((y + 16) / 116, kernel.T)]), dim=0
            )
            for y in (one, other)
        ]
        worst = torch.maximum(worst, (found[0] - found[1]).abs())
    return (worst / math.sqrt(2)).clamp(0, 1) ** FEATURE_POWER


def _convolve(plane: Tensor, kernel: Tensor) -> Tensor:
    """(H, W) with a kernel of odd sides; the border lines are repeated outwards: (1, H, W).

    All kernels here are one or two products of a column and a row, so they are taken apart, and each part runs along
    one side. In one piece they took thirteen times as long, and PyTorch laid out all 441 neighbours of each pixel.
    """
    high, wide = kernel.shape[0] // 2, kernel.shape[1] // 2
    padded = pad(plane[None, None], (wide, wide, high, high), mode="replicate")
    columns, sizes, rows = torch.linalg.svd(kernel)
    parts = range(int((sizes > 1e-12 * sizes[0]).sum()))
    across = [conv2d(padded, (sizes[i] * rows[i])[None, None, None]) for i in parts]
    return torch.stack(
        [conv2d(row, columns[:, i][None, None, :, None]) for i, row in zip(parts, across, strict=True)]
    ).sum(0)[0]


def _squares(radius: int) -> tuple[Tensor, Tensor]:
    """(x of every place, x² + y²) of a square kernel, in pixels from its middle."""
    steps = torch.arange(-radius, radius + 1, dtype=torch.float64)
    return steps.expand(2 * radius + 1, -1), steps[:, None] ** 2 + steps[None] ** 2


@cache
def _sensitivity(channel: str, ppd: float) -> Tensor:
    """The blur of one opponent channel; sums to 1."""
    a1, b1, a2, b2 = SENSITIVITY[channel]
    radius = math.ceil(3 * math.sqrt(WIDEST_B / (2 * math.pi**2)) * ppd)
    square = _squares(radius)[1] / ppd**2  # degrees²
    kernel = sum(
        a * math.sqrt(math.pi / b) * torch.exp(-(math.pi**2) * square / b) for a, b in ((a1, b1), (a2, b2)) if a
    )
    assert isinstance(kernel, Tensor)
    return kernel / kernel.sum()


@cache
def _detectors(ppd: float) -> tuple[Tensor, Tensor]:
    """Detectors of edges and of points along x: their positive parts sum to 1 and the negative ones to -1."""
    sigma = 0.5 * FEATURE_WIDTH * ppd
    x, square = _squares(math.ceil(3 * sigma))
    bell = torch.exp(-square / (2 * sigma**2))
    return _balanced(-x * bell), _balanced((x**2 / sigma**2 - 1) * bell)


def _balanced(kernel: Tensor) -> Tensor:
    return torch.where(kernel > 0, kernel / kernel.clamp_min(0).sum(), kernel / -kernel.clamp_max(0).sum())
