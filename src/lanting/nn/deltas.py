"""What a LoRA file can add to a weight, besides two thin matrices: each form applied without building the sum.

    LowRank     up @ down                                  LoRA
    Kronecker   w1 (x) w2, seen as blocks                  LoKr
    Hadamard    (w1_a @ w1_b) * (w2_a @ w2_b)              LoHa
    Full        a whole matrix                             "diff"
    Shift       a bias
    Decomposed  new lengths for the rows or columns of the changed weight                            DoRA
Tensors are buffers that no state_dict holds: whoever moves a network's own weights about leaves them alone.
Sources: LoRA (Hu et al., 2021), FedPara (Hyeon-Woo et al., 2022), LyCORIS (Yeh et al., 2024), DoRA (Liu et al., 2024).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lanting.nn.linears import PackedLinear


def dense_weight(linear: nn.Module, dtype: torch.dtype) -> Tensor:
    """The weight (out, in) of a Linear of any kind."""
    if isinstance(linear, PackedLinear):
        return linear.dense(dtype)
    weight = linear.weight
    assert isinstance(weight, Tensor)
    return weight.detach().to(dtype)


class Delta(nn.Module):
    """A change dW of one weight (out, in), its own scale included; how much of it is added is decided outside."""

    def keep(self, **tensors: Tensor) -> None:
        """Hold tensors where `to` finds them and `state_dict` does not."""
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor, persistent=False)

    def apply_to(self, x: Tensor) -> Tensor:
        """dW x: (..., in) -> (..., out)."""
        raise NotImplementedError

    def dense(self) -> Tensor:
        """dW in float32 (out, in)."""
        raise NotImplementedError

    def shift(self) -> Tensor | None:
        """What is added to the bias (out,)."""
        return None

    def forward(self, x: Tensor, base: nn.Module, plain: Tensor) -> Tensor:
        """The change of the Linear's result `plain` = base(x), (..., out)."""
        return self.apply_to(x)


class LowRank(Delta):
    """scale * up @ down."""

    down: Tensor
    up: Tensor

    def __init__(self, down: Tensor, up: Tensor, scale: float = 1.0):
        super().__init__()
        self.keep(down=down, up=up)  # (r, in), (out, r)
        self.scale = scale

    def apply_to(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.down) * self.scale, self.up)

    def dense(self) -> Tensor:
        return self.scale * self.up.float() @ self.down.float()


class Kronecker(Delta):
    """scale * w1 (x) w2, with w1 (a, b) and w2 (c, d) for a weight (a c, b d).

    w2 comes as the matrices that make it, in the order in which they meet the input: (w2,) or (w2_b, w2_a).
    """

    w1: Tensor

    def __init__(self, w1: Tensor, w2: Sequence[Tensor], scale: float = 1.0):
        super().__init__()
        self.keep(w1=w1, **{f"w2_{i}": matrix for i, matrix in enumerate(w2)})
        self.count, self.scale = len(w2), scale

    def factors(self) -> list[Tensor]:
        return [self.get_buffer(f"w2_{i}") for i in range(self.count)]

    def apply_to(self, x: Tensor) -> Tensor:
        blocks = x.unflatten(-1, (self.w1.shape[1], -1))  # (..., b, d)
        for matrix in self.factors():
            blocks = F.linear(blocks, matrix)  # (..., b, c) at last
        return (self.w1 @ blocks).flatten(-2) * self.scale  # (..., a c)

    def dense(self) -> Tensor:
        w2 = self.factors()[-1].float()
        for matrix in reversed(self.factors()[:-1]):
            w2 = w2 @ matrix.float()
        return self.scale * torch.kron(self.w1.float(), w2.contiguous())


