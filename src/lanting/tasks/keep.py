"""Edits that keep the picture: where an edit changed nothing, the given picture's own pixels.

An edit is drawn anew as a whole, so what it leaves alone comes back through the autoencoder and all steps, a little
softer each time. The result is therefore compared with the given picture after the same way through the autoencoder:
what differs no more than the network's noise is taken from the given picture instead. An edit that changes everything
(another light, another cut) differs everywhere and stays as it is drawn.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from PIL.Image import Image
from torch import Tensor

from lanting.flow.latents import LatentCodec
from lanting.flow.loop import Canvas, Tokens
from lanting.tasks.pictures import pictures_from, pixels_of

WINDOW, STRIDE = 8, 4  # pixels in which differences are averaged
NOISE = 9 / 127.5  # root mean square of a difference up to which it is noise: 9 of 255 grey levels
SOFT = 5  # pixels of the blend's blur, beside what comes from the windows


def keeping(canvas: Canvas, codec: LatentCodec, picture: Image, known: Tokens) -> Canvas:
    """The same canvas; its finished pictures have the pixels of `picture` where nothing changed.

    known  the picture, encoded at the size that is drawn
    """
    draw = canvas.finish

    def finish(latents: Tensor) -> list[Image]:
        drawn = draw(latents)
        redrawn = codec.decode(known.data, known.grid).cpu().clamp(-1, 1)  # (1, 3 or 4, H, W)
        size, channels = drawn[0].size, redrawn.shape[1]
        own = pixels_of(picture, size, channels)
        return [pictures_from(blended(own, pixels_of(one, size, channels), redrawn))[0] for one in drawn]

    return replace(canvas, finish=finish)


def blended(own: Tensor, drawn: Tensor, redrawn: Tensor) -> Tensor:
    """`own` where `drawn` is `redrawn` but for noise, else `drawn`; all (1, C, H, W) in [-1, 1]."""
    share = changed(drawn, redrawn)  # (1, 1, H, W)
    return torch.lerp(own, drawn, share)


def changed(drawn: Tensor, redrawn: Tensor) -> Tensor:
    """(1, 1, H, W) from 0 to 1: 1 where two pictures differ by more than noise, and a margin around it."""
    square = (drawn - redrawn).square().mean(1, keepdim=True)
    rms = F.avg_pool2d(square, WINDOW, STRIDE, WINDOW // 2, count_include_pad=False).sqrt()
    wide = F.max_pool2d((rms > NOISE).float(), 3, 1, 1)  # a window further: edges of what changed are faint
    share = F.interpolate(wide, size=square.shape[-2:], mode="bilinear", align_corners=False)
    return F.avg_pool2d(share, SOFT, 1, SOFT // 2, count_include_pad=False)
