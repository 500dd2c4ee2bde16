"""What a batch of nano's training is judged by: the velocity and what the helper heads missed, or pictures drawn again.

Nothing here asks for a number, nor brings one: a GPU never waits, and a step can be recorded as a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from lanting.nn.vae import AutoencoderKLQwenImage
from lanting.train.labels import PICTURED, concepts_of
from lanting.train.model import Answers
from lanting.train.precision import cast
from lanting.train.redraw import reconstruction_loss
from lanting.train.replay import Batch

INK_VARIANCE = 0.15  # of the ink's coverage where there is ink
EMPTY = 0.2  # weight of a token where nothing stands
PLACED_IN_EDITS = 2.0  # times as much: places of words follow from the prompt, in edits from the picture too


class Weights(Protocol):
    """Of the helper heads, see `course.Budget`."""

    @property
    def what(self) -> float: ...
    @property
    def where(self) -> float: ...
    @property
    def ink(self) -> float: ...
    @property
    def shape(self) -> float: ...
    @property
    def scene(self) -> float: ...
    @property
    def starts(self) -> float: ...


def judged(
    error: Tensor, said: Answers, batch: Batch, tables: tuple[Tensor, Tensor], weights: Weights
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss from the velocity's error and the heads' answers, and figures to be logged.

    `tables` are the shapes of tokens (vocabulary, 256) uint8 and the pictograms (concepts, 768).
    """
    asked = batch.what.clamp(min=0)
    inked = (batch.what.sum(-1) > 0).float()  # (B, N)
    weight = inked.clamp(min=EMPTY) * (batch.what[..., 0] >= 0)
    known = (batch.where[..., 0] >= 0).float()  # (B, T)
    spots = batch.where.clamp(min=0)
    starting = batch.starting(weights.starts) or None  # rows whose noisy target shows no places yet; None: all count
    report = {"loss": error.detach(), "read": right(said.what, asked, inked)}  # NaN where nothing was asked
    report["placed"] = right([each[:starting] for each in said.where], spots[:starting], known[:starting])
    total = error + weights.what * entropy(said.what, asked, weight)
    where = weights.where * (1.0 if batch.references is None else PLACED_IN_EDITS)
    total = total + where * entropy(said.where, spots, known)
    if batch.shown is not None:
        there = (batch.shown.sum(-1) > 0).float()
        report["shown"] = right(said.shown, batch.shown, there)
        total = total + weights.what * entropy(said.shown, batch.shown, there.clamp(min=EMPTY))
    ink = mean(missed(said.ink, batch.ink), inked)
    letters = known * (batch.where[..., 2] != PICTURED)
    scene, named = (mean(missed_scene(x, batch.what, tables[1]), known - letters) for x in (said.scene, said.named))
    shapes = tables[0][batch.ids]  # (B, T, 256)
    read, text = (mean(missed(each, shapes), letters) for each in (said.read, said.text))
    report |= {"ink": ink.detach(), "shape": text.detach(), "scene": scene.detach(), "named": named.detach()}
    return total + weights.ink * ink + weights.shape * (read + text) + weights.scene * (scene + named), report


def missed_scene(drawn: Tensor, what: Tensor, pictures: Tensor) -> Tensor:
    """Error of pictograms drawn at every token (B, T, 768), of which only the one that is named counts: (B, T)."""
    wanted = pictures[concepts_of(what).clamp(0, len(pictures) - 1)]  # (B, 768)
    return (drawn.float() - wanted[:, None]).square().mean(-1)


def entropy(logits: Sequence[Tensor], target: Tensor, weight: Tensor) -> Tensor:
    """Weighted mean cross entropy of logits, each (B, n, C), against target (B, n, k), summed over the k."""
    parts = [
        F.cross_entropy(each.float().flatten(0, 1), target[..., i].flatten(), reduction="none")
        for i, each in enumerate(logits)
    ]
    return mean(torch.stack(parts).sum(0).view_as(weight), weight)


def right(logits: Sequence[Tensor], target: Tensor, weight: Tensor) -> Tensor:
    """Share of the weighted places where all answers are right; NaN where there are none."""
    found = torch.stack([each.argmax(-1) == target[..., i] for i, each in enumerate(logits)]).all(0)
    return (found * weight).sum() / weight.sum()


def missed(drawn: Tensor, wanted: Tensor) -> Tensor:
    """Error of ink (B, n, squares) against uint8 coverage, relative to its variance: (B, n)."""
    return (drawn.float() - wanted / 255).square().mean(-1) / INK_VARIANCE


def mean(each: Tensor, weight: Tensor) -> Tensor:
    return (each * weight).sum() / weight.sum().clamp(min=1)


def redrawn(vae: AutoencoderKLQwenImage, wanted: Tensor, noise: float, edges: float, whole: bool) -> Tensor:
    """How badly an autoencoder draws pictures (B, 3, H, W) again from noisy latents; `whole`: its encoder learns too.

    `edges` is the weight of differences between neighbouring pixels.
    """
    with cast(wanted.device):
        with torch.set_grad_enabled(whole):
            mu, logvar = (moment.float() for moment in vae.encode(wanted))
        drawn = vae.reconstruct(mu + noise * torch.randn_like(mu)).float()
    loss = reconstruction_loss(drawn, wanted, edges)
    if whole:  # latents near unit size; the published variance is e^-4.6, the usual noise squared
        loss = loss + 1e-3 * (mu.square().mean() + (logvar + 4.6).square().mean())
    return loss