class Hadamard(Delta):
    """scale * (w1_a @ w1_b) * (w2_a @ w2_b), elementwise between the brackets; *_a (out, r), *_b (r, in).

    The product of two low ranks is one of rank r^2. Its thin matrices are made for each use and not kept, since they
    are r times as large as the file; where they would be larger than the weight, the weight's change is made instead.
    """

    w1_a: Tensor
    w1_b: Tensor
    w2_a: Tensor
    w2_b: Tensor

    def __init__(self, w1_a: Tensor, w1_b: Tensor, w2_a: Tensor, w2_b: Tensor, scale: float = 1.0):
        super().__init__()
        self.keep(w1_a=w1_a, w1_b=w1_b, w2_a=w2_a, w2_b=w2_b)
        self.scale = scale
        rank, out, inner = len(w1_b) * len(w2_b), len(w1_a), w1_b.shape[1]
        self.thin = rank * (out + inner) < out * inner

    def apply_to(self, x: Tensor) -> Tensor:
        if not self.thin:
            return F.linear(x, self.dense().to(x.dtype))
        down = (self.w1_b[:, None] * self.w2_b[None]).flatten(0, 1)  # (r1 r2, in)
        up = (self.w1_a[:, :, None] * self.w2_a[:, None]).flatten(1)  # (out, r1 r2)
        return F.linear(F.linear(x, down) * self.scale, up)

    def dense(self) -> Tensor:
        return self.scale * (self.w1_a.float() @ self.w1_b.float()) * (self.w2_a.float() @ self.w2_b.float())


class Full(Delta):
    """A whole matrix (out, in)."""

    diff: Tensor

    def __init__(self, diff: Tensor):
        super().__init__()
        self.keep(diff=diff)

    def apply_to(self, x: Tensor) -> Tensor:
        return F.linear(x, self.diff)

    def dense(self) -> Tensor:
        return self.diff.float()


class Shift(Delta):
    """A change of the bias alone, (out,)."""

    value: Tensor

    def __init__(self, value: Tensor):
        super().__init__()
        self.keep(value=value)

    def shift(self) -> Tensor | None:
        return self.value

    def forward(self, x: Tensor, base: nn.Module, plain: Tensor) -> Tensor:
        return self.value.to(plain.dtype)


class Decomposed(Delta):
    """The weight W + dW with every row (or column) stretched to a learned length: dW' = (W + dW) g - W.

    `magnitude` are the lengths, (out,) of rows or (1, in) of columns. The lengths now are measured on the expanded
    weight when it is first used, because until then it may be on a disk; they are kept, the weight is not.
    """

    magnitude: Tensor
    gain: Tensor | None

    def __init__(self, inner: Delta, magnitude: Tensor):
        super().__init__()
        self.inner = inner
        self.rows = magnitude.ndim == 1
        self.keep(magnitude=magnitude.float().flatten())
        self.register_buffer("gain", None, persistent=False)

    def measure(self, base: nn.Module) -> Tensor:
        """g: wanted length / length now, float32 (out,) or (in,)."""
        gain = self.gain
        if gain is None:
            changed = dense_weight(base, torch.float32) + self.inner.dense()
            lengths = torch.linalg.vector_norm(changed, dim=1 if self.rows else 0)
            self.gain = gain = self.magnitude / lengths.clamp_min(torch.finfo(torch.float32).tiny)
        return gain

    def forward(self, x: Tensor, base: nn.Module, plain: Tensor) -> Tensor:
        gain = self.measure(base)
        if not self.rows:
            stretched = (x * gain).to(x.dtype)
            return base(stretched) - plain + self.inner.apply_to(stretched)  # the bias cancels
        bias = base.bias
        linear = plain if bias is None else plain - bias.to(plain.dtype)  # type: ignore[operator]
        return ((gain - 1) * linear + gain * self.inner.apply_to(x)).to(plain.dtype)

    def change_of(self, base: nn.Module) -> Tensor:
        """dW' in float32 (out, in)."""
        weight, gain = dense_weight(base, torch.float32), self.measure(base)
        return (weight + self.inner.dense()) * (gain[:, None] if self.rows else gain) - weight
