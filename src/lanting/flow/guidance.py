"""True classifier-free guidance: what the prompt adds over the negative prompt, amplified.

Guidance is arithmetic on two predictions, so it is a function here and not a branch of the loop. The two
predictions come from two calls or from one call of twice the batch (`join`), which suits large machines with
small pictures. Source: "Classifier-Free Diffusion Guidance"; the norm rescale is Qwen-Image's own.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def guide(positive: Tensor, negative: Tensor, scale: float, renormalize: bool = True) -> Tensor:
    """(B, N, C) twice -> (B, N, C): negative + scale (positive - negative).

    `renormalize` gives every token the length of its positive prediction, which keeps high scales from
    over-saturating. Where the guided token is zero, it stays zero (the reference divides 0 by 0 there).
    """
    guided = negative + scale * (positive - negative)
    if not renormalize:
        return guided
    length = torch.linalg.vector_norm(guided, dim=-1, keepdim=True)  # (B, N, 1)
    wanted = torch.linalg.vector_norm(positive, dim=-1, keepdim=True)
    return guided * (wanted / length.masked_fill(length == 0, 1))


def join(*sides: tuple[Tensor, Tensor | None]) -> tuple[Tensor, Tensor | None]:
    """(embeds, mask) of several batches stacked into those of one batch, shorter texts padded.

    The mask stays None when nothing is padded: an all-true mask only selects a slower attention kernel.
    """
    length = max(embeds.shape[1] for embeds, _ in sides)
    whole = all(mask is None and embeds.shape[1] == length for embeds, mask in sides)
    padded = [_pad(embeds, mask, length) for embeds, mask in sides]
    embeds = torch.cat([embeds for embeds, _ in padded])  # (B of all, length, D)
    return embeds, None if whole else torch.cat([mask for _, mask in padded])  # (B of all, length)


def _pad(embeds: Tensor, mask: Tensor | None, length: int) -> tuple[Tensor, Tensor]:
    """(B, T, D), (B, T) or None -> (B, length, D), (B, length) bool: zeros and False on the right."""
    missing = length - embeds.shape[1]
    real = torch.ones(embeds.shape[:2], dtype=torch.bool, device=embeds.device) if mask is None else mask.bool()
    return F.pad(embeds, (0, 0, 0, missing)), F.pad(real, (0, missing), value=False)
