"""Muon: momentum whose matrix updates are made orthogonal by a Newton-Schulz iteration (Jordan et al., 2024).

torch has had an own Muon since 2.9, one matrix at a time; we accept 2.8, and stack matrices of one shape so that a
small network's dozens of little products become a few batched ones. The update is scaled to the root mean square
of AdamW's, so both optimizers share one learning rate.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lanting.train.graphs import Playback
from lanting.train.precision import product_dtype

QUINTIC = (3.4445, -4.7750, 2.0315)


def orthogonalize(matrices: Tensor, steps: int = 4) -> Tensor:
    """Push all singular values of each matrix of (k, m, n) towards one; bfloat16 is exact enough for that
    where it is fast."""
    a, b, c = QUINTIC
    x = (matrices / (matrices.norm(dim=(-2, -1), keepdim=True) + 1e-7)).to(product_dtype(matrices.device))
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(matrices.dtype, memory_format=torch.contiguous_format)


class Muon(torch.optim.Optimizer):
    """For the weights of Linears and convolutions (flattened to matrices); everything else belongs to AdamW."""

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float = 2e-3,
        momentum: float = 0.95,
        weight_decay: float = 0.01,
        newton_schulz_steps: int = 4,
    ):
        settings = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "steps": newton_schulz_steps,
        }
        super().__init__(params, settings)

        self.playback: Playback | None = None  # on a GPU, where gradients stay where they are

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        for group in self.param_groups:
            same: dict[tuple[int, int], list[nn.Parameter]] = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    same[(p.shape[0], p.numel() // p.shape[0])].append(p)
            work = partial(self.updates, same, group)
            if self.playback is None:
                found = work()
            else:
                found = self.playback(tuple(id(p) for params in same.values() for p in params), work, [])
            for (shape, params), stacked in zip(same.items(), found, strict=True):
                self.move(params, stacked, shape, group)

    def updates(self, same: dict[tuple[int, int], list[nn.Parameter]], group: dict) -> tuple[Tensor, ...]:
        """For every shape the updates of its parameters (k, m, n); momenta move on."""
        return tuple(self.update(params, shape, group) for shape, params in same.items())

    def update(self, params: list[nn.Parameter], shape: tuple[int, int], group: dict) -> Tensor:
        """The updates of all parameters that flatten to the same matrix shape: (k, m, n)."""
        for p in params:
            if "momentum" not in self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
        kept = [self.state[p]["momentum"] for p in params]
        grads = [p.grad for p in params if p.grad is not None]
        torch._foreach_mul_(kept, group["momentum"])
        torch._foreach_add_(kept, grads)
        ahead = torch._foreach_add(grads, kept, alpha=group["momentum"])  # Nesterov's look-ahead
        return orthogonalize(torch.stack([g.reshape(shape) for g in ahead]), group["steps"])

    def move(self, params: list[nn.Parameter], updates: Tensor, shape: tuple[int, int], group: dict) -> None:
        """Decay the parameters and move them."""
        scale = 0.2 * max(shape) ** 0.5  # the RMS an AdamW step would have
        torch._foreach_mul_(list[Tensor](params), 1 - group["lr"] * group["weight_decay"])
        moves = [update.reshape(p.shape) for p, update in zip(params, updates.unbind(), strict=True)]
        torch._foreach_add_(list[Tensor](params), moves, alpha=-group["lr"] * scale)


def average_gradients(params: Sequence[nn.Parameter], seconds: float, world: int) -> float:
    """Give all `world` processes the mean of their gradients, and return the mean of their clocks.

    Rates and the end of a run must go by that time and not by a process's own, or the processes walk apart and one
    waits for gradients of another that has already stopped.
    """
    grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in params]
    flat = torch.cat([*(g.flatten() for g in grads), torch.tensor([seconds])])
    dist.all_reduce(flat)
    flat /= world
    for p, mean in zip(params, flat[:-1].split([g.numel() for g in grads]), strict=True):
        p.grad = mean.view_as(p)
    return flat[-1].item()


def mean_gradients(parameters: Sequence[nn.Parameter], world: int) -> None:
    """Give all processes the mean of their gradients without asking the GPU for anything."""
    for p in parameters:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    grads = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([g.flatten() for g in grads])
    dist.all_reduce(flat)
    flat /= world
    parts = flat.split([g.numel() for g in grads])
    torch._foreach_copy_(grads, [part.view_as(g) for part, g in zip(parts, grads, strict=True)])
