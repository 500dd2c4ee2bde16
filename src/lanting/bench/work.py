"""What a case has to do: operations by part and type of number, and the bytes that must move in any case.

A multiplication and an addition are two operations, as PyTorch's own counter has it; norms, gates and rotations
count as none, because they are what a fast program hides. Bytes are every weight once, and what goes in and comes out:
all else may stay in a cache. So the limit that follows can be neared but never passed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from lanting.plan.activations import Job
from lanting.plan.geometry import Language, Transformer, Vae
from lanting.plan.kinds import KINDS, Kind

WIDTH = {"float32": 4, "bfloat16": 2}  # bytes of a number


@dataclass(frozen=True, slots=True)
class Share:
    """`part` is "linears", "attention" or "convolutions"; `type` the numbers that are multiplied."""

    part: str
    type: str
    operations: float


@dataclass(frozen=True, slots=True)
class Work:
    shares: tuple[Share, ...]
    bytes: float = 0.0

    @property
    def operations(self) -> float:
        return sum(share.operations for share in self.shares)

    def __add__(self, other: Work) -> Work:
        """One after the other; equal parts are put together."""
        sums: dict[tuple[str, str], float] = {}
        for share in (*self.shares, *other.shares):
            key = share.part, share.type
            sums[key] = sums.get(key, 0.0) + share.operations
        return Work(tuple(Share(*key, value) for key, value in sums.items()), self.bytes + other.bytes)

    def __mul__(self, times: float) -> Work:
        shares = (replace(share, operations=share.operations * times) for share in self.shares)
        return Work(tuple(shares), self.bytes * times)


def block(net: Transformer, pictures: int, text: int, kind: Kind, numbers: tuple[str, str]) -> Work:
    """One layer of the transformer behind its modulation, which a table knows; `numbers` are the type of the
    activations and the one that Linears multiply."""
    every, (dtype, product) = pictures + text, numbers
    weights = 24 * net.width**2
    shares = (
        Share("linears", product, 2 * 12 * net.width**2 * every),
        Share("attention", dtype, 4 * every**2 * net.width),
    )
    return Work(shares, weights * kind.bits / 8 + 2 * every * net.width * WIDTH[dtype])


def prediction(net: Transformer, pictures: int, text: int, dtype: str) -> Work:
    """The whole transformer once, its modulation multiplied out."""
    kind = KINDS["fp32" if dtype == "float32" else "bf16"]
    width, inner = net.width, net.in_channels
    modulation = 12 * width**2
    layer = block(net, pictures, text, kind, (dtype, dtype))
    layer += Work((Share("linears", dtype, 2 * modulation),), modulation * WIDTH[dtype])
    latents = net.patch_size**2 * net.out_channels
    outside = (inner + latents) * width * pictures + net.joint_attention_dim * width * text
    outside += 256 * width + width**2 + 2 * width**2  # the timestep's two Linears and the last modulation
    weights = (inner + latents + net.joint_attention_dim + 256 + 3 * width) * width
    return layer * net.num_layers + Work((Share("linears", dtype, 2 * outside),), weights * WIDTH[dtype])


def reading(net: Language, tokens: int, dtype: str) -> Work:
    """A prompt through the text encoder."""
    keys = net.num_key_value_heads * net.head_dim
    weights = net.hidden_size * (2 * net.hidden_size + 2 * keys + 3 * net.intermediate_size)
    linears = Share("linears", dtype, 2 * weights * tokens * net.num_hidden_layers)
    attention = Share("attention", dtype, 4 * tokens**2 * net.hidden_size * net.num_hidden_layers)
    return Work((linears, attention), weights * net.num_hidden_layers * WIDTH[dtype])


@dataclass(frozen=True, slots=True)
class Convolution:
    """Channels in and out, sides of the kernel, how often the latents' sides have been doubled where it works, and
    which part of its products is left when they are saved as `csrc/vae.h` does it, Winograd's way."""

    inner: int
    outer: int
    sides: int
    doublings: int
    left: float = 1.0

    @property
    def weights(self) -> int:
        return self.inner * self.outer * self.sides**2


PLAIN, GROWN = 16 / 36, 9 / 36  # products left: of a picture as it is, of one that was just doubled


def decoding(net: Vae, size: tuple[int, int], dtype: str, saved: bool = False) -> Work:
    """Latents to a picture of `size` pixels; `saved`: with as few products as the kernels need."""
    scale = 2 ** len(net.temperal_downsample)
    places = (size[0] // scale) * (size[1] // scale)
    every = list(convolutions(net))
    operations = sum(2 * c.weights * places * 4**c.doublings * (c.left if saved else 1) for c in every)
    middle = net.base_dim * net.dim_mult[-1]
    shares = (Share("convolutions", dtype, operations), Share("attention", dtype, 4 * places**2 * middle))
    ends = places * net.z_dim + size[0] * size[1] * net.input_channels
    return Work(shares, (sum(c.weights for c in every) + ends) * WIDTH[dtype])


def convolutions(net: Vae) -> Iterator[Convolution]:
    """Every one of the decoder."""
    widths = [net.base_dim * each for each in reversed(net.dim_mult)]
    first = widths[0]
    yield Convolution(net.z_dim, net.z_dim, 1, 0)
    yield Convolution(net.z_dim, first, 3, 0)
    yield from [Convolution(first, first, 3, 0, PLAIN)] * 4
    yield from (Convolution(first, 3 * first, 1, 0), Convolution(first, first, 1, 0))  # attention's
    width = first
    for level, target in enumerate(widths):
        for inner in [width] + [target] * net.num_res_blocks:
            yield Convolution(inner, target, 3, level, PLAIN)
            yield Convolution(target, target, 3, level, PLAIN)
            if inner != target:
                yield Convolution(inner, target, 1, level)
        width = target // 2
        if level < len(widths) - 1:
            yield Convolution(target, width, 3, level + 1, GROWN)
    yield Convolution(widths[-1], net.input_channels, 3, len(widths) - 1, PLAIN)


def opening() -> int:
    """Tokens of the template in front of a prompt, which are read and dropped."""
    return Job().opening
