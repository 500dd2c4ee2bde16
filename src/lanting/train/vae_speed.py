"""What makes the autoencoder fast on a GPU; nothing here changes what it computes beyond rounding.

Its layers are thin, so that time goes into moving pictures through memory: a norm and a SiLU, as they come, read and
write them a dozen times in 32 bits. Compiled, they do it once. Its few shapes of batches are recorded (`graphs`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental import _config as shapes

from lanting.core.lang import Phrase
from lanting.nn.vae import AutoencoderKLQwenImage, ChannelNorm, ResidualBlock
from lanting.nn.vae import channel_norm as normed
from lanting.train import graphs
from lanting.train.graphs import Attempt, Playback, Recorder, record_updates

if TYPE_CHECKING:
    from lanting.train.vae import VAETrainer

COMPILED = True  # whether norms are, on a GPU
Norm = Callable[[Tensor, Tensor, float], Tensor]


def normed_silu(x: Tensor, gamma: Tensor, scale: float) -> Tensor:
    return F.silu(normed(x, gamma, scale))


class Compiled(Attempt):
    """A function of a picture in 16 bits, compiled once for each number of channels; `plain` in 32 bits."""

    def __init__(self, plain: Norm):
        compiled: Norm = torch.compile(plain, dynamic=True)

        def fast(x: Tensor, gamma: Tensor, scale: float) -> Tensor:  # as usual, squares would be compiled apart
            with shapes.patch(use_duck_shape=False):  # pyright: ignore[reportAttributeAccessIssue]
                return compiled(x, gamma, scale)

        super().__init__(fast, plain, Phrase("norms are"))

    def __call__(self, x: Tensor, gamma: Tensor, scale: float) -> Tensor:
        known = x.dtype in (torch.bfloat16, torch.float16)
        return super().__call__(x, gamma, scale) if known else self.plain(x, gamma, scale)


def residual(block: ResidualBlock, norm: Norm, x: Tensor) -> Tensor:
    """`ResidualBlock.forward`."""
    y = block.conv1(norm(x, block.norm1.gamma, block.norm1.scale))
    y = block.conv2(norm(y, block.norm2.gamma, block.norm2.scale))
    return block.conv_shortcut(x) + y


def fuse(vae: AutoencoderKLQwenImage) -> AutoencoderKLQwenImage:
    """Let the autoencoder use compiled norms. Weights and their names stay."""
    alone, together = Compiled(normed), Compiled(normed_silu)
    for module in vae.modules():
        if isinstance(module, ResidualBlock):
            module.__dict__["forward"] = partial(residual, module, together)
        elif isinstance(module, ChannelNorm):
            module.__dict__["forward"] = partial(lambda norm, x: alone(x, norm.gamma, norm.scale), module)
    return vae


class RecordedSteps:
    """Forward and backward pass of an autoencoder's trainer, recorded for each of its few shapes of batches."""

    def __init__(self, trainer: VAETrainer, records: Recorder | None = None):
        self.trainer, self.playback = trainer, Playback(records or Recorder(), Phrase("steps are"))
        self.sums = [torch.zeros_like(p) for p in trainer.params]
        record_updates(trainer.optimizers, self.playback.recorder)

    def __call__(self, wanted: Tensor) -> Tensor:
        """Gradients of the loss on pictures (B, 3, H, W), in place; returns the loss."""
        (loss,) = self.playback("step", self.through, [wanted])
        for parameter, grad in zip(self.trainer.params, self.sums, strict=True):
            parameter.grad = grad
        return loss.clone()

    def through(self, wanted: Tensor) -> tuple[Tensor, ...]:
        loss = self.trainer.loss(wanted)
        torch._foreach_copy_(self.sums, torch.autograd.grad(loss, self.trainer.params))
        return (loss.detach(),)


def sped_up(trainer: VAETrainer) -> Callable[[Tensor], Tensor] | None:
    """What goes forward and backward instead of the trainer itself; None on a CPU."""
    if trainer.device.type != "cuda":
        return None
    if COMPILED:
        fuse(trainer.vae)
    return RecordedSteps(trainer) if graphs.MOST else None
